"""Standard output that is full, closed or not UTF-8, and messages that are long."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import tiny_gguf
from command import moe2gguf
from gguf import GGUFReader
from rich.console import Console

from moe2gguf.cli import tables
from moe2gguf.cli.tables import shorten, suggest_running
from moe2gguf.errors import NESTED
from moe2gguf.gguf.file import list_problems

PROGRAM = [sys.executable, "-c", "from moe2gguf.cli import main; main()"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA checkpoint, with a name that ASCII does not have."""
    return checkpoints.make(tmp_path_factory.mktemp("streams") / "modèle")


@pytest.mark.parametrize(
    ("redirection", "reason"),
    [
        (">/dev/full", "No space left on device"),
        (">&-", "Bad file descriptor"),
        ("| (exec <&-; cat missing 2>/dev/null)", "Broken pipe"),
    ],
)
@pytest.mark.parametrize("option", [[], ["--json"]])
def test_what_standard_output_refuses_is_one_message(
    model: Path, tmp_path: Path, redirection: str, reason: str, option: list[str]
) -> None:
    """Exit code 1, the reason, and the file that was written all the same; no traceback, no word at exit."""
    out = tmp_path / "out.gguf"
    script = f'set -o pipefail; sleep 0; "$@" {redirection}'

    done = subprocess.run(
        ["bash", "-c", script, "bash", *PROGRAM, "convert", str(model), str(out), "--dense", *option],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )

    assert (1, f"moe2gguf: standard output cannot be written: {reason}; {out} was written\n") == (
        done.returncode,
        done.stderr,
    )
    assert out.read_bytes().startswith(b"GGUF")


def test_a_reader_that_wants_no_more_is_no_error(tmp_path: Path) -> None:
    """As with `| head -1`: nothing on standard error, where nothing was written that has to be named."""
    file = tiny_gguf.write_gguf(tmp_path / "m.gguf", tiny_gguf.dense_weights(n_layer=1))
    command = ["bash", "-c", '"$@" | (exec <&-; cat missing 2>/dev/null)', "bash", *PROGRAM, "inspect", str(file)]

    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)

    assert "" == done.stderr


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
def test_a_file_that_was_changed_in_place_is_named(tmp_path: Path, redirection: str) -> None:
    """Its count is the new one, and the message says so."""
    file = tiny_gguf.write_gguf(tmp_path / "m.gguf", tiny_gguf.sliced_weights(tiny_gguf.dense_weights(n_layer=1), 4))
    command = ["bash", "-c", f'"$@" {redirection}', "bash", *PROGRAM, "set-used", str(file), "3"]

    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)

    assert 1 == done.returncode
    assert done.stderr.endswith(f"; {file} was written\n")
    assert 3 == GGUFReader(file).fields["llama.expert_used_count"].contents()


@pytest.mark.parametrize(("option", "expected"), [([], "mod?le.gguf"), (["--json"], "mod\\u00e8le.gguf")])
def test_what_the_terminal_cannot_show_is_replaced(
    model: Path, tmp_path: Path, option: list[str], expected: str
) -> None:
    """An ASCII terminal gets a question mark in a sentence, an escape in JSON; the exit code is 0."""
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    command = [*PROGRAM, "convert", str(model), str(tmp_path / "modèle.gguf"), "--dense", *option]

    done = subprocess.run(command, env=ascii_only, capture_output=True, check=False)

    assert (0, b"") == (done.returncode, done.stderr)
    assert expected.encode() in done.stdout


def test_standard_error_that_is_full_changes_nothing(model: Path, tmp_path: Path) -> None:
    """The exit code is that of the error."""
    command = ["bash", "-c", '"$@" 2>/dev/full', "bash", *PROGRAM, "convert", str(tmp_path / "nothing"), "out.gguf"]

    assert 1 == subprocess.run(command, check=False).returncode


@pytest.mark.parametrize("redirection", ["</dev/null", "<&-"])
def test_standard_input_that_is_closed_is_empty(redirection: str, tmp_path: Path) -> None:
    """A chat ends at once."""
    file = tiny_gguf.write_gguf(tmp_path / "m.gguf", tiny_gguf.dense_weights(n_layer=1))
    command = ["bash", "-c", f'"$@" {redirection}', "bash", *PROGRAM, "chat", str(file), "--raw"]

    done = subprocess.run(command, capture_output=True, check=False)

    assert (0, b"") == (done.returncode, done.stdout.strip())


