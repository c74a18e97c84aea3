"""Commands that look at one file: verify, inspect, run."""

from __future__ import annotations

from pathlib import Path

import click
import cloup
from cloup import option

from moe2gguf.cli import tables as display
from moe2gguf.cli.shared import FILE, emit, json_option, threads_option


@cloup.command()
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
    from moe2gguf.gguf.verify import verify as verify_file
    from moe2gguf.measure.check import check

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


@cloup.command()
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
    from moe2gguf.gguf.inspect import inspect as inspect_file
    from moe2gguf.gguf.inspect import print_inspection

    found = inspect_file(file)
    emit(found.to_dict(), as_json, lambda: print_inspection(found, display.out(), tensors=tensors))


@cloup.command()
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
    from moe2gguf.llama.generate import generate

    pieces = generate(
        file, prompt, n_token=tokens, n_expert_used=used, gpu=gpu, temperature=temperature, seed=seed, threads=threads
    )
    display.stream(prompt, pieces)
