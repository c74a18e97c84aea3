"""The program in this process: what it prints and its exit code."""

from __future__ import annotations

import contextlib
import io
from typing import NamedTuple

from moe2gguf.cli import run_program


class Done(NamedTuple):
    """A command that ended."""

    returncode: int
    stdout: str
    stderr: str


def moe2gguf(*arguments: object) -> Done:
    """Run a command line, with errors as messages, as in a process of its own."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_program([str(one) for one in arguments])
    return Done(code, out.getvalue(), err.getvalue())
