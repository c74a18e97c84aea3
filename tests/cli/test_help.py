"""The help: how many options it shows, the options for experts, and hints for the spellings of other programs."""

from __future__ import annotations

import re

import click
import pytest
from click.testing import CliRunner

from moe2gguf.cli import cli

MOST = {"convert": 25, "heal": 22}
OTHERS = 25


def shown(command: str, page: str = "--help") -> set[str]:
    """The options that a page of help lists, by their long names."""
    done = CliRunner().invoke(cli, [command, page])
    assert 0 == done.exit_code
    return set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", done.output, re.MULTILINE))


@pytest.mark.parametrize("command", cli.commands)
def test_no_more_options_are_shown_than_a_person_reads(command: str) -> None:
    """At most 25, and 22 of heal."""
    assert len(shown(command)) <= MOST.get(command, OTHERS)


@pytest.mark.parametrize("command", ["convert", "quantize", "heal"])
def test_the_second_page_shows_every_option(command: str) -> None:
    """--help-all has them all, --help afterwards no more than before."""
    before, everything = shown(command), shown(command, "--help-all")
    options = {
        max(option.opts, key=len)
        for option in cli.commands[command].params
        if isinstance(option, click.Option) and option.opts != ["--refit"]
    }

    assert options | {"--help"} == everything - {"--refit"}
    assert before < everything
    assert before == shown(command)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["convert", "m", "out.gguf", "--outtype", "q8_0"], "No such option: --outtype. It is --type here."),
        (["convert", "m", "--outfile", "out.gguf"], "The output is an argument here: moe2gguf convert MODEL OUT"),
        (["convert", "m", "--outfile=out.gguf"], "The output is an argument here: moe2gguf convert MODEL OUT"),
        (["run", "m.gguf", "-p", "x", "-ngl", "99"], "It is --device gpu here."),
        (["run", "m.gguf", "-p", "x", "--n-gpu-layers", "99"], "It is --device gpu here."),
        (["run", "-m", "m.gguf", "-p", "x"], "The model is the first argument here: moe2gguf run FILE"),
        (["compare", "m.gguf", "-c", "512"], "It is --context here."),
        (["run", "m.gguf", "-p", "x", "-c", "512"], "run has no option for it."),
        (["imatrix", "m.gguf", "-o", "out"], "The output is an argument here: moe2gguf imatrix MODEL OUT"),
        (["inspect", "m.gguf", "-o", "out"], "This command writes no file."),
    ],
)
def test_spellings_of_other_programs_get_a_hint(arguments: list[str], hint: str) -> None:
    """llama.cpp's and Hugging Face's options: exit code 2 and the name of ours."""
    done = CliRunner().invoke(cli, arguments)

    assert 2 == done.exit_code
    assert hint in done.output


def test_a_letter_means_one_thing() -> None:
    """-n, -k, -t, -p and -e are the same option in every command."""
    meanings: dict[str, set[str]] = {}
    for command in cli.commands.values():
        for option in command.params:
            if isinstance(option, click.Option):
                for letter in (name for name in option.opts if len(name) == 2):
                    meanings.setdefault(letter, set()).add(max(option.opts, key=len))

    assert {"-e": {"--experts"}, "-n": {"--tokens"}, "-t": {"--threads"}}.items() <= meanings.items()
    assert all(len(names) == 1 for names in meanings.values()), meanings
