"""No output of a command replaces what the command reads, whatever the option and however the file is named."""

from __future__ import annotations

import os
from pathlib import Path

import checkpoints
import click
import pytest
from click.testing import CliRunner, Result
from command import moe2gguf

from moe2gguf.cli import cli
from moe2gguf.cli.command import ContinuedOutput, Input, Output
from moe2gguf.errors import OutputError

REQUIRED = {"--keep": "2", "--used-range": "2..4", "--prompt": "x", "type": "q8_0", "count": "2"}
"""What commands need besides files."""


def parameters(command: str, kind: type[click.Path]) -> list[click.Parameter]:
    """The parameters of a command that are paths of a kind."""
    return [one for one in cli.commands[command].params if isinstance(one.type, kind)]


def pairs() -> list[tuple[str, str, str]]:
    """Every (command, output, input)."""
    return [
        (command, str(output.name), str(read.name))
        for command in cli.commands
        for output in parameters(command, Output)
        for read in parameters(command, Input)
    ]


def arguments(command: str, values: dict[str, Path], folder: Path) -> list[str]:
    """A command line with these paths; whatever else is required is made up in `folder`."""
    words: list[str] = [command]
    for parameter in cli.commands[command].params:
        long = max(parameter.opts, key=len)
        value: object = values.get(str(parameter.name))
        if value is None and parameter.required:
            value = REQUIRED.get(long) or _made(folder / str(parameter.name), parameter)
        if value is not None:
            words += [str(value)] if isinstance(parameter, click.Argument) else [long, str(value)]
    can_force = any("--force" in one.opts for one in cli.commands[command].params)
    return [*words, *(["--force"] if can_force else [])]


def _made(path: Path, parameter: click.Parameter) -> Path:
    if isinstance(parameter.type, Input):
        _write(path, parameter)
    return path


def _write(path: Path, parameter: click.Parameter) -> Path:
    """An input: a file, or a folder where only a folder is taken, of which the file is returned."""
    if isinstance(parameter.type, Input) and not parameter.type.file_okay:
        path.mkdir(exist_ok=True)
        path /= "config.json"
    path.write_text("precious")
    return path


def linked(file: Path, how: str) -> Path:
    """The file by its name or by another one."""
    other = (file.parent if file.name == "input" else file.parent.parent) / "other"
    if how == "symbolic link":
        other.symlink_to(file)
    elif how == "hard link":
        os.link(file, other)
    return file if how == "name" else other


@pytest.mark.parametrize("how", ["name", "symbolic link", "hard link"])
@pytest.mark.parametrize(("command", "output", "read"), pairs())
def test_an_output_is_never_an_input(command: str, output: str, read: str, how: str, tmp_path: Path) -> None:
    """Refused with --force too, with the names, before anything is read; the input keeps its bytes."""
    parameter = next(one for one in cli.commands[command].params if one.name == read)
    file = _write(tmp_path / "input", parameter)
    target = linked(file, how)

    done = run(arguments(command, {read: tmp_path / "input", output: target}, tmp_path))

    assert 1 == done.exit_code
    assert f"would replace {file}, which is read" in str(done.exception)
    assert "precious" == file.read_text()


@pytest.mark.parametrize(("command", "output"), sorted({(command, output) for command, output, _ in pairs()}))
def test_an_existing_file_is_replaced_only_with_force(command: str, output: str, tmp_path: Path) -> None:
    """Every output, tables and pages too; a journal is continued instead."""
    parameter = next(one for one in cli.commands[command].params if one.name == output)
    words = arguments(command, {output: tmp_path / "old.svg"}, tmp_path)
    (tmp_path / "old.svg").write_text("old")

    done = run([word for word in words if word != "--force"])

    refused = "exists; choose another name, or replace it with --force" in str(done.exception)
    assert refused != isinstance(parameter.type, ContinuedOutput)
    assert "old" == (tmp_path / "old.svg").read_text()
    assert done.exit_code


@pytest.mark.parametrize("name", [".", "", "/", "x" * 250 + ".gguf", "x" * 300])
@pytest.mark.parametrize(("command", "output"), sorted({(command, output) for command, output, _ in pairs()}))
def test_a_name_that_no_file_can_have_is_refused(
    command: str, output: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder itself, where a file is wanted, and names that are too long, with `.partial` at the latest."""
    monkeypatch.chdir(tmp_path)
    done = run(arguments(command, {output: Path(name)}, tmp_path))

    assert done.exit_code
    said = str(done.exception) + done.output
    may_be_here = output == "folder" and name in (".", "")
    assert may_be_here != ("choose another name" in said or "is a directory" in said), said


@pytest.mark.parametrize("place", ["nowhere/x.svg", "input/x.svg"])
@pytest.mark.parametrize(("command", "output"), sorted({(command, output) for command, output, _ in pairs()}))
def test_a_missing_folder_is_named_before_anything_is_read(
    command: str, output: str, place: str, tmp_path: Path
) -> None:
    """No folder, or a file in its place; `views` makes its folder, and the journal is made with its own."""
    (tmp_path / "input").write_text("precious")

    done = run(arguments(command, {output: tmp_path / place}, tmp_path))

    assert done.exit_code
    made = output in ("folder", "journal")
    assert made or f"{(tmp_path / place).parent}: no such folder; create it first" == str(done.exception)
    no_place = output == "journal" and place.startswith("input")  # which is said when it is opened
    assert (made and not no_place) == (not isinstance(done.exception, OutputError))


def test_two_outputs_are_two_files(tmp_path: Path) -> None:
    """compare --csv x --report x."""
    same = tmp_path / "x.html"
    done = run(arguments("compare", {"csv_file": same, "report": same}, tmp_path))

    assert "are the same file" in str(done.exception)


def test_a_folder_that_holds_an_input_is_no_output(tmp_path: Path) -> None:
    """heal OUT cannot be the folder in which the text lies."""
    (tmp_path / "healed").mkdir()
    text = tmp_path / "healed" / "text.txt"
    text.write_text("precious")

    done = run(arguments("heal", {"files": text, "out": tmp_path / "healed"}, tmp_path))

    assert "which is read" in str(done.exception)
    assert "precious" == text.read_text()


def test_the_other_shards_of_a_set_are_inputs(tmp_path: Path) -> None:
    """A command that reads the first shard reads all."""
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_text("precious")
    first, second = sorted(tmp_path.iterdir())

    done = run(arguments("quantize", {"source": first, "out": second}, tmp_path))

    assert "which is read" in str(done.exception)
    assert "which is read" in str(
        run(arguments("quantize", {"source": first, "out": tmp_path / "m.gguf"}, tmp_path)).exception
    )


def run(words: list[str]) -> Result:
    """The command in this process."""
    return CliRunner().invoke(cli, words)


def test_a_link_to_itself_is_no_traceback(tmp_path: Path) -> None:
    """As a model, in a model's folder, and as the folder of an output: one message."""
    model = checkpoints.make(tmp_path / "m")
    for name in ("loop", "m/tokenizer.json"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(Path(name).name)

    for given in (
        (tmp_path / "loop", tmp_path / "x.gguf"),
        (model, tmp_path / "x.gguf"),
        (model, tmp_path / "loop" / "x"),
    ):
        done = moe2gguf("convert", *given)
        assert (1, True) == (done.returncode, done.stderr.startswith("moe2gguf: ")), done.stderr
    assert "is a link to tokenizer.json, where no file is" in moe2gguf("convert", model, tmp_path / "x.gguf").stderr
