"""The command views: one set of weights under several names, one for each number of used experts."""

from __future__ import annotations

from pathlib import Path

import cloup

from moe2gguf.cli import tables as display
from moe2gguf.cli.command import Command, ContinuedOutput
from moe2gguf.cli.options import FILE, emit, force_option, json_option, used_list_option


@cloup.command(cls=Command)
@cloup.argument("file", type=FILE, help="A GGUF file with experts.")
@cloup.argument("folder", type=ContinuedOutput(path_type=Path), help="The folder for the views.")
@used_list_option
@force_option
@json_option
def views(file: Path, folder: Path, used: list[int], force: bool, as_json: bool) -> None:
    """Offer one file as several models, one for each number in --used.

    Each view is a folder with a small file that has its own count, and a second one with the weights, which exists once
    on disk. llama-server and LM Studio offer every view as a model of its own, and a view can draft for another one.
    Ollama reads no model in two files.

    \b
    Example:
      moe2gguf views moe.gguf models --used 16,12,8
      llama-server --models-dir models
    """
    from moe2gguf.recipes.views import write_views

    done = write_views(file, folder, used, force=force, progress=display.progress)
    if not done.linked:
        display.warnings([f"{folder}: links are not possible here, so every view has a copy of the weights"])
    emit(done.to_dict(), as_json, lambda: display.out().print("\n".join(map(str, done.paths.values())), markup=False))
