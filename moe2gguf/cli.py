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

json_option = option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
threads_option = option(
    "--threads", type=click.IntRange(1), help="Threads to use.  [default: the number of cores, at most 4]"
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
    "Output",
    option(
        "-t",
        "--type",
        default="auto",
        show_default=True,
        help="Type of the weights: auto (as stored), f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, tq2_0, tq1_0.",
    ),
    option("--name", help="The model's name in the metadata."),
    option("-f", "--force", is_flag=True, help="Replace OUT if it exists."),
    threads_option,
)
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
    """
    from moe2gguf.convert import check_conversion, write_plan
    from moe2gguf.planning import Options, plan_conversion

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
