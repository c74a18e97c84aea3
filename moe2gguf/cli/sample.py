"""The command sample: let a model write its calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import tables as display
from moe2gguf.cli.command import Command
from moe2gguf.cli.options import (
    MODEL,
    ONE,
    OUT,
    device_option,
    emit,
    force_option,
    json_option,
    number,
    seed_option,
    threads_option,
)


@cloup.command(cls=Command)
@cloup.argument("model", type=MODEL, help="The dense model that writes: a Hugging Face folder or a GGUF file.")
@cloup.argument("out", type=OUT, help="The text file to write.")
@option_group(
    "What to write",
    number("--tokens", "n_token", default=32768, type=ONE, help="Tokens in all."),
    option(
        "--context",
        "n_context",
        default=512,
        show_default=True,
        type=click.IntRange(8),
        help="Most tokens of one text.",
    ),
    option(
        "--temperature",
        default=1.0,
        show_default=True,
        type=click.FloatRange(0, min_open=True),
        help="Sampling temperature.",
    ),
    seed_option,
)
@option_group(
    "Running",
    device_option,
    number("--parallel", "n_sequence", default=16, type=ONE, help="Texts at a time."),
    threads_option,
)
@option_group("Output", force_option, json_option)
def sample(model: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Generate a calibration text with the model itself.

    Use it if you have no text of the kind the model is meant for. Each text starts with a random token and continues
    with what the model predicts.

    \b
    Example:
      moe2gguf sample SmolLM2-135M-Instruct own.txt
      moe2gguf convert SmolLM2-135M-Instruct half.gguf --experts 16 --used 8 --calibration own.txt
    """
    from moe2gguf.llama.sampling import Draw
    from moe2gguf.measure.sample import sample_text

    rest = {name: options.pop(name) for name in ("device", "force", "threads")}
    done = sample_text(model, out, Draw(**options), progress=display.progress, **rest)
    emit(done.to_dict(), as_json, lambda: display.sampled(done))
    display.next_step(f"moe2gguf convert {model} OUT.gguf --experts 16 --used 8 --calibration {out}")
