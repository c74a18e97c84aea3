"""The command imatrix: collect an importance matrix."""

from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import options as opt
from moe2gguf.cli import tables as display
from moe2gguf.cli.command import Command, NoEffect


class UsedOrAll(click.ParamType):  # type: ignore[type-arg]
    """A number of experts, or "all"."""

    name = "number or all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """The number; "all" as it is."""
        if value == "all" or str(value).isdecimal():
            return value if value == "all" else int(value)
        return self.fail(f"{value!r} is neither a number nor all", param, ctx)


@cloup.command(
    cls=Command,
    no_effect=[
        NoEffect(
            ("--tokens", "--context", "--used", "--output-matrix", "--threads", "--no-resume"), without=("--text",)
        )
    ],
)
@cloup.argument("model", type=opt.FILE, help="The GGUF file to collect from, best in f16, bf16 or f32.")
@cloup.argument("out", type=opt.OUT, help="The importance matrix to write.")
@option_group(
    "What to collect",
    option("--text", type=opt.FILE, help="Text of the kind the model is meant for, or JSONL with a text field."),
    opt.number("--tokens", "n_token", default=65536, type=opt.NONE, help="Tokens; 0 means all."),
    opt.context_option,
    option(
        "-k",
        "--used",
        "n_expert_used",
        type=UsedOrAll(),
        metavar="K|all",
        help="Experts used per token.  [default: as in the file]",
    ),
    option("--output-matrix", "vocabulary", is_flag=True, help="Include output.weight, which llama.cpp leaves out."),
    option(
        "--merge", "merged", multiple=True, type=opt.FILE, help="Add this matrix of the same model; may be repeated."
    ),
)
@option_group("Output", opt.force_option, opt.resume_option, opt.threads_option, opt.json_option)
def imatrix(model: Path, out: Path, text: Path | None, n_token: int, as_json: bool, **options: Any) -> None:
    """Collect an importance matrix from a text.

    Runs the text through llama.cpp and writes llama.cpp's GGUF format, with one row per expert where the file has
    experts. Experts that few tokens reached are listed.

    \b
    Example:
      moe2gguf imatrix dense.gguf dense-imatrix.gguf --text wiki.train.raw
      moe2gguf imatrix moe.gguf moe-imatrix.gguf --text chat.jsonl --used all --merge older.gguf
    """
    from moe2gguf.measure.imatrix import collect_imatrix

    done = collect_imatrix(model, out, text, n_token=n_token or None, progress=display.progress, **options)
    display.warnings([*done.notes, *([done.advice] if done.advice else [])])
    opt.emit(done.to_dict(), as_json, lambda: display.print_collection(done))
    display.next_steps(["moe2gguf", "quantize", model, "OUT.gguf", "q4_k_m", "--imatrix", out])
