"""The command convert: a dense model becomes a GGUF file (or a folder) with experts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import tables as display
from moe2gguf.cli import tables_convert
from moe2gguf.cli.options import (
    FILE,
    PATH,
    AlwaysOn,
    Size,
    emit,
    json_option,
    resume_option,
    shard_size_option,
    threads_option,
    type_options,
)
from moe2gguf.errors import PlanError
from moe2gguf.experts import methods


@cloup.command()
@cloup.argument("model", type=click.Path(path_type=Path), help="Hugging Face folder, or a dense GGUF file.")
@cloup.argument("out", type=click.Path(path_type=Path), required=False, help="The GGUF file to write.")
@option_group(
    "Slicing",
    option("-n", "--experts", type=int, help="Experts per MLP; a Mixtral model keeps its own.  [default: 8]"),
    option("-k", "--used", type=int, help="Experts that run per token.  [default: all, the exact dense model]"),
    option("--align", type=int, default=1, help="Pad experts with zero neurons to a multiple of 32 or 256."),
    option("--expert-scale", is_flag=True, help="Amplify by a tensor of scales, not in the weights (new llama.cpp)."),
    option("--dense", is_flag=True, help="Do not slice: write the ordinary dense file, the reference."),
)
@option_group(
    "Experts that hold together when only some run (defaults: exact if all run, sparse below)",
    option("--preset", type=click.Choice(["exact", "sparse"]), help="Where the options below start from."),
    option("--group", type=click.Choice([*methods.GROUPS]), help="How neurons are grouped."),
    option("--shared", "n_shared", type=AlwaysOn(), metavar="N|auto", help="Experts that every token runs."),
    option("--router", type=click.Choice([*methods.ROUTERS]), help="How experts are chosen."),
    option("--refit/--no-refit", default=None, help="Correct the down projections for what does not run."),
    option("--amplify", type=click.Choice([*methods.AMPLIFICATIONS]), help="Which counts sound right."),
    option(
        "--calibration",
        type=FILE,
        help="Text, or JSONL with a text field; `sample` writes one.  [default: a text of many kinds]",
    ),
    option(
        "--calibration-tokens",
        type=int,
        help="How much of it.  [default: 16384, or 2 per neuron to refit]",
    ),
    option("--device", help="torch device of the calibration.  [default: cuda, mps or cpu]"),
    option(
        "--calibration-memory", type=Size(), default="4GB", show_default=True, help="More hidden states go to disk."
    ),
    option("--save-calibration", type=PATH, metavar="FILE", help="Keep the calibration for other files."),
    option("--load-calibration", type=FILE, metavar="FILE", help="Use a kept one; it decides what is left open here."),
    option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of the grouping."),
)
@option_group(
    "Output",
    option(
        "--format",
        "form",
        type=click.Choice(["gguf", "hf"]),
        default="gguf",
        show_default=True,
        help="gguf: one file. hf: a folder that transformers loads as MixtralForCausalLM.",
    ),
    option(
        "-t",
        "--type",
        default="auto",
        show_default=True,
        help="auto (as stored), f32, f16, bf16, or a type of llama.cpp such as q8_0, q6_k, q4_k_m or iq4_xs.",
    ),
    option("--name", help="The model's name in the metadata."),
    shard_size_option,
    option("-f", "--force", is_flag=True, help="Replace OUT if it exists."),
    resume_option,
    threads_option,
)
@type_options
@option_group(
    "Looking first, checking after",
    option("--plan", "plan_only", is_flag=True, help="Print what would be written, read no weights, and stop."),
    option(
        "--check",
        metavar="auto|FILE",
        help="Compare OUT in llama.cpp with its dense twin FILE (auto: make one, then remove it).",
    ),
    option("--report", type=PATH, metavar="FILE.html", help="Also write a page with pictures of the calibration."),
    json_option,
)
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

    Folders of LLaMA, SmolLM2, TinyLlama, Mistral, Qwen2 and Mixtral in f32, f16 or bf16; GGUF files of arch llama or
    qwen2, whose blocks are copied, not quantized again. The file appears under its name only when it is complete and
    verified.

    \b
    Example:
      moe2gguf convert SmolLM2-135M-Instruct moe.gguf --experts 8 --check auto
      moe2gguf convert SmolLM2-135M-Instruct --plan
      moe2gguf convert dense-q4_k_m.gguf moe-q4_k_m.gguf --experts 7 --shard-size 2GB
      moe2gguf convert SmolLM2-135M-Instruct moe-q8.gguf -n 16 --align 32 --type q8_0
      moe2gguf convert SmolLM2-135M-Instruct half.gguf -n 16 --used 8 --calibration text.txt
      moe2gguf convert SmolLM2-135M-Instruct half -n 16 --used 8 --calibration text.txt --format hf
    """
    from moe2gguf.measure.check import check_conversion
    from moe2gguf.recipes.convert import write_plan
    from moe2gguf.recipes.hf_output import write_folder
    from moe2gguf.recipes.options import Options
    from moe2gguf.recipes.plan import plan_conversion

    if out is None and not plan_only:
        raise click.UsageError("Missing argument 'OUT' (only --plan works without).")
    if form == "hf" and (plan_only or check or report):
        raise click.UsageError("--plan, --check and --report are for GGUF files; make one of the folder to look at it.")
    if report:
        from moe2gguf.measure.report.calibration import make_page
        from moe2gguf.measure.report.page import require_plotly, write_page
    try:
        plan = plan_conversion(model, Options(**options))
    except PlanError as error:
        if as_json and plan_only:
            emit({"refusals": error.refusals}, as_json, lambda: None)
        raise
    if report and not (plan.text or plan.saved):
        raise click.UsageError("--report shows a calibration, and these options need none; add --used below --experts.")
    display.warnings(plan.warnings)
    if plan_only or out is None:
        emit(plan.to_dict(), as_json, lambda: tables_convert.plan(plan))
        return
    if report:
        require_plotly(report)
    if form == "hf":
        done = write_folder(plan, out, force=force, progress=display.progress)
        emit(done.to_dict(), as_json, lambda: tables_convert.folder(done))
        return
    done = write_plan(plan, out, force=force, resume=resume, threads=threads, progress=display.progress)
    if report:
        write_page(make_page(done, sys.argv), report)
    checked = check_conversion(done, check, threads=threads, progress=display.progress) if check else None
    result = {**done.to_dict(), "check": checked.to_dict() if checked else None}
    emit(result, as_json, lambda: tables_convert.conversion(done, checked))
    if checked and not checked.ok:
        raise SystemExit(1)
