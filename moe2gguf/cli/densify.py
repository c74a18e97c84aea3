"""The command densify: a model with experts becomes a dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import tables as display
from moe2gguf.cli import tables_convert
from moe2gguf.cli.options import (
    FILE,
    emit,
    json_option,
)


@cloup.command()
@cloup.argument("source", type=click.Path(exists=True, path_type=Path), help="A folder or a GGUF file with experts.")
@cloup.argument("out", type=click.Path(path_type=Path), help="The folder or GGUF file to write.")
@option_group(
    "Experts whose weights depend on the input (healed, --amplify any or fitted)",
    option("--text", type=FILE, help="Fit one factor per expert on this text, by least squares."),
    option("-k", "--used", type=click.IntRange(1), help="At this count.  [default: what the folder says]"),
    option("--tokens", "n_token", default=8192, show_default=True, type=click.IntRange(1024), help="Of the text."),
)
@option_group(
    "Output",
    option("-f", "--force", is_flag=True, help="Replace OUT if it exists."),
    json_option,
)
def densify(source: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Write a model with experts as a dense one.

    Slices fold back exactly; where the routers weigh experts by the input, one factor per expert is fitted.

    \b
    Example:
      moe2gguf densify half dense-again
      moe2gguf densify healed dense-healed --text text.txt --used 8
      moe2gguf densify moe.gguf dense.gguf
    """
    from moe2gguf.recipes.densify import densify as fold

    done = fold(source, out, progress=display.progress, **options)
    emit(done.to_dict(), as_json, lambda: tables_convert.densified(done))
