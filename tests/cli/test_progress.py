"""What a log file gets to see of long work, and how busy the machine is."""

from __future__ import annotations

import os
import re
from pathlib import Path

import checkpoints
import pytest
from command import moe2gguf

from moe2gguf.cli import tables
from moe2gguf.llama.machine import describe_load


def test_a_log_gets_a_line_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage and its share done, up to all of it; nothing of work that is done before the first line is due."""
    model = checkpoints.make(tmp_path / "model")
    assert "" == moe2gguf("convert", model, tmp_path / "a.gguf", "-e", 4).stderr
    monkeypatch.setattr(tables, "PULSE", 0.0)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    lines = moe2gguf("convert", model, tmp_path / "b.gguf", "-e", 4).stderr.splitlines()
    assert len(lines) > 10
    assert all(re.fullmatch(r"\w+: \d+%", line) for line in lines)
    assert lines[-1].endswith(": 100%")


def test_lines_keep_their_distance(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One every 30 seconds, with a word where the machine is busy."""
    clock = iter([100.0, 129.0, 131.0, 160.0, 162.0])
    monkeypatch.setattr(tables._pulse, "last", 100.0)
    monkeypatch.setattr("moe2gguf.cli.tables.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    for number in range(5):
        tables.tell(f"line [{number}]")
    lines = capsys.readouterr().err.splitlines()
    assert ["line [2] (the machine is busy: 1000", "line [4] (the machine is busy: 1000"] == [x[:35] for x in lines]


def test_a_machine_is_busy_with_twice_as_many_processes_as_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """In words with both numbers; a system without the figure says nothing."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (8.0, 0.0, 0.0))
    assert "" == describe_load()
    monkeypatch.setattr(os, "getloadavg", lambda: (8.6, 0.0, 0.0))
    assert "the machine is busy: 9 processes want its 4 processors" == describe_load()
    monkeypatch.delattr(os, "getloadavg")
    assert "" == describe_load()
