"""The command imatrix: collect an importance matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import tables as display
from moe2gguf.cli.options import FILE, emit, json_option, llama_threads_option, resume_option


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
    resume_option,
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
