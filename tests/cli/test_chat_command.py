"""moe2gguf chat and run as a person meets them: a terminal, a pipe, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import tiny_gguf
from command import moe2gguf
from tiny_gguf import EOS

LETTERS = tiny_gguf.vocabulary()[0].index("a")
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
PROGRAM = [sys.executable, "-c", "from moe2gguf.cli import main; main()"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ "a" is answered with "bcd", and "z" with z without end."""
    chain = dict(pairwise([*(LETTERS + i for i in range(4)), EOS])) | {LETTERS + 25: LETTERS + 25}
    strings = {"tokenizer.chat_template": TEMPLATE}
    path = tmp_path_factory.mktemp("tiny") / "model.gguf"
    return tiny_gguf.write_gguf(path, tiny_gguf.chain_weights(chain), n_context=100_000, strings=strings)


def test_a_pipe_gets_one_answer_a_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No prompts, no speeds; commands work; what follows /exit is not read."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\n/clear\na\n/exit\na\n"))
    done = moe2gguf("chat", model, "--threads", 1)
    assert (0, "bcd\nbcd\n", "") == (done.returncode, done.stdout, done.stderr)


def test_json_has_an_answer_a_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its speed."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nz\n"))
    done = moe2gguf("chat", model, "--threads", 1, "-n", 4, "--json")
    first, second = map(json.loads, done.stdout.splitlines())
    assert ("bcd", "zzzz") == (first["answer"], second["answer"])
    assert ("end of text", 4) == (first["speed"]["stopped"], first["speed"]["n_generated"])


def test_another_count_is_confirmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With how many experts there are; a count that the file was not made for is a warning besides."""
    weights = tiny_gguf.sliced_weights(tiny_gguf.dense_weights(), 4)
    path = tiny_gguf.write_gguf(tmp_path / "m.gguf", weights, strings={"moe2gguf.slicing.amplify": "used"})
    monkeypatch.setattr(sys, "stdin", io.StringIO("/used 3\n"))
    done = moe2gguf("chat", path, "--raw")
    assert (0, "3 of 4 experts per token from now on") == (done.returncode, done.stderr.splitlines()[0])
    assert "warning: " in done.stderr


def test_an_error_ends_a_pipe(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One message, exit code 1."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("/used 3\na\n"))
    done = moe2gguf("chat", model)
    assert (1, "") == (done.returncode, done.stdout)
    assert "moe2gguf: model.gguf is dense: it has no experts to choose from\n" == done.stderr


class Terminal:
    """The program on a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        import pty

        self.ours, theirs = pty.openpty()
        command = [*PROGRAM, *map(str, arguments)]
        environment = os.environ | {"TERM": "dumb", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=environment,
            preexec_fn=lambda: _own_terminal(theirs),
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def wait_for(self, words: str, seconds: float = 60.0) -> str:
        """Everything up to these words, which are then read."""
        end = time.monotonic() + seconds
        while words not in self.seen:
            assert time.monotonic() < end, self.seen
            self.seen += os.read(self.ours, 4096).decode("utf-8", "replace")
        before, _, self.seen = self.seen.partition(words)
        return before


def _own_terminal(descriptor: int) -> None:
    """Make it the terminal that Ctrl-C comes from."""
    import fcntl
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(model: Path) -> Iterator[Terminal]:
    pytest.importorskip("pty", reason="terminals are POSIX's")
    one = Terminal("chat", model, "--threads", 1, "-n", 50_000, "--context", 100_000)
    yield one
    one.process.kill()
    one.process.wait()
    os.close(one.ours)


def test_a_person_talks(terminal: Terminal) -> None:
    """A prompt, an answer, its speed, an error that ends nothing, help, and the end."""
    terminal.wait_for("> ")
    terminal.type("a\n")
    assert "bcd" in terminal.wait_for("tokens/s (end of text)")
    terminal.wait_for("> ")
    terminal.type("/used 8\n")
    terminal.wait_for("is dense: it has no experts")
    terminal.wait_for("> ")
    terminal.type("/what\n")
    terminal.wait_for("/clear    forget what was said")
    terminal.wait_for("> ")
    terminal.type("/exit\n")
    assert 0 == terminal.process.wait(timeout=60)


def test_ctrl_c_stops_the_answer_and_not_the_talk(terminal: Terminal) -> None:
    """At the prompt it says how to leave; Ctrl-D leaves."""
    terminal.wait_for("> ")
    terminal.type("z\n")
    terminal.wait_for("zzzzzzzz")
    terminal.type("\x03")
    assert re.search(r"generated \d+, ", terminal.wait_for("(interrupted)"))
    terminal.wait_for("> ")
    terminal.type("\x03")
    terminal.wait_for("/exit or Ctrl-D ends the conversation")
    terminal.wait_for("> ")
    terminal.type("a\n")
    terminal.wait_for("bcd")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert 0 == terminal.process.wait(timeout=60)


def test_a_polite_kill_ends_the_talk(terminal: Terminal) -> None:
    """Ctrl-C at the prompt does not, but the system may."""
    terminal.wait_for("> ")
    terminal.process.terminate()
    assert 143 == terminal.process.wait(timeout=60)


def test_run_uses_the_template_of_a_chat_model(tmp_path: Path, model: Path) -> None:
    """The answer alone; --raw, or a file without a template, goes on with the text."""
    spoken = moe2gguf("run", model, "a", "--threads", 1)
    assert (0, "bcd\n") == (spoken.returncode, spoken.stdout), spoken.stderr
    for arguments in (["a"], ["-p", "a"], ["--prompt", "a"]):
        assert "abcd\n" == moe2gguf("run", model, "--raw", *arguments, "--threads", 1).stdout
    broken = tiny_gguf.write_gguf(
        tmp_path / "broken.gguf", tiny_gguf.dense_weights(), strings={"tokenizer.chat_template": "{% for"}
    )
    done = moe2gguf("run", broken, "a")
    assert (1, "") == (done.returncode, done.stdout)
    assert "; --raw does without it" in done.stderr
    assert 0 == moe2gguf("run", broken, "a", "--raw", "-n", 2).returncode


@pytest.mark.parametrize("arguments", [[], ["a", "-p", "a"], [""]])
def test_run_wants_one_prompt(model: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not none, not two, not an empty one."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    done = moe2gguf("run", model, *arguments)
    assert 2 == done.returncode
    assert "give one prompt: moe2gguf run FILE PROMPT" in done.stderr


def test_run_reads_a_prompt_from_a_pipe(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the command line has none; the end of its last line is no part of it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    assert "abcd\n" == moe2gguf("run", model, "--raw", "--threads", 1).stdout


def test_run_says_where_a_file_was_made_for_another_count(tmp_path: Path) -> None:
    """One line, before the text; its own count says nothing."""
    weights = tiny_gguf.sliced_weights(tiny_gguf.dense_weights(), 4)
    strings = {"moe2gguf.slicing.amplify": "used"}
    path = tiny_gguf.write_gguf(tmp_path / "half.gguf", weights, n_expert_used=2, strings=strings)
    assert "warning" not in moe2gguf("run", path, "a", "--used", 2, "-n", 2).stderr
    assert "with 4 it answers worse, even where that is more" in moe2gguf("run", path, "a", "--used", 4, "-n", 2).stderr
