"""The command run: generate text."""

from __future__ import annotations

from pathlib import Path

import click
import cloup
from cloup import option

from moe2gguf.cli import tables as display
from moe2gguf.cli.options import FILE, threads_option


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
