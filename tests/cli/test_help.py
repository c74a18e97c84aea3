"""The help: how many options it shows, the page with all of them, and hints for the spellings of other programs."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from moe2gguf.cli import cli, run_program
from moe2gguf.cli.command import OTHER_COMMANDS

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


@pytest.mark.parametrize("command", sorted({*cli.commands} - {"completion", "densify"}))
def test_the_second_page_shows_every_option(command: str) -> None:
    """--help-all has them all, --help afterwards no more than before. That of densify names another command's."""
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


@pytest.mark.parametrize(
    ("name", "hint"),
    [("help", "COMMAND --help explains one"), ("version", "it is --version here"), ("info", "inspect shows a file")],
)
def test_commands_of_other_programs_get_a_hint(name: str, hint: str) -> None:
    """Exit code 2, and no guess at a name that is spelled alike."""
    done = CliRunner().invoke(cli, [name, "x"])

    assert 2 == done.exit_code
    assert f"No such command: {name}; " in done.output
    assert hint in done.output
    assert "Did you mean" not in done.output


def test_hints_are_about_commands_that_there_are() -> None:
    """Each begins with one or is about the options of all; none of the names is a command of ours."""
    assert OTHER_COMMANDS.keys().isdisjoint(cli.commands)
    begins = {hint.split()[0] for hint in OTHER_COMMANDS.values()}
    assert begins - {*cli.commands} == {"--help", "it", "a"}


@pytest.mark.parametrize("width", [40, 60])
def test_the_list_of_commands_is_whole_in_a_narrow_terminal(width: int) -> None:
    """A summary takes a second line rather than end in dots."""
    done = CliRunner().invoke(cli, ["--help"], terminal_width=width)

    words = "".join(done.output.split())
    assert "..." not in done.output.replace("[ARGS]...", "")
    for command in cli.commands.values():
        assert "".join(str(command.help).partition(".")[0].split()) in words


@pytest.mark.parametrize(
    ("variables", "colors"),
    [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"TERM": "xterm", "NO_COLOR": "1"}, False)],
)
def test_a_terminal_gets_color_unless_it_wants_none(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], colors: bool
) -> None:
    """By the convention of no-color.org, and for terminals that would show the codes as text."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)

    with contextlib.redirect_stdout(terminal):
        assert 0 == run_program(["convert", "--help"])

    assert ("\x1b" in terminal.getvalue()) == colors


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


FOLDER = str(Path(__file__).parent)
HEAL = ["heal", FOLDER, "o", "--teacher", FOLDER, "--text", __file__, "--used-range", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["convert", "m", "o", "--dense", "--experts", "8"],
            "--experts: no effect with --dense; leave one",
        ),
        (["convert", "m", "o", "--dense", "-k", "4", "--no-refit"], "--used, --refit: no effect with --dense"),
        (["convert", "m", "o", "--load-calibration", __file__, "--torch-device", "cpu"], "no effect with --load-calib"),
        (
            ["convert", "m", "o", "--format", "hf", "--plan", "--check", "auto"],
            "--plan, --check: no effect with --format hf",
        ),
        (["convert", "m", "o", "--format", "hf", "--target-bpw", "4", "-t", "1"], "--threads, --target-bpw: no effect"),
        (["convert", "m", "o", "--llama-cpp-mix", "--dense"], "--llama-cpp-mix: no effect with --dense"),
        (["run", __file__, "x", "--seed", "3", "--temperature", "0.0"], "--seed: no effect with --temperature 0"),
        (
            ["prune", __file__, "o", "--keep", "2", "--score", "random", "--text", __file__],
            "--text: no effect with --sc",
        ),
        (["inspect", __file__, "--tensors", "--json"], "--tensors: no effect with --json"),
        ([*HEAL, "--steps", "0", "--lr", "1"], "--lr: no effect with --steps 0"),
        ([*HEAL, "--layerwise", "0", "--layer-lr", "1"], "--layer-lr: no effect with --layerwise 0"),
    ],
)
def test_options_that_exclude_each_other_are_an_error(arguments: list[str], message: str) -> None:
    """Exit code 2 before anything is read."""
    done = CliRunner().invoke(cli, arguments)

    assert 2 == done.exit_code
    assert message in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", __file__, "-p", "x", "--seed", "3"], "--seed: no effect without --temperature"),
        (
            ["merge", __file__, __file__, "o", "--router", "random", "--tokens", "9"],
            "--tokens: no effect with --router random and without --prompts",
        ),
        (["quantize", __file__, "o", "q8_0", "--imatrix-repair", "ones"], "no effect without --imatrix"),
        (["imatrix", __file__, "o", "--merge", __file__, "--tokens", "5"], "--tokens: no effect without --text"),
        (["prune", __file__, "o", "--keep", "2", "--seed", "1"], "--seed: no effect without --score random"),
        (
            ["merge", __file__, __file__, "o", "--prompts", __file__, "--seed", "1"],
            "--seed: no effect with --prompts and without --router random",
        ),
        (["convert", "m", "o", "--pure"], "--pure: no effect without --type"),
        (["serve-help", __file__, "-f"], "--force: no effect without --modelfile or --presets"),
        (
            [*HEAL, "--train", "lora", "--router-lr", "1"],
            "--router-lr: no effect with --train and without --train router",
        ),
        ([*HEAL, "--train", "router", "--lora-rank", "1"], "--lora-rank: no effect without --train lora"),
    ],
)
def test_options_that_need_another_are_a_warning(arguments: list[str], message: str) -> None:
    """Said before the work."""
    done = CliRunner().invoke(cli, arguments)

    assert message in done.stderr


def test_numbers_are_finite() -> None:
    """No option of any command takes a number that is none, or has no end."""
    options = [option for command in cli.commands.values() for option in command.params]
    numbers = [option for option in options if isinstance(option.type, click.types.FloatParamType)]

    assert {"temperature", "timeout", "limit", "lr", "faster"} <= {option.name for option in numbers}
    for option in numbers:
        for value in ("nan", "inf"):
            with pytest.raises(click.BadParameter, match=r"finite number|not in the range"):
                option.type.convert(value, None, None)


def test_the_tables_of_options_without_effect_name_options_of_their_command() -> None:
    """No row of a table is dead."""
    for command in cli.commands.values():
        for row in getattr(command, "_no_effect", ()):
            ours = {name for option in command.params for name in option.opts}
            for option in command.params:
                if isinstance(option.type, click.Choice):
                    ours |= {f"{name} {choice}" for name in option.opts for choice in option.type.choices}
                elif isinstance(option.default, int | float):
                    ours |= {f"{name} 0" for name in option.opts}
            assert ours.issuperset([*row.options, *row.beside, *row.without])
