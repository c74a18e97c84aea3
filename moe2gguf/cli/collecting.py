"""Commands that prepare what others take: imatrix, sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import tables as display
from moe2gguf.cli.shared import FILE, emit, json_option, llama_threads_option


class UsedOrAll(click.ParamType):  # type: ignore[type-arg]
    """A number of experts, or "all"."""

    name = "number or all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """The number; "all" as it is."""
        if value == "all" or str(value).isdecimal():
            return value if value == "all" else int(value)
        return self.fail(f"{value!r} is neither a number nor all", param, ctx)


@cloup.command()
@cloup.argument("model", type=FILE, help="The GGUF file whose inputs are watched; f16 or better.")
@option_group(
    "What",
    option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The importance matrix to write."),
    option("--text", type=FILE, help="Text of the kind the model is meant for, or JSONL with a text field."),
    option("--tokens", "n_token", default=65536, show_default=True, type=click.IntRange(0), help="Of it; 0 is all."),
    option(
        "--context", "n_context", default=512, show_default=True, type=click.IntRange(8), help="Tokens of a window."
    ),
    option(
        "-k",
        "--used",
        "n_expert_used",
        type=UsedOrAll(),
        metavar="K|all",
        help="Experts per token.  [default: the file's]",
    ),
    option("--output-matrix", "vocabulary", is_flag=True, help="Also the output matrix, which llama.cpp leaves out."),
    option("--merge", "merged", multiple=True, type=FILE, help="Add this matrix of the same model; can be repeated."),
)
@option_group(
    "Output",
    option("--fresh", is_flag=True, help="Begin again instead of going on with OUT.work."),
    option("-f", "--force", is_flag=True, help="Replace OUT if it exists."),
    llama_threads_option,
    json_option,
)
def imatrix(model: Path, out: Path, text: Path | None, n_token: int, as_json: bool, **options: Any) -> None:
    """Collect what a text uses most: an importance matrix.

    Runs the text through llama.cpp, in a process of its own, per expert where the file has experts, and writes
    llama.cpp's GGUF format. What was stopped goes on where it was. Experts that few tokens reached are named.

    \b
    Example:
      moe2gguf imatrix dense.gguf -o dense-imatrix.gguf --text wiki.train.raw
      moe2gguf imatrix moe.gguf -o moe-imatrix.gguf --text chat.jsonl --used all --merge older.gguf
    """
    from moe2gguf.measure.imatrix import collect_imatrix

    done = collect_imatrix(model, out, text, n_token=n_token or None, progress=display.progress, **options)
    display.warnings([done.advice] if done.advice else [])
    emit(done.to_dict(), as_json, lambda: display.collection(done))


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
