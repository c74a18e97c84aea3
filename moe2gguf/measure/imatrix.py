"""An importance matrix from a text that runs through a GGUF file in llama.cpp, window by window; it can be continued.

The windows are those of llama.cpp's tool: they follow each other without overlap, each starts with BOS where the file
asks for it, and every position computes an output, so that the last layer sees all tokens as well:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/tools/imatrix/imatrix.cpp#L799
"""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe2gguf.errors import HarnessError, ImportanceError
from moe2gguf.experts.text import Text, bytes_to_read, read_text
from moe2gguf.gguf.shards import read_model
from moe2gguf.gguf.writer import check_target
from moe2gguf.llama.child import stream_from_child
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.model import Llama, open_model
from moe2gguf.llama.watch_inputs import Sums, Watcher
from moe2gguf.measure.grid import digest_identity
from moe2gguf.measure.logits import Windows, cut_windows
from moe2gguf.progress import Progress, silent
from moe2gguf.quant.imatrix import Activity, ImportanceMatrix, merge, read_imatrix, write_imatrix
from moe2gguf.quant.imatrix_match import FEW


@dataclass(frozen=True)
class Coverage:
    """One expert of one layer and the tokens that reached it."""

    layer: str
    expert: int
    n_token: int


@dataclass(frozen=True)
class Collection:
    """What `collect_imatrix` did; `find_scarce_experts` are the experts that fewer than `FEW` tokens reached."""

    path: Path
    matrix: ImportanceMatrix
    n_token: int
    n_resumed: int
    n_merged: int
    scarce: tuple[Coverage, ...]

    @property
    def advice(self) -> str:
        """What becomes of scarce experts, and the ways out; empty where there are none."""
        if not self.scarce:
            return ""
        empty = sum(not one.n_token for one in self.scarce)
        rest = (
            f"{len(self.scarce)} experts saw fewer than {FEW} tokens, {empty} of them none. Those with some are used "
            "as they are; for those with none, convert and quantize ask for --imatrix-repair plain, pooled or ones. "
        )
        return rest + "More --tokens or another text reach more of them, --used all reaches every one."

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return {
            "path": str(self.path),
            "entries": len(self.matrix.entries),
            "datasets": list(self.matrix.datasets),
            "chunk_count": self.matrix.chunk_count,
            "chunk_size": self.matrix.chunk_size,
            "tokens": self.n_token,
            "tokens_resumed": self.n_resumed,
            "merged": self.n_merged,
            "scarce_experts": [
                {"layer": one.layer, "expert": one.expert, "tokens": one.n_token} for one in self.scarce
            ],
            "advice": self.advice,
        }


