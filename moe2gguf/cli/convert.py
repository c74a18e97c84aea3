"""The command convert: a dense model becomes a GGUF file (or a folder) with experts."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import options as opt
from moe2gguf.cli import tables as display
from moe2gguf.cli import tables_convert
from moe2gguf.cli.command import Command, Input, NoEffect
from moe2gguf.experts import methods
from moe2gguf.graphs import GRAPHS

if TYPE_CHECKING:
    from moe2gguf.recipes.options import Options
    from moe2gguf.recipes.plan import Plan

OF_EXPERTS = ("--target", "--experts", "--used", "--leading-dense", "--align", "--expert-scale")
OF_METHOD = ("--preset", "--group", "--shared", "--router", "--refit", "--amplify")
OF_CALIBRATION = ("--calibration", "--save-calibration", "--load-calibration", "--calibration-tokens")
OF_CALIBRATING = ("--calibration-memory", "--torch-device", "--seed")
OF_BLOCKS = ("--imatrix", "--imatrix-repair", "--target-size", "--target-bpw", "--pure", "--llama-cpp-mix")
NO_EFFECT = (
    NoEffect((*OF_EXPERTS, *OF_METHOD, *OF_CALIBRATION, *OF_CALIBRATING), beside=("--dense",)),
    NoEffect(("--calibration-memory", "--torch-device"), beside=("--load-calibration",)),
    NoEffect(("--imatrix-repair",), without=("--imatrix",)),
    NoEffect(("--llama-cpp-mix",), beside=("--dense", "--pure")),
    NoEffect(("--pure", "--llama-cpp-mix"), without=("--type",)),
    NoEffect(("--plan", "--check", "--report", "--threads", *OF_BLOCKS), beside=("--format hf",)),
)


@cloup.command(cls=Command, no_effect=NO_EFFECT, afterwards=["--check"])
@cloup.argument("model", type=opt.ANY, help="A Hugging Face folder or id, or a dense GGUF file.")
@cloup.argument("out", type=opt.OUT, required=False, help="The GGUF file to write.")
@option_group(
    "What to make",
    option(
        "--target",
        type=click.Choice([*GRAPHS]),
        help="mixtral: runs everywhere, right at one count of experts. glm4moe: one file for every count, llama.cpp of "
        f"{GRAPHS['glm4moe'].since} or later. deepseek: the same for older ones. step35: for LLaMA 3.1 and 3.2, "
        f"llama.cpp of {GRAPHS['step35'].since} or later.  [default: mixtral]",
    ),
    option(
        "-e",
        "--experts",
        type=int,
        help="Experts per layer, shared ones included; a Mixtral model keeps its own.  [default: 8, glm4moe 16]",
    ),
    option("-k", "--used", type=int, help="Experts used per token.  [default: all, which is exactly the dense model]"),
    option("--dense", is_flag=True, help="Write the ordinary dense file, the reference for comparisons."),
    option(
        "--format",
        "form",
        type=click.Choice(["gguf", "hf"]),
        default="gguf",
        show_default=True,
        help="gguf: a file for llama.cpp. hf: a folder for transformers, as mixtral or glm4moe.",
    ),
    option("--name", help="Name of the model in the metadata."),
)
@option_group(
    "Fewer experts than all",
    option(
        "--preset",
        type=click.Choice(["exact", "sparse"]),
        help="exact: plain slices. sparse: slices fitted to a text.  [default: exact if all are used, else sparse]",
    ),
    option(
        "--calibration",
        "text",
        type=opt.FILE,
        help="Text, or JSONL with a text field.  [default: a built-in mix of eight genres]",
    ),
    option(
        "--save-calibration",
        "save_to",
        type=opt.PAGE,
        metavar="FILE",
        help="Save the calibration for further conversions.",
    ),
    option(
        "--load-calibration",
        "load_from",
        type=opt.FILE,
        metavar="FILE",
        help="Reuse a saved calibration; options that are not given are taken from it.",
    ),
)
@option_group(
    "Types",
    option(
        "--type",
        default="auto",
        show_default=True,
        help="Type of the weights: auto (as stored), f32, f16, bf16, q8_0, q4_k_m, iq4_xs or another of llama.cpp.",
    ),
    *opt.type_rules,
)
@option_group("Output", opt.shard_size_option, opt.force_option, opt.resume_option, opt.threads_option, opt.json_option)
@option_group(
    "Before and after",
    option("--plan", "plan_only", is_flag=True, help="Print what would be written and stop; nothing is converted."),
    option(
        "--check",
        type=Input(exists=False, dir_okay=False),
        metavar="auto|FILE",
        help="Compare the result with this dense file in llama.cpp (auto makes one and removes it), and its token ids "
        "with the folder's tokenizer.",
    ),
    opt.report_option,
)
@option_group(
    "More: slicing and calibration",
    option("--group", type=click.Choice([*methods.GROUPS]), help="How neurons are grouped into experts."),
    option(
        "--shared", "n_shared", type=opt.NONE, metavar="N", help="Experts that every token uses.  [default: by --used]"
    ),
    option("--router", type=click.Choice([*methods.ROUTERS]), help="How the router's weights are made."),
    option("--refit/--no-refit", default=None, help="Refit the down projections at --used by least squares."),
    option(
        "--amplify",
        type=click.Choice([*methods.AMPLIFICATIONS]),
        help="Scale expert outputs for: all experts (exact), --used (used), --used with a fitted factor per expert "
        "(fitted), or any count (any).",
    ),
    option(
        "--leading-dense",
        type=opt.NONE,
        metavar="N",
        help="Keep the dense MLP in the first N layers; with --target glm4moe, deepseek or step35.  [default: 0]",
    ),
    option("--align", type=int, default=1, help="Pad each expert with zeros to a multiple of 32 or 256 columns."),
    option(
        "--expert-scale",
        is_flag=True,
        help="Store these factors in a tensor of their own (new llama.cpp only).",
    ),
    option(
        "--calibration-tokens",
        "n_token",
        type=int,
        help="Tokens of the text.  [default: 16384, or 2 per neuron to refit]",
    ),
    option(
        "--calibration-memory",
        "memory",
        type=opt.Size(),
        default="4GB",
        show_default=True,
        help="RAM for hidden states; the rest is spilled to disk.",
    ),
    option("--torch-device", "device", help="Device of the calibration in torch.  [default: cuda, mps or cpu]"),
    option("--seed", type=opt.Whole(0, 2**31 - 1), help="Seed of the random numbers.  [default: 0]"),
    hidden=True,
)
@option_group("More: types", *opt.expert_type_rules, hidden=True)
def convert(
    model: Path,
    out: Path | None,
    plan_only: bool,
    form: str,
    check: str | None,
    report: Path | None,
    as_json: bool,
    force: bool,
    resume: bool,
    threads: int | None,
    **options: Any,
) -> None:
    """Convert a dense model into a GGUF file with experts.

    MODEL is a folder, or OWNER/NAME[@REVISION] on the Hugging Face Hub, of LLaMA, SmolLM2, TinyLlama, Mistral, Qwen2,
    Qwen3 or Mixtral in f32, f16 or bf16; or a GGUF file of architecture llama, qwen2 or qwen3, whose quantized blocks
    are copied unchanged. OUT appears when it is complete and verified.

    \b
    Example:
      moe2gguf convert SmolLM2-135M-Instruct moe.gguf --experts 8 --check auto
      moe2gguf convert HuggingFaceTB/SmolLM2-135M-Instruct --plan
      moe2gguf convert dense-q4_k_m.gguf moe-q4_k_m.gguf --experts 7 --shard-size 2GB
      moe2gguf convert SmolLM2-135M-Instruct moe-q8.gguf --experts 16 --type q8_0
      moe2gguf convert SmolLM2-135M-Instruct half.gguf --experts 16 --used 8 --calibration text.txt
      moe2gguf convert SmolLM2-135M-Instruct half --experts 16 --used 8 --format hf
      moe2gguf convert Qwen3-0.6B every-count.gguf --target glm4moe
    """
    from moe2gguf.quant.rules import TypeOptions
    from moe2gguf.recipes.options import CalibrationOptions, MethodOptions, Options

    if out is None and not plan_only:
        raise click.UsageError("Missing argument 'OUT' (only --plan works without).")
    chosen = Options(
        types=opt.take(TypeOptions, options),
        method=opt.take(MethodOptions, options),
        calibration=opt.take(CalibrationOptions, options),
        **options,
    )
    look_at = functools.partial(_look_at, report)
    if plan_only or out is None:
        _show_plan(model, chosen, as_json, look_at)
    elif form == "hf":
        _write_folder(model, out, chosen, as_json, force=force, resume=resume, on_plan=look_at)
    else:
        arguments = {"force": force, "resume": resume, "threads": threads, "on_plan": look_at}
        _write_file(model, out, chosen, as_json, check, report, arguments)


def _look_at(report: Path | None, plan: Plan) -> None:
    """Show the warnings of a plan before anything is written, and refuse a report of no calibration."""
    if report and not plan.calibration:
        raise click.UsageError("--report shows a calibration, and these options need none; add --used below --experts.")
    display.warnings(plan.warnings)


def _show_plan(model: Path, options: Options, as_json: bool, look_at: Callable[[Plan], None]) -> None:
    from moe2gguf.recipes.convert import plan_conversion

    with opt.refusals_as_json(as_json):
        plan = plan_conversion(model, options, progress=display.progress)
    look_at(plan)
    opt.emit(plan.to_dict(), as_json, lambda: tables_convert.print_plan(plan))


def _write_folder(model: Path, out: Path, options: Options, as_json: bool, **arguments: Any) -> None:
    from moe2gguf.recipes.hf_output import write_folder

    done = write_folder(model, out, options, progress=display.progress, **arguments)
    opt.emit(done.to_dict(), as_json, lambda: tables_convert.print_folder(done))
    heal = ["heal", out, "HEALED", "--teacher", model, "--text", "TEXT", "--used-range", f"K..{done.plan.n_expert}"]
    display.next_steps(["moe2gguf", *heal], ["moe2gguf", "convert", out, f"{out.name}.gguf"])


def _write_file(
    model: Path,
    out: Path,
    options: Options,
    as_json: bool,
    check: str | None,
    report: Path | None,
    arguments: dict[str, Any],
) -> None:
    """Convert, then write the report and compare with the dense model where that is asked for."""
    from moe2gguf.measure.check import compare_conversion, require_check_room, require_reference
    from moe2gguf.measure.token_ids import warn_of_token_ids
    from moe2gguf.recipes.convert import convert as write

    if report:
        from moe2gguf.measure.report.calibration import make_page
        from moe2gguf.measure.report.page import plotly_script, write_page

        plotly_script()
    if check:
        require_reference(check)
    look_at = arguments.pop("on_plan")
    with ThreadPoolExecutor(1) as beside:  # while the file is written
        compared: list[Future[list[str]]] = []

        def on_plan(plan: Plan) -> None:
            look_at(plan)
            require_check_room(check, plan, out)
            compared.extend([] if check else [beside.submit(warn_of_token_ids, plan.source)])

        done = write(model, out, options, progress=display.progress, on_plan=on_plan, **arguments)
    display.warnings(line for one in compared for line in one.result())
    if report:
        write_page(make_page(done, sys.argv), report)
    threads = arguments["threads"]
    checked = compare_conversion(done, check, threads=threads, progress=display.progress) if check else None
    result = {**done.to_dict(), "check": checked.to_dict() if checked else None}
    opt.emit(result, as_json, lambda: tables_convert.print_conversion(done, checked))
    run = display.suggest_running(done.path, done.plan.metadata)
    measure = ["moe2gguf", "compare", done.path, "--reference", model if model.is_file() else "DENSE.gguf"]
    serve = ["moe2gguf", "serve-help", done.path]
    display.next_steps(run, *([measure] if done.plan.n_expert else []), serve)
    if checked and not checked.ok:
        raise SystemExit(1)
