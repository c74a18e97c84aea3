"""The command chat: talk with a model."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup
from cloup import option

from moe2gguf.cli import options as opt
from moe2gguf.cli import tables as display
from moe2gguf.cli.command import Command
from moe2gguf.cli.prompt import read_line
from moe2gguf.errors import HarnessError

if TYPE_CHECKING:
    from moe2gguf.llama.chat import Chat
    from moe2gguf.llama.generate import Generation

HELP = """\
/used N   use N experts per token from now on
/clear    forget what was said
/exit     end (also Ctrl-D)
Ctrl-C stops an answer."""


@cloup.command(cls=Command, no_effect=opt.SEED_NEEDS_TEMPERATURE)
@cloup.argument("file", type=opt.FILE, help="The GGUF file to talk with.")
@opt.used_option
@option("--system", default="", metavar="TEXT", help="What the model is told before the first message.")
@option("--raw", is_flag=True, help="Use no chat template: what you type continues the text.")
@opt.number("-n", "--tokens", "n_token", default=512, type=opt.ONE, help="Tokens of an answer, at most.")
@opt.number("--context", "n_context", default=4096, type=opt.Whole(8), help="Tokens of the conversation, at most.")
@opt.temperature_option
@opt.seed_option
@opt.device_option
@opt.threads_option
@option("--json", "as_json", is_flag=True, help="Print every answer as a line of JSON.")
def chat(file: Path, used: int | None, as_json: bool, **options: Any) -> None:
    """Talk with a model, with its chat template.

    In the conversation /used 8 changes the number of experts, /clear forgets what was said, and /exit ends it. Ctrl-C
    stops an answer. Where standard input is no terminal, every line of it is a message, and its answer is printed.

    \b
    Example:
      moe2gguf chat moe.gguf
      moe2gguf chat moe.gguf --used 8 --temperature 0.7
      echo "Why is the sky blue?" | moe2gguf chat moe.gguf
    """
    from moe2gguf.llama.chat import Chat

    with Chat(file, n_expert_used=used, **options) as talk:
        if sys.stdin.isatty():
            _talk_with_person(talk, as_json)
        else:
            _answer_lines(talk, as_json)


def _answer_lines(talk: Chat, as_json: bool) -> None:
    """Answer every line of standard input."""
    _warn(talk)
    for line in sys.stdin:
        text = line.strip()
        if text.startswith("/"):
            if not _obey(talk, text):
                return
        elif text:
            _print_answer(talk.say(text), as_json)


def _talk_with_person(talk: Chat, as_json: bool) -> None:
    """Ask for a line, answer it, and so on; an error does not end it."""
    display.err().print("/help lists what you can type besides", style="dim")
    _warn(talk)
    while (text := _ask()) is not None:
        try:
            if text.startswith("/"):
                if not _obey(talk, text):
                    return
            elif text:
                answer = talk.say(text)
                with _interruptible(answer):
                    _print_answer(answer, as_json)
                display.speed(answer)
        except HarnessError as error:
            display.err().print(str(error), markup=False)


def _ask() -> str | None:
    """The next line that a person types, None at the end."""
    try:
        return read_line("> ").strip()
    except EOFError:
        click.echo()
        return None
    except KeyboardInterrupt as interrupt:
        if type(interrupt) is not KeyboardInterrupt:  # a polite kill
            raise
        click.echo("\n/exit or Ctrl-D ends the conversation")
        return ""


def _obey(talk: Chat, text: str) -> bool:
    """Do what a line that begins with a slash asks for; return whether to go on. Raises HarnessError."""
    name, _, value = text[1:].partition(" ")
    if name in ("exit", "quit", "bye"):
        return False
    if name == "clear":
        talk.clear()
    elif name == "used" and value.strip().isdecimal():
        talk.use(int(value))
        display.err().print(f"{value.strip()} of {talk.n_expert} experts per token from now on", style="dim")
        _warn(talk)
    else:
        display.err().print(HELP, markup=False)
    return True


def _warn(talk: Chat) -> None:
    display.warnings([talk.note] if talk.note else [])


def _print_answer(answer: Generation, as_json: bool) -> None:
    """Print an answer as it comes, or as a line of JSON when it is there."""
    if as_json:
        said = "".join(answer)
        speed = answer.speed
        click.echo(json.dumps({"answer": said, "speed": speed and vars(speed)}))
    else:
        display.pieces(answer)
    display.warnings(answer.notes)
    answer.notes.clear()


@contextlib.contextmanager
def _interruptible(answer: Generation) -> Iterator[None]:
    """Let Ctrl-C stop the answer, and a second one the program."""

    def stop(*_: object) -> None:
        answer.stop()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
