"""The command line: parse, call one library function, print.

Results go to stdout (`--json` for machines), progress and notes to stderr. Exit codes: 0 done, 1 a Moe2GgufError,
2 wrong usage, 130 interrupted, 143 terminated.
"""

import gc
import os
import signal
import sys
from typing import NoReturn

import click
import cloup
from click.shell_completion import get_completion_class
from cloup import HelpTheme, Style

from moe2gguf.cli.bench import bench
from moe2gguf.cli.chat import chat
from moe2gguf.cli.command import Program
from moe2gguf.cli.compare import compare
from moe2gguf.cli.convert import convert
from moe2gguf.cli.densify import densify
from moe2gguf.cli.expert_usage import expert_usage
from moe2gguf.cli.heal import heal
from moe2gguf.cli.imatrix import imatrix
from moe2gguf.cli.inspect import inspect
from moe2gguf.cli.merge import merge
from moe2gguf.cli.prune import prune
from moe2gguf.cli.publish import publish
from moe2gguf.cli.quantize import quantize
from moe2gguf.cli.run import run
from moe2gguf.cli.serve_help import serve_help
from moe2gguf.cli.set_used import set_used
from moe2gguf.cli.shrink import shrink
from moe2gguf.cli.streams import ReaderGoneError, prepare_streams
from moe2gguf.cli.tables import shorten, start_clock
from moe2gguf.cli.verify import verify
from moe2gguf.cli.views import views
from moe2gguf.errors import Moe2GgufError
from moe2gguf.gguf.resume import Interrupted

SETTINGS = cloup.Context.settings(
    help_option_names=["-h", "--help"],
    max_content_width=100,
    align_option_groups=False,
    formatter_settings=cloup.HelpFormatter.settings(
        theme=HelpTheme(heading=Style(bold=True), invoked_command=Style(fg="bright_cyan")), col1_max_width=34
    ),
)


@cloup.group(cls=Program, context_settings=SETTINGS)
@click.version_option(package_name="moe2gguf")
def cli() -> None:
    """Turn a dense LLaMA-family model into a sparse one that stock llama.cpp runs.

    Every MLP is cut into experts and written as a Mixtral-architecture GGUF file. With all experts on, the file is
    the dense model.

    \b
    Example:
      moe2gguf convert SmolLM2-135M-Instruct smollm2-moe.gguf --experts 8
      moe2gguf chat smollm2-moe.gguf
    """


@cloup.command(short_help="Print the completion script of a shell.")
@cloup.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), help="Your shell.")
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Example:
      moe2gguf completion bash >> ~/.bashrc
      moe2gguf completion fish > ~/.config/fish/completions/moe2gguf.fish
    """
    kind = get_completion_class(shell)
    if kind is not None:
        click.echo(kind(cli, {}, "moe2gguf", "_MOE2GGUF_COMPLETE").source())


cli.section("Making", shrink, convert, quantize, prune, merge, densify, heal, set_used, views)
cli.section("Running", run, chat, serve_help)
cli.section("Looking", inspect, verify, expert_usage)
cli.section("Measuring", compare, bench)
cli.section("Preparing", imatrix)
cli.section("Sharing", publish)
cli.section("Your shell", completion)


class Terminated(KeyboardInterrupt):
    """A polite kill: handled as Ctrl-C is, with an exit code of its own."""


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def main() -> NoReturn:
    """Entry point of the `moe2gguf` command."""
    gc.set_threshold(100_000)  # a vocabulary is a million small objects without a cycle
    signal.signal(signal.SIGTERM, _terminate)
    prepare_streams()
    sys.exit(run_program(sys.argv[1:]))


def run_program(arguments: list[str]) -> int:
    """Run a command line: every expected error becomes one message on stderr; the exit code is returned."""
    start_clock()
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"  # https://no-color.org
    try:
        cli(arguments, standalone_mode=False, prog_name="moe2gguf", color=False if plain else None)
        sys.stdout.flush()
    except click.exceptions.Abort as abort:
        return _tell_interrupt(abort.__cause__)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Moe2GgufError as error:
        notes = _list_notes(error)
        if notes or not isinstance(error, ReaderGoneError):
            said = shorten(str(error), whole="--verbose" in arguments)
            click.echo(("\n" if "\n" in said else "; ").join([f"moe2gguf: {said}", *notes]), err=True)
        return error.exit_code
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def _tell_interrupt(cause: BaseException | None) -> int:
    """Say what an interrupt left; the exit code is returned. An end of input, which click takes for one, is raised."""
    if isinstance(cause, EOFError):
        raise cause
    kept = [str(cause)] if isinstance(cause, Interrupted) else []
    click.echo("; ".join(["moe2gguf: interrupted", *kept, *_list_notes(cause)]), err=True)
    terminated = isinstance(cause.__cause__ if isinstance(cause, Interrupted) else cause, Terminated)
    return 143 if terminated else 130


def _list_notes(error: BaseException | None) -> list[str]:
    """What `moe2gguf.cli.command` adds to an error: the files that are written all the same, or that there are none."""
    return getattr(error, "__notes__", [])
