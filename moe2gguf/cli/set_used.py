"""The command set-used: change how many experts a file uses per token."""

from pathlib import Path

import cloup

from moe2gguf.cli import tables as display
from moe2gguf.cli.command import ChangedInput, Command


@cloup.command("set-used", cls=Command)
@cloup.argument("file", type=ChangedInput(exists=True, dir_okay=False, path_type=Path), help="The GGUF file to change.")
@cloup.argument("count", type=int, help="Experts used per token.")
def set_used(file: Path, count: int) -> None:
    """Change how many experts a file uses per token.

    The file is changed in place. Files whose experts were scaled or refitted for one count are refused; see the
    option --amplify of convert.

    \b
    Example:
      moe2gguf set-used moe.gguf 6
    """
    from moe2gguf.gguf.set_used import set_used as change

    note = change(file, count)
    display.out().print(f"{file}: now uses {count} experts per token", markup=False)
    display.warnings([note] if note else [])
