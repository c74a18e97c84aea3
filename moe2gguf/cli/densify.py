"""The command densify: a model with experts becomes a dense one."""

from __future__ import annotations

from pathlib import Path

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import tables as display
from moe2gguf.cli import tables_convert
from moe2gguf.cli.options import emit, json_option


@cloup.command()
@cloup.argument("source", type=click.Path(exists=True, path_type=Path), help="A folder or a GGUF file with experts.")
@cloup.argument("out", type=click.Path(path_type=Path), help="The folder or GGUF file to write.")
@option_group(
    "Output",
    option("-f", "--force", is_flag=True, help="Replace OUT if it exists."),
    json_option,
)
def densify(source: Path, out: Path, force: bool, as_json: bool) -> None:
    """Write a model with experts as a dense one.

    All experts become one MLP, and the model computes what the experts compute together: of a sliced model, the dense
    model it was made from. Refused where the weights of the experts depend on the input: healed, or sliced with
    --amplify any or fitted.

    \b
    Example:
      moe2gguf densify half dense-again
      moe2gguf densify moe.gguf dense.gguf
    """
    from moe2gguf.recipes.densify import densify as write_dense

    done = write_dense(source, out, force=force, progress=display.progress)
    emit(done.to_dict(), as_json, lambda: tables_convert.densified(done))
