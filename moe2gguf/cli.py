"""The command line: parse, call one library function, print.

Results go to stdout (`--json` for machines), progress and notes to stderr. Exit codes: 0 done, 1 a Moe2GgufError,
2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
import cloup
from click.shell_completion import get_completion_class
from cloup import HelpTheme, Style, option, option_group

from moe2gguf import display
from moe2gguf.errors import Moe2GgufError, PlanError
from moe2gguf.experts import methods

F = TypeVar("F", bound=Callable[..., Any])

SETTINGS = cloup.Context.settings(
    help_option_names=["-h", "--help"],
    max_content_width=100,
    align_option_groups=False,
    formatter_settings=cloup.HelpFormatter.settings(
        theme=HelpTheme(heading=Style(bold=True), invoked_command=Style(fg="bright_cyan")), col1_max_width=34
    ),
)

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class AlwaysOn(click.ParamType):  # type: ignore[type-arg]
    """A number of experts, or "auto" (-1)."""

    name = "number or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; -1 for auto."""
        if value == "auto":
            return -1
        try:
            return max(int(value), 0)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor auto", param, ctx)


json_option = option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
threads_option = option(
    "--threads", type=click.IntRange(1), help="Threads to use.  [default: the number of cores, at most 4]"
)


def whole_numbers(_context: click.Context, _parameter: click.Parameter, text: str | None) -> list[int]:
    """Parse `8,6,4`."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of whole numbers such as 8,6,4") from error


type_options = option_group(
    "Types of single tensors",
    option(
        "--tensor-type",
        "tensor_types",
        multiple=True,
        metavar="PATTERN=TYPE",
        help="Another type for tensors whose whole name matches this regular expression; the first match decides.",
    ),
    option("--recipe-file", type=FILE, help="A TOML or JSON file of such rules, tried after them."),
    option("--pure", is_flag=True, help="The type for every matrix, those of the vocabulary included."),
    option("--allow-fallback", is_flag=True, help="Where a type does not fit, take llama.cpp's substitute, listed."),
    option("--llama-cpp-mix", is_flag=True, help="Choose for experts as llama.cpp does, not as for the dense parent."),
)


llama_threads_option = option("--threads", type=click.IntRange(1), help="Threads to use.  [default: all]")
used_list_option = option(
    "-k", "--used", callback=whole_numbers, metavar="K,K", help="Experts per token.  [default: what the file says]"
)
devices_option = option(
    "--device", default="cpu", show_default=True, metavar="D,D", help="Of cpu, gpu and gpu:experts-on-cpu."
)


@cloup.group(context_settings=SETTINGS)
@click.version_option(package_name="moe2gguf")
def cli() -> None:
    """Turn a dense LLaMA-family model into a sparse one that stock llama.cpp runs.

    Every MLP is cut into experts and written as a Mixtral-architecture GGUF file. With all experts on, the file is
    the dense model.

    \b
    Example:
      moe2gguf convert SmolLM2-135M-Instruct smollm2-moe.gguf --experts 8
      moe2gguf run smollm2-moe.gguf -p "The capital of France is"
    """


@cli.command()
@cloup.argument("model", type=click.Path(path_type=Path), help="Hugging Face folder (config.json, safetensors).")
@cloup.argument("out", type=click.Path(path_type=Path), required=False, help="The GGUF file to write.")
@option_group(
    "Slicing",
    option("-n", "--experts", type=int, help="Experts per MLP; a Mixtral model keeps its own.  [default: 8]"),
    option("-k", "--used", type=int, help="Experts that run per token.  [default: all, the exact dense model]"),
    option("--align", type=int, default=1, help="Pad experts with zero neurons to a multiple of 32 or 256."),
    option("--dense", is_flag=True, help="Do not slice: write the ordinary dense file, the reference."),
)
@option_group(
    "Experts that hold together when only some run (defaults: seed if all run, coherent below)",
    option("--recipe", type=click.Choice(["seed", "coherent"]), help="Where the options below start from."),
    option("--group", type=click.Choice([*methods.GROUPS]), help="How neurons are grouped."),
    option("--always-on", type=AlwaysOn(), metavar="N|auto", help="Experts that every token runs."),
    option("--router", type=click.Choice([*methods.ROUTERS]), help="How experts are chosen."),
    option("--refit/--no-refit", default=None, help="Correct the down projections for what does not run."),
    option("--amplify", type=click.Choice([*methods.AMPLIFICATIONS]), help="Which counts sound right."),
    option("--calibration", type=FILE, help="Text, or JSONL with a text field.  [default: Python's documentation]"),
    option("--calibration-tokens", type=int, default=16384, show_default=True, help="How much of it."),
    option("--device", help="torch device of the calibration.  [default: cuda, mps or cpu]"),
    option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of the grouping."),
)
@option_group(
    "Output",
    option(
        "-t",
        "--type",
        default="auto",
        show_default=True,
        help="auto (as stored), f32, f16, bf16, or a type of llama.cpp such as q8_0, q6_k, q4_k_m or iq4_xs.",
    ),
    option("--name", help="The model's name in the metadata."),
    option("-f", "--force", is_flag=True, help="Replace OUT if it exists."),
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
    json_option,
)
def convert(
    model: Path,
    out: Path | None,
    plan_only: bool,
    check: str | None,
    as_json: bool,
    force: bool,
    threads: int | None,
    **options: Any,
) -> None:
    """Convert a Hugging Face folder into a GGUF file with experts.

    LLaMA, SmolLM2, TinyLlama, Mistral, Qwen2 and Mixtral checkpoints in f32, f16 or bf16. The file appears under
    its name only when it is complete and verified.

    \b
    Example:
      moe2gguf convert SmolLM2-135M-Instruct moe.gguf --experts 8 --check auto
      moe2gguf convert SmolLM2-135M-Instruct --plan
      moe2gguf convert SmolLM2-135M-Instruct moe-q8.gguf -n 16 --align 32 --type q8_0
      moe2gguf convert SmolLM2-135M-Instruct half.gguf -n 16 --used 8 --calibration text.txt
    """
    from moe2gguf.convert import check_conversion, write_plan
    from moe2gguf.options import Options
    from moe2gguf.planning import plan_conversion

    if out is None and not plan_only:
        raise click.UsageError("Missing argument 'OUT' (only --plan works without).")
    try:
        plan = plan_conversion(model, Options(**options))
    except PlanError as error:
        if as_json and plan_only:
            emit({"refusals": error.refusals}, as_json, lambda: None)
        raise
    display.warnings(plan.warnings)
    if plan_only or out is None:
        emit(plan.to_dict(), as_json, lambda: display.plan(plan))
        return
    done = write_plan(plan, out, force=force, threads=threads, progress=display.progress)
    checked = check_conversion(done, check, threads=threads, progress=display.progress) if check else None
    result = {**done.to_dict(), "check": checked.to_dict() if checked else None}
    emit(result, as_json, lambda: display.conversion(done, checked))
    if checked and not checked.ok:
        raise SystemExit(1)


@cli.command()
@cloup.argument("source", type=FILE, help="The GGUF file to quantize (f32, f16 or bf16).")
@cloup.argument("out", type=click.Path(path_type=Path), help="The GGUF file to write.")
@cloup.argument("type", help="A type of llama.cpp, such as q4_k_m, iq4_xs or q8_0; auto keeps what no rule names.")
@type_options
@option_group(
    "Output",
    option("--allow-requantize", is_flag=True, help="Also change tensors that are quantized already."),
    option("-f", "--force", is_flag=True, help="Replace OUT if it exists."),
    option("--threads", type=click.IntRange(1), help="Threads that quantize.  [default: one per core]"),
)
@option_group(
    "Looking first",
    option("--plan", "plan_only", is_flag=True, help="Print what would be written and stop."),
    json_option,
)
def quantize(
    source: Path,
    out: Path,
    plan_only: bool,
    as_json: bool,
    allow_requantize: bool,
    force: bool,
    threads: int | None,
    **options: Any,
) -> None:
    """Write a GGUF file again with smaller types.

    With llama.cpp's own kernels, and the choice of types of its quantizer for the dense model. A type that does not
    fit a tensor is an error that lists the ways out, never a silent substitute.

    \b
    Example:
      moe2gguf quantize moe.gguf moe-q4.gguf q4_k_m --allow-fallback
      moe2gguf quantize moe.gguf moe-q5.gguf q5_k --tensor-type 'blk\\..*\\.ffn_down_exps\\.weight=q6_k' --plan
    """
    from moe2gguf.export.recipes import TypeOptions
    from moe2gguf.quantize import plan_quantization, write_quantization

    try:
        plan = plan_quantization(source, TypeOptions(**options), allow_requantize=allow_requantize)
    except PlanError as error:
        if as_json and plan_only:
            emit({"refusals": error.refusals}, as_json, lambda: None)
        raise
    display.warnings(plan.warnings)
    if plan_only:
        emit(plan.to_dict(), as_json, lambda: display.quantization_plan(plan))
        return
    done = write_quantization(plan, out, force=force, threads=threads, progress=display.progress)
    emit(done.to_dict(), as_json, lambda: display.quantization(done))


@cli.command()
@cloup.argument("file", type=FILE, help="The GGUF file to verify.")
@option("--check", "dense", type=FILE, metavar="DENSE", help="Also compare with this dense file in llama.cpp.")
@threads_option
@json_option
def verify(file: Path, dense: Path | None, threads: int | None, as_json: bool) -> None:
    """Re-read a GGUF file and check everything in it.

    The header, every tensor inside the file, shapes against the metadata, no NaN or infinity.

    \b
    Example:
      moe2gguf verify moe.gguf
      moe2gguf verify moe.gguf --check dense.gguf
    """
    from moe2gguf.export.verify import verify as verify_file
    from moe2gguf.harness.check import check

    with display.progress("verify", file.stat().st_size) as advance:
        found = verify_file(file, threads=threads, progress=advance)
    checked = check(file, dense, threads=threads) if dense and not found.problems else None
    result = {
        "path": str(file),
        "ok": not found.problems,
        "problems": list(found.problems),
        "notes": list(found.notes),
        "tensors": found.n_tensors,
        "bytes": found.n_bytes,
        "check": checked.to_dict() if checked else None,
    }
    emit(result, as_json, lambda: display.verification(found, checked))
    if found.problems or (checked and not checked.ok):
        raise SystemExit(1)


@cli.command()
@cloup.argument("file", type=FILE, help="The GGUF file to look into.")
@option("--tensors", is_flag=True, help="List every tensor.")
@json_option
def inspect(file: Path, tensors: bool, as_json: bool) -> None:
    """Show metadata, experts, types and sizes of a GGUF file.

    \b
    Example:
      moe2gguf inspect moe.gguf
      moe2gguf inspect moe.gguf --json | jq .experts
    """
    from moe2gguf.export.inspect import inspect as inspect_file
    from moe2gguf.export.inspect import print_inspection

    found = inspect_file(file)
    emit(found.to_dict(), as_json, lambda: print_inspection(found, display.out(), tensors=tensors))


@cli.command()
@cloup.argument("file", type=FILE, help="The GGUF file to run.")
@option("-p", "--prompt", required=True, help="The text to continue; no chat template is applied.")
@option("-k", "--used", type=int, help="Experts that run per token.  [default: what the file says]")
@option("-n", "--tokens", default=64, show_default=True, type=click.IntRange(1), help="Tokens to generate.")
@option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0 takes the likeliest token.")
@option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="For temperatures above 0.")
@option("--gpu", is_flag=True, help="Run all layers on the GPU.")
@threads_option
def run(
    file: Path,
    prompt: str,
    used: int | None,
    tokens: int,
    temperature: float,
    seed: int,
    gpu: bool,
    threads: int | None,
) -> None:
    """Generate text with llama.cpp and report the speed.

    \b
    Example:
      moe2gguf run moe.gguf -p "The capital of France is" -n 32
      moe2gguf run moe.gguf -p "Once upon a time" --used 4
    """
    from moe2gguf.harness.generate import generate

    pieces = generate(
        file, prompt, n_token=tokens, n_expert_used=used, gpu=gpu, temperature=temperature, seed=seed, threads=threads
    )
    display.stream(prompt, pieces)


@cli.command()
@cloup.argument("files", nargs=-1, required=True, type=FILE, metavar="FILES", help="The GGUF files to compare.")
@option_group(
    "What",
    option("--reference", required=True, type=FILE, metavar="DENSE", help="The dense file they are compared with."),
    used_list_option,
    devices_option,
)
@option_group(
    "Text",
    option("--text", type=FILE, help="A text file.  [default: Python's own documentation]"),
    option("--tokens", default=2048, show_default=True, type=click.IntRange(0), help="Tokens to score; 0 is all."),
    option("--context", default=512, show_default=True, type=click.IntRange(8), help="Tokens of a window."),
)
@option_group(
    "Running",
    llama_threads_option,
    option("--timeout", default=600.0, show_default=True, help="Seconds that a window may take."),
    option("--memory", type=click.IntRange(1), metavar="MIB", help="Private memory that a run may have (Linux)."),
    option("--room", type=click.IntRange(1), metavar="MIB", help="Disk for the reference's logits.  [default: 8192]"),
    option("--journal", type=click.Path(path_type=Path), help="Finished rows.  [default: in the cache folder]"),
    option("--fresh", is_flag=True, help="Measure again what the journal has."),
)
@option_group(
    "Results",
    json_option,
    option("--csv", "csv_file", type=click.Path(path_type=Path), help="Also write the rows to this file."),
    option("--speed", is_flag=True, help="Also time 256 and 64 tokens, 3 rounds; name a choice."),
    option("--report", type=click.Path(path_type=Path), help="Also write one HTML file with pictures."),
)
def compare(
    files: tuple[Path, ...],
    reference: Path,
    used: list[int],
    device: str,
    text: Path | None,
    tokens: int,
    as_json: bool,
    csv_file: Path | None,
    speed: bool,
    report: Path | None,
    **options: Any,
) -> None:
    """Measure what fewer experts or another type cost in quality.

    Every file at every K on every device runs in llama.cpp, in a process of its own, and is compared with the dense
    file token by token. The definitions are those of llama.cpp's perplexity tool. A sweep that was interrupted goes
    on where it stopped.

    \b
    Example:
      moe2gguf compare moe.gguf --reference dense.gguf --used 8,6,4,2
      moe2gguf compare moe-q8.gguf moe-q4.gguf --reference dense.gguf --text wiki.test.raw --tokens 0 --csv rows.csv
      moe2gguf compare moe.gguf --reference dense.gguf --used 8,4,2 --speed --report report.html
    """
    from moe2gguf import display_compare
    from moe2gguf.bench import Timing
    from moe2gguf.compare import compare as compare_files
    from moe2gguf.compare import settings_from
    from moe2gguf.harness.report import require_plotly, write_report

    if report:
        require_plotly(report)
    found = compare_files(
        files,
        reference,
        used=used,
        devices=device.split(","),
        settings=settings_from(text, tokens or None, **options),
        timing=Timing(n_prompt=256, n_generate=64, repeat=3, threads=options["threads"]) if speed else None,
        on_row=display_compare.row_done,
        on_run=display_compare.run_done,
    )
    if csv_file:
        display_compare.write_csv(found, csv_file)
    if report:
        write_report(found, report, sys.argv)
    emit(found.to_dict(), as_json, lambda: display_compare.comparison(found))
    if not found.ok:
        raise SystemExit(1)


@cli.command()
@cloup.argument("files", nargs=-1, required=True, type=FILE, metavar="FILES", help="The GGUF files to time.")
@option_group(
    "What",
    option("--reference", type=FILE, metavar="DENSE", help="A dense file that speeds are divided by."),
    used_list_option,
    devices_option,
)
@option_group(
    "Running",
    llama_threads_option,
    option("--prompt", "n_prompt", default=512, show_default=True, type=click.IntRange(1), help="Tokens of a prompt."),
    option("--generate", "n_generate", default=128, show_default=True, type=click.IntRange(1), help="Tokens after it."),
    option("--repeat", default=5, show_default=True, type=click.IntRange(1), help="Runs of each."),
    option("--timeout", default=1800.0, show_default=True, help="Seconds that a run may take."),
)
@json_option
def bench(
    files: tuple[Path, ...], reference: Path | None, used: list[int], device: str, as_json: bool, **options: Any
) -> None:
    """Measure how fast files run, and how fast memory would let them.

    Prompt and generation speed are those of llama-bench. Every file at every K runs once in each round, so that a
    busy machine slows all of them alike; shown are the median and the lowest and highest of all rounds.

    \b
    Example:
      moe2gguf bench moe.gguf --reference dense.gguf --used 8,4,2
      moe2gguf bench moe-q4.gguf moe-q8.gguf --prompt 64 --generate 32 --repeat 3 --json
    """
    from moe2gguf import display_compare
    from moe2gguf.bench import Timing
    from moe2gguf.bench import bench as bench_files

    found = bench_files(
        files,
        used=used,
        devices=device.split(","),
        reference=reference,
        timing=Timing(**options),
        on_run=display_compare.run_done,
    )
    emit(found.to_dict(), as_json, lambda: display_compare.speeds(found))
    if not found.ok:
        raise SystemExit(1)


@cli.command("set-used")
@cloup.argument("file", type=FILE, help="The GGUF file to change.")
@cloup.argument("count", type=int, help="Experts that run per token.")
def set_used(file: Path, count: int) -> None:
    """Change how many experts run per token, in place.

    Refused where the experts were amplified or refitted for one count (see convert --amplify).

    \b
    Example:
      moe2gguf set-used moe.gguf 6
    """
    from moe2gguf.export.edit import set_used as change

    change(file, count)
    display.out().print(f"{file}: {count} experts per token from now on", markup=False)


@cli.command()
@cloup.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), help="Your shell.")
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Example:
      moe2gguf completion bash >> ~/.bashrc
      moe2gguf completion fish > ~/.config/fish/completions/moe2gguf.fish
    """
    kind = get_completion_class(shell)
    if kind is not None:
        click.echo(kind(cli, {}, "moe2gguf", "_MOE2GGUF_COMPLETE").source())


def emit(result: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    """JSON on stdout, or the text that `show` prints."""
    if as_json:
        click.echo(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        show()


def main() -> NoReturn:
    """Entry point of the `moe2gguf` command: every expected error becomes one message and an exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that partial files are removed
    try:
        cli(standalone_mode=False, prog_name="moe2gguf")
    except click.exceptions.Abort:
        click.echo("moe2gguf: interrupted; nothing unfinished was kept", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Moe2GgufError as error:
        click.echo(f"moe2gguf: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    sys.exit(0)
