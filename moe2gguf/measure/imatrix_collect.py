"""Collecting an importance matrix: a text runs through a file in llama.cpp, window by window, and can be continued.

The windows are those of llama.cpp's tool: they follow each other without overlap, each starts with BOS where the file
asks for it, and every position computes an output, so that the last layer sees all tokens as well:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/tools/imatrix/imatrix.cpp#L799
"""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe2gguf.errors import HarnessError
from moe2gguf.llama.child import stream_from_child
from moe2gguf.llama.model import Llama, Setup, open_model
from moe2gguf.llama.watch_inputs import Sums, Watcher
from moe2gguf.measure.logits import Windows, cut

SAVE_EVERY = 20.0
"""Seconds of work that a sudden end may cost."""

BATCH = 256


@dataclass(frozen=True)
class Job:
    """What is collected; two jobs are the same work if all fields are equal.

    model           identity of the file
    text            SHA-256 of the text
    n_token         how much of it, rounded down to whole windows; None: all
    n_context       tokens of a window
    n_expert_used   None: the file's own count; "all": every expert
    vocabulary      also the inputs of the output matrix
    """

    model: str
    text: str
    n_token: int | None
    n_context: int
    n_expert_used: int | Literal["all"] | None = None
    vocabulary: bool = False


@dataclass(frozen=True)
class Collected:
    """The sums over `n_window` windows, of which `n_resumed` had been done before; experts used per token."""

    sums: Sums
    n_window: int
    n_resumed: int
    n_expert_used: int


def collect(
    path: Path, text: str, job: Job, work: Path, *, threads: int | None = None
) -> Generator[tuple[int, int], None, Collected]:
    """Run `text` through the file in a child process; yields (windows done, windows in all); returns the sums.

    What is done is kept in `work` every `SAVE_EVERY` seconds, and a `work` of the same job is continued; the result is
    the same to the bit. The caller removes it.

    Raises:
        HarnessError: llama.cpp cannot run the file, the text is too short, activations are not finite, or `work` is of
            another job (the difference is named).
    """
    stream = stream_from_child(_collect, path, text, job, work, threads, what=f"running {path}")
    collected: Collected = yield from stream
    return collected


def _collect(
    path: Path, text: str, job: Job, work: Path, threads: int | None
) -> Generator[tuple[int, int], None, Collected]:
    done, sums = _resume(job, work)
    n_batch = min(BATCH, job.n_context)
    setup = Setup(n_expert_used=job.n_expert_used, n_context=0, n_batch=n_batch, n_threads=threads)
    with open_model(path, setup) as model:
        watcher = Watcher(model.lib, sums, vocabulary=job.vocabulary)
        model.start(job.n_context, watcher.callback)
        windows = _windows(model, text, job)
        n_resumed, saved = done, time.monotonic()
        yield done, len(windows.tokens)
        for window in windows.tokens[done:]:
            for _ in model.blocks(window):
                watcher.finish()
            done += 1
            if time.monotonic() - saved >= SAVE_EVERY and done < len(windows.tokens):
                _save(job, work, done, sums)
                saved = time.monotonic()
            yield done, len(windows.tokens)
        return Collected(sums, done, n_resumed, model.n_expert_used)


def _windows(model: Llama, text: str, job: Job) -> Windows:
    tokens, n = model.tokenize(text), job.n_context
    available = len(tokens) // n
    if not available:
        raise HarnessError(f"the text has {len(tokens)} tokens, fewer than a window of {n}: give a longer text")
    n_window = available if job.n_token is None else min(available, max(1, job.n_token // n))
    return cut(tokens, n_token=n_window * (n - 1), n_context=n, first=0, bos=model.bos())


def _save(job: Job, work: Path, done: int, sums: Sums) -> None:
    """By rename, so that there is always a whole one."""
    unfinished = work.with_name(work.name + ".tmp")
    arrays: dict[str, Any] = {f"squares/{name}": value for name, value in sums.squares.items()}
    arrays |= {f"counts/{name}": value for name, value in sums.counts.items()}
    try:
        with unfinished.open("wb") as file:
            np.savez(file, job=np.array(json.dumps(asdict(job))), done=np.array(done), **arrays)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(work)
    except OSError as error:
        raise HarnessError(f"{work}: cannot keep what was collected so far ({error.strerror})") from error


def _resume(job: Job, work: Path) -> tuple[int, Sums]:
    """Windows done and their sums: of `work`, or none. Raises HarnessError for one of another job."""
    if not work.exists():
        return 0, Sums()
    try:
        with np.load(work, allow_pickle=False) as file:
            before, done = json.loads(str(file["job"])), int(file["done"])
            sums = Sums(
                {name.removeprefix("squares/"): file[name] for name in file.files if name.startswith("squares/")},
                {name.removeprefix("counts/"): file[name] for name in file.files if name.startswith("counts/")},
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise HarnessError(f"{work}: cannot be continued ({error}); start again with --fresh") from error
    if differences := _differences(before, asdict(job)):
        raise HarnessError(
            f"{work}: was begun with another {' and another '.join(differences)}; go on with what it was begun with, "
            "or start again with --fresh"
        )
    return done, sums


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = {
        "n_token": "--tokens",
        "n_context": "--context",
        "n_expert_used": "--used",
        "vocabulary": "--output-matrix",
    }
    return [
        f"{names.get(key, key)} ({before.get(key)}, now {now[key]})" if key in names else key
        for key in now
        if before.get(key) != now[key]
    ]
