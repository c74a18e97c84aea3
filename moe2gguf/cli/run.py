"""The command run: generate text."""

from __future__ import annotations

from pathlib import Path

import click
import cloup
from cloup import option

from moe2gguf.cli import tables as display
from moe2gguf.cli.command import Command, NoEffect
from moe2gguf.cli.options import FILE, ONE, device_option, number, seed_option, threads_option, used_option


@cloup.command(cls=Command, no_effect=[NoEffect(("--seed",), without=("--temperature",))])
@cloup.argument("file", type=FILE, help="The GGUF file to run.")
@option("-p", "--prompt", required=True, help="Text to continue; no chat template is applied.")
@used_option
@number("-n", "--tokens", default=64, type=ONE, help="Tokens to generate.")
@option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0 takes the likeliest token.")
@seed_option
@device_option
@threads_option
def run(
    file: Path,
    prompt: str,
    used: int | None,
    tokens: int,
    temperature: float,
    seed: int,
    device: str,
    threads: int | None,
) -> None:
    """Generate text with llama.cpp and print the speed.

    \b
    Example:
      moe2gguf run moe.gguf -p "The capital of France is" -n 32
      moe2gguf run moe.gguf -p "Once upon a time" --used 4
    """
    from moe2gguf.llama.generate import generate

    pieces = generate(
        file,
        prompt,
        n_token=tokens,
        n_expert_used=used,
        device=device,
        temperature=temperature,
        seed=seed,
        threads=threads,
    )
    display.stream(prompt, pieces)
