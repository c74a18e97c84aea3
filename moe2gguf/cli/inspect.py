"""The command inspect: show what a GGUF file holds."""

from pathlib import Path

import cloup
from cloup import option

from moe2gguf.cli import tables as display
from moe2gguf.cli.command import Command, NoEffect
from moe2gguf.cli.options import FILE, emit, json_option


@cloup.command(cls=Command, no_effect=[NoEffect(("--tensors",), beside=("--json",))])
@cloup.argument("file", type=FILE, help="The GGUF file to inspect.")
@option("--tensors", is_flag=True, help="List every tensor.")
@json_option
def inspect(file: Path, tensors: bool, as_json: bool) -> None:
    """Show the metadata, experts, types and sizes of a GGUF file.

    \b
    Example:
      moe2gguf inspect moe.gguf
      moe2gguf inspect moe.gguf --json | jq .experts
    """
    from moe2gguf.gguf.inspect import inspect as inspect_file
    from moe2gguf.gguf.inspect import print_inspection

    found = inspect_file(file)
    emit(found.to_dict(), as_json, lambda: print_inspection(found, display.out(), tensors=tensors))
