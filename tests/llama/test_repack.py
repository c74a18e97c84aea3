"""A run that dies of rearranged weights goes on without them, once, and says so."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf

from moe2gguf.errors import CrashError
from moe2gguf.llama import generate as generating
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.generate import generate
from moe2gguf.llama.repack import explain_retry, leave_weights_alone
from moe2gguf.measure import speed
from moe2gguf.measure.bench import Timing, bench

answer_turns, run_once = generating._answer_turns, speed._run_once


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


def answer_or_die(path: Path, setup: Setup, n_context: int) -> Generator[Any, Any, None]:
    """What llama.cpp does on some processors: it dies when it computes with rearranged weights."""
    turns = answer_turns(path, setup, n_context)
    turn = yield next(turns)
    if setup.repack:
        die()
    while True:
        turn = yield turns.send(turn)


def run_or_die(path: Path, setup: Setup, n_prompt: int, n_generate: int, seed: int, verify: bool) -> speed.Run:
    if setup.repack:
        die()
    return run_once(path, setup, n_prompt, n_generate, seed, verify)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write_gguf(tmp_path_factory.mktemp("tiny") / "a.gguf", tiny_gguf.dense_weights())


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGILL])
def test_only_these_signals_with_these_weights_are_tried_again(number: signal.Signals) -> None:
    """Everything else would end in the same way."""
    crash = CrashError("died", signal=number)
    assert leave_weights_alone(Setup(repack=True), crash) == Setup(repack=False)
    assert leave_weights_alone(Setup(repack=False), crash) is None
    assert leave_weights_alone(Setup(repack=True), CrashError("died", signal=signal.SIGKILL)) is None
    assert leave_weights_alone(Setup(repack=True), CrashError("died")) is None
    assert explain_retry(crash).startswith(f"llama.cpp was ended by {number.name} with weights rearranged for")


def test_text_comes_all_the_same(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text as without the crash, and one line about it."""
    whole = "".join(generate(file, "the", n_token=5, threads=1))
    monkeypatch.setattr(generating, "_answer_turns", answer_or_die)
    generation = generate(file, "the", n_token=5, threads=1)
    assert "".join(generation) == whole
    (note,) = generation.notes
    assert "SIGSEGV" in note
    assert "\n" not in note


def test_a_benchmark_crashes_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round is timed without rearranged weights, and a note names the file."""
    monkeypatch.setattr(speed, "_run_once", run_or_die)
    found = bench([file], timing=Timing(8, 4, 2, 1))
    assert found.rows[0].speed is not None
    assert 2 == found.rows[0].speed.n_run
    assert found.notes[0].startswith("a.gguf: llama.cpp was ended by SIGSEGV")
