"""moe2gguf.cli.prompt: a signal is seen although nobody types."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

CODE = """
import os, signal
from moe2gguf.cli.prompt import read_line
import readline

def end(number, frame):
    raise SystemExit(100 + number)

signal.signal({number}, end)
readline.set_pre_input_hook(lambda: os.kill(os.getpid(), {number}))
read_line("> ")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_wait_is_not_lost(number: int) -> None:
    """It comes when the prompt is there and readline does not wait yet, where an exception goes nowhere."""
    readline = pytest.importorskip("readline", reason="it waits")
    if not hasattr(readline, "set_pre_input_hook"):
        pytest.skip("this readline says nothing before it waits")
    ours, theirs = os.openpty()

    done = subprocess.run(
        [sys.executable, "-c", CODE.format(number=int(number))],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )

    assert 100 + number == done.returncode, done.stderr
    for descriptor in (ours, theirs):
        os.close(descriptor)