def collect_imatrix(
    model: Path,
    out: Path,
    text: Path | None,
    *,
    n_token: int | None = None,
    n_context: int = 512,
    n_expert_used: int | Literal["all"] | None = None,
    vocabulary: bool = False,
    merged: Sequence[Path] = (),
    fresh: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> Collection:
    """Collect the importance matrix `out` of the GGUF file `model` from `text`, and add the matrices `merged`.

    Args:
        model: any GGUF file that llama.cpp runs; per expert where it has experts.
        out: the file to write; it appears when it is complete. What was done so far is kept in `OUT.work`.
        text: plain text or JSONL; None only merges.
        n_token: tokens of it, from its start (None: all).
        n_context: tokens of a window.
        n_expert_used: experts per token (None: what the file says).
        vocabulary: also the inputs of the output matrix, which llama.cpp's tool leaves out.
        merged: importance matrices of the same model.
        fresh: begin again where an `OUT.work` of another job would be refused.
        force: replace `out` if it exists.
        threads: llama.cpp's (None: one per core).
        progress: receives a stage ("collect") and the tokens done.

    Raises:
        ImportanceError: a matrix to merge is broken or of another model, or there is nothing to do.
        CalibrationError: the text cannot be read.
        HarnessError: llama.cpp is missing or cannot run the file, or the text is too short.
        OutputError: `out` cannot be written, or must not be replaced.
    """
    if text is None and not merged:
        raise ImportanceError("nothing to collect from: give --text, or --merge matrices")
    check_target(out, [model, *merged], force=force)
    others = [read_imatrix(path) for path in merged]
    work = out.with_name(out.name + ".work")
    if fresh:
        work.unlink(missing_ok=True)
    collected, parts = None, others
    if text is not None:
        words = read_text(text, bytes_to_read(n_token and n_token + n_context))
        job = CollectionKey(
            digest_identity(read_model(model)), words.digest, n_token, n_context, n_expert_used, vocabulary
        )
        collected = _run(model, words, job, work, threads, progress)
        parts = [_matrix(collected, words, n_context), *others]
    matrix = merge(parts, n_context)
    _require_this_model(matrix, model)
    write_imatrix(matrix, out, [model, *merged], force=force)
    work.unlink(missing_ok=True)
    done, resumed = (collected.n_window, collected.n_resumed) if collected else (0, 0)
    return Collection(out, matrix, done * n_context, resumed * n_context, len(others), find_scarce_experts(matrix))


def _run(model: Path, text: Text, job: CollectionKey, work: Path, threads: int | None, progress: Progress) -> Collected:
    stream = collect_sums(model, text.text, job, work, threads=threads)
    done, total = next(stream)
    with progress("collect", total * job.n_context) as advance:
        advance(done * job.n_context)
        while True:
            try:
                now, _ = next(stream)
            except StopIteration as end:
                found: Collected = end.value
                return found
            advance((now - done) * job.n_context)
            done = now


def _matrix(collected: Collected, text: Text, n_context: int) -> ImportanceMatrix:
    sums = collected.sums
    entries = {
        name: Activity(squares.astype(np.float32).reshape(-1), sums.counts[name])
        for name, squares in sums.squares.items()
    }
    return ImportanceMatrix(entries, (text.label,), collected.n_window, n_context)


def _require_this_model(matrix: ImportanceMatrix, model: Path) -> None:
    """What was merged must be of this model: no other tensors, no other widths."""
    tensors = read_model(model).tensors
    wrong = [
        name
        for name, entry in matrix.entries.items()
        if name not in tensors or entry.sums.size // len(entry.counts) != tensors[name].shape[-1]
    ]
    if wrong:
        named = ", ".join(wrong[:3])
        raise ImportanceError(f"a merged importance matrix is not of {model}: {named} has another width or is missing")


def find_scarce_experts(matrix: ImportanceMatrix) -> tuple[Coverage, ...]:
    """The experts of each layer that fewer than `FEW` tokens reached."""
    layers = {name.rpartition(".ffn_")[0]: entry.counts for name, entry in matrix.entries.items() if "_exps." in name}
    return tuple(
        Coverage(layer, expert, int(n))
        for layer, counts in layers.items()
        for expert, n in enumerate(counts)
        if n < FEW and len(counts) > 1
    )


SAVE_EVERY = 20.0
"""Seconds of work that a sudden end may cost."""

BATCH = 256


@dataclass(frozen=True)
class CollectionKey:
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


def collect_sums(
    path: Path, text: str, job: CollectionKey, work: Path, *, threads: int | None = None
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
    path: Path, text: str, job: CollectionKey, work: Path, threads: int | None
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


def _windows(model: Llama, text: str, job: CollectionKey) -> Windows:
    tokens, n = model.tokenize(text), job.n_context
    available = len(tokens) // n
    if not available:
        raise HarnessError(f"the text has {len(tokens)} tokens, fewer than a window of {n}: give a longer text")
    n_window = available if job.n_token is None else min(available, max(1, job.n_token // n))
    return cut_windows(tokens, n_token=n_window * (n - 1), n_context=n, first=0, bos=model.bos())


def _save(job: CollectionKey, work: Path, done: int, sums: Sums) -> None:
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


def _resume(job: CollectionKey, work: Path) -> tuple[int, Sums]:
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
