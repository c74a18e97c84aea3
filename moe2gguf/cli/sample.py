"""The command sample: let a model write its calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import tables as display
from moe2gguf.cli.options import emit, json_option, llama_threads_option


@cloup.command()
@cloup.argument(
    "model",
    type=click.Path(exists=True, path_type=Path),
    help="The dense model that writes: a Hugging Face folder, or a GGUF file.",
)
@option_group(
    "What",
    option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The text file to write."),
    option("--tokens", "n_token", default=32768, show_default=True, type=click.IntRange(1), help="To draw in all."),
    option(
        "--context", "n_context", default=512, show_default=True, type=click.IntRange(8), help="Of a text, at most."
    ),
    option(
        "--temperature", default=1.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Of the draw."
    ),
    option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="Another one, other texts."),
)
@option_group(
    "Output",
    option("-f", "--force", is_flag=True, help="Replace OUT if it exists."),
    option("--gpu", is_flag=True, help="Run all layers on the GPU."),
    option("--parallel", "n_sequence", default=16, show_default=True, type=click.IntRange(1), help="Texts at a time."),
    llama_threads_option,
    json_option,
)
def sample(model: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Let a model write the text that calibrates it.

    For who has no text of the kind the model is for: texts that each start with a random token and go on with what
    the model itself would say. The text that convert takes by default may be of another kind.

    \b
    Example:
      moe2gguf sample SmolLM2-135M-Instruct -o own.txt
      moe2gguf convert SmolLM2-135M-Instruct half.gguf -n 16 --used 8 --calibration own.txt
    """
    from moe2gguf.llama.sampling import Draw
    from moe2gguf.measure.sample import sample_text

    rest = {name: options.pop(name) for name in ("gpu", "force", "threads")}
    done = sample_text(model, out, Draw(**options), progress=display.progress, **rest)
    emit(done.to_dict(), as_json, lambda: display.sampled(done))
