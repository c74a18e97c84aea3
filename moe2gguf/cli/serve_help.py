"""The command serve-help: what to type to serve a file with other programs."""

from dataclasses import asdict
from pathlib import Path

import click
import cloup
from cloup import option

from moe2gguf.cli import tables as display
from moe2gguf.cli.command import Command, NoEffect
from moe2gguf.cli.options import FILE, PAGE, emit, json_option, pages_force_option


@cloup.command("serve-help", cls=Command, no_effect=[NoEffect(("--force",), without=("--modelfile", "--presets"))])
@cloup.argument("file", type=FILE, help="The GGUF file to serve.")
@option("--modelfile", type=PAGE, metavar="FILE", help="Also write a Modelfile for Ollama.")
@option("--presets", type=PAGE, metavar="FILE.ini", help="Also write presets for llama-server, one for each count.")
@pages_force_option
@json_option
def serve_help(file: Path, modelfile: Path | None, presets: Path | None, as_json: bool) -> None:
    """Print what to type to serve a file with other programs.

    A file is an ordinary GGUF file: llama-server, Ollama, LM Studio and llama-cpp-python load it as it is. Every way
    says with which program it was tried.

    \b
    Example:
      moe2gguf serve-help moe.gguf
      moe2gguf serve-help moe.gguf --modelfile Modelfile
      moe2gguf serve-help moe.gguf --presets preset.ini
    """
    from moe2gguf.gguf.outputs import write_whole
    from moe2gguf.gguf.shards import read_model
    from moe2gguf.llama.serving import list_ways, make_modelfile, make_presets

    header = read_model(file)
    written = {}
    if modelfile:
        text, carried = make_modelfile(header)
        written[modelfile] = text
        if not carried:
            display.warnings(["the chat template is too special for a Modelfile: Ollama takes one that it knows"])
    if presets:
        written[presets] = make_presets(header)
    for path, text in written.items():
        with write_whole(path) as partial:
            partial.write_bytes(text.encode("utf-8", "surrogateescape"))  # a path may be no UTF-8
    ways = list_ways(header)

    def show() -> None:
        for way in ways:
            click.echo(f"{way.program} ({way.tried}):")
            click.echo("".join(f"  {line}\n" for line in way.commands))

    emit({"ways": [asdict(way) for way in ways]}, as_json, show)
