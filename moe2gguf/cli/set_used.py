"""The command set-used: change how many experts a file uses per token."""

from __future__ import annotations

from pathlib import Path

import cloup

from moe2gguf.cli import tables as display
from moe2gguf.cli.options import (
    FILE,
)


@cloup.command("set-used")
@cloup.argument("file", type=FILE, help="The GGUF file to change.")
@cloup.argument("count", type=int, help="Experts that run per token.")
def set_used(file: Path, count: int) -> None:
    """Change how many experts run per token, in place.

    Refused where the experts were amplified or refitted for one count (see convert --amplify).

    \b
    Example:
      moe2gguf set-used moe.gguf 6
    """
    from moe2gguf.gguf.set_used import set_used as change

    change(file, count)
    display.out().print(f"{file}: {count} experts per token from now on", markup=False)