@pytest.mark.parametrize(("encoding", "message"), [("ascii", "h\xe9"), ("utf-8", "h\xff\xfe")])
def test_what_standard_input_cannot_decode_is_replaced(encoding: str, message: str, tmp_path: Path) -> None:
    """A message in another encoding gets an answer like every one."""
    file = tiny_gguf.write_gguf(tmp_path / "m.gguf", tiny_gguf.dense_weights(n_layer=1))
    strict = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}

    done = subprocess.run(
        [*PROGRAM, "chat", str(file), "--raw", "-n", "1", "-t", "1"],
        input=message.encode("latin-1") + b"\n",
        env=strict,
        capture_output=True,
        check=False,
    )

    assert (0, b"") == (done.returncode, done.stderr)


def test_a_long_list_is_shortened_unless_all_is_wanted() -> None:
    """Five lines and how many more; six are shown as they are."""
    message = "cannot go on, 9 problems:\n" + "\n".join(f"  - problem {i}" for i in range(9))

    assert "problem 4\n  and 4 more (--verbose shows all)" in shorten(message, whole=False)
    assert "problem 5" not in shorten(message, whole=False)
    assert message == shorten(message, whole=True)
    assert "\n".join(message.splitlines()[:7]) == shorten("\n".join(message.splitlines()[:7]), whole=False)
    assert 7 + 4 == len(
        shorten(message.replace("problem 4", "problem 4" + f"{NESTED}or that" * 4), whole=False).split("\n")
    )


@pytest.mark.parametrize(("width", "n_line"), [(60, 1), (80, 2)])
def test_a_table_without_room_for_its_words_has_whole_lines(
    width: int, n_line: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A terminal folds names and between words; where it would break the words of other columns, it wraps the lines."""
    monkeypatch.setattr(tables, "out", lambda: Console(width=width, force_terminal=True))
    table = tables.make_table("", *(f"column-{i}" for i in range(6)))
    table.add_row("a-very-long-name.gguf", *"abcdef")

    tables.print_table(table)

    assert 1 + n_line == len(capsys.readouterr().out.splitlines())


def test_a_list_that_is_cut_already_is_counted_whole(tmp_path: Path) -> None:
    """Of 272 problems, 20 of which are listed, 267 are more than 5."""
    problems = [f"problem {i}" for i in range(272)]

    short = shorten(list_problems(tmp_path / "m.gguf", problems), whole=False).splitlines()

    assert 7 == len(short)
    assert "272 problems" in short[0]
    assert "  and 267 more (--verbose shows more of them)" == short[-1]


def test_a_cut_file_is_one_sentence(tmp_path: Path) -> None:
    """Not one for every tensor; with how much is missing."""
    file = tiny_gguf.write_gguf(tmp_path / "m.gguf", tiny_gguf.dense_weights())
    file.write_bytes(file.read_bytes()[:-1000])

    done = moe2gguf("quantize", file, tmp_path / "out.gguf", "q8_0")

    assert 1 == done.returncode
    assert 2 == len(done.stderr.splitlines())
    assert "tensors end behind the file, which has" in done.stderr


def test_what_comes_next_is_a_command_that_runs() -> None:
    """A chat where the file has a template, else a prompt to go on from; quoted for a shell."""
    chat = suggest_running(Path("my moe.gguf"), {"tokenizer.chat_template": "{{ messages }}"})
    assert "moe2gguf chat 'my moe.gguf'" == shlex.join(map(str, chat))
    assert "moe2gguf run m.gguf 'The capital of France is'" == shlex.join(map(str, suggest_running(Path("m.gguf"), {})))


def test_a_terminal_gets_next_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To talk with the file, to compare it with the one it comes from, and to serve it."""
    monkeypatch.setattr(tables, "err", lambda: Console(stderr=True, force_terminal=True, width=200, color_system=None))
    dense = tiny_gguf.write_gguf(tmp_path / "dense.gguf", tiny_gguf.dense_weights())

    done = moe2gguf("convert", dense, tmp_path / "m.gguf", "-e", 2)

    steps = [f"run {tmp_path}/m.gguf 'The capital of France is'"]
    steps += [f"compare {tmp_path}/m.gguf --reference {dense}", f"serve-help {tmp_path}/m.gguf"]
    words = "\n   or: moe2gguf ".join(steps)
    assert done.stderr.endswith(f"next: moe2gguf {words}\n")
