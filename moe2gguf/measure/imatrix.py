"""An importance matrix from a text that runs through a GGUF file in llama.cpp, window by window; it can be continued.

The windows are those of llama.cpp's tool: they follow each other without overlap, each starts with BOS where the file
asks for it, and every position computes an output, so that the last layer sees all tokens as well:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/tools/imatrix/imatrix.cpp#L799
"""

import math
import re
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe2gguf.errors import HarnessError, ImportanceError
from moe2gguf.experts.text import Text, bytes_to_read, read_text
from moe2gguf.gguf.counts import read_counts
from moe2gguf.gguf.file import GGUFFile, TensorInfo, list_problems
from moe2gguf.gguf.outputs import check_target
from moe2gguf.gguf.resume import Job, describe
from moe2gguf.gguf.shards import read_model
from moe2gguf.gguf.source_tensor import SourceTensor
from moe2gguf.llama.child import stream_from_child
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.machine import read_package_version
from moe2gguf.llama.model import Llama, open_model
from moe2gguf.llama.watch_inputs import Sums, Watcher
from moe2gguf.llama.windows import Windows, cut_windows
from moe2gguf.measure.grid import digest_identity, note_long_windows
from moe2gguf.progress import Progress, silent
from moe2gguf.quant.imatrix import Activity, ImportanceMatrix, identify_model, merge, read_imatrix, write_imatrix
from moe2gguf.quant.imatrix_match import FEW

SAVE_EVERY = 20.0
"""Seconds of work that a sudden end may cost."""

BATCH = 256

_SAVED = r"sums-\d+\.npz"


@dataclass(frozen=True)
class CollectionSettings:
    """What of a text is collected.

    n_token         how much of it, rounded down to whole windows; None: all
    n_context       tokens of a window
    n_expert_used   None: the file's own count; "all": every expert
    vocabulary      also the inputs of the output matrix
    """

    n_token: int | None
    n_context: int
    n_expert_used: int | Literal["all"] | None = None
    vocabulary: bool = False


@dataclass(frozen=True)
class Collected:
    """The sums over the first `n_window` windows of a text."""

    sums: Sums = field(default_factory=Sums)
    n_window: int = 0


@dataclass(frozen=True)
class Coverage:
    """One expert of one layer and the tokens that reached it."""

    layer: str
    expert: int
    n_token: int


@dataclass(frozen=True)
class Collection:
    """What `collect_imatrix` did.

    scarce   experts that fewer than `FEW` tokens reached
    notes    sentences that a user must know
    """

    path: Path
    matrix: ImportanceMatrix
    n_token: int
    n_resumed: int
    n_merged: int
    scarce: tuple[Coverage, ...]
    notes: tuple[str, ...] = ()

    @property
    def advice(self) -> str:
        """What becomes of scarce experts, and the ways out; empty where there are none."""
        if not self.scarce:
            return ""
        empty = sum(not one.n_token for one in self.scarce)
        rest = (
            f"{len(self.scarce)} experts saw fewer than {FEW} tokens, {empty} of them none. Those with some are used "
            "as they are; for those with none, convert and quantize ask for --imatrix-repair ones. "
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
            "notes": list(self.notes),
        }


def collect_imatrix(
    model: str | Path,
    out: str | Path,
    text: str | Path | None,
    *,
    n_token: int | None = None,
    n_context: int = 512,
    n_expert_used: int | Literal["all"] | None = None,
    vocabulary: bool = False,
    merged: Sequence[str | Path] = (),
    resume: bool = True,
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
        n_expert_used: experts per token (None: the file's own count).
        vocabulary: also the inputs of the output matrix, which llama.cpp's tool leaves out.
        merged: importance matrices of the same model.
        resume: continue an unfinished collection of the same job, and refuse one of another; False replaces either.
        force: replace `out` if it exists.
        threads: llama.cpp's (None: one per core).
        progress: receives a stage ("collect") and the tokens done.

    Raises:
        ImportanceError: a matrix to merge is broken or of another model, or there is nothing to do.
        CalibrationError: the text cannot be read.
        HarnessError: llama.cpp is missing or cannot run the file, or the text is too short.
        OutputError: `out` cannot be written, must not be replaced, or is unfinished from another job.
    """
    model, out = Path(model), Path(out)
    text = None if text is None else Path(text)
    others = [Path(one) for one in merged]
    if text is None and not merged:
        raise ImportanceError("nothing to collect from: give --text, or --merge matrices")
    check_target(out, [model, *others, *([text] if text else [])], force=force)
    file = read_model(model)
    identity = identify_model({name: SourceTensor(file, info) for name, info in file.tensors.items()})
    parts = [_read_merged(path, file, identity) for path in others]
    notes = [
        f"{path}: does not say of which model it is; its tensors have the names and widths of {model}"
        for path, part in zip(others, parts, strict=True)
        if not part.model
    ]
    if n_expert_used == "all" and not read_counts(file).n_expert:
        notes.append(f"--used all: no effect, for {model} has no experts")
    if text is None:
        matrix = _write_sum(parts, identity, out, [model, *others], n_context, force)
        return Collection(out, matrix, 0, 0, len(merged), find_scarce_experts(matrix), tuple(notes))
    words = read_text(text, bytes_to_read(n_token and n_token + n_context))
    settings = CollectionSettings(n_token, n_context, n_expert_used, vocabulary)
    with Job(out.with_name(out.name + ".work"), _describe(model, words, settings), resume=resume) as job:
        before = _load(job)
        collected = _collect_and_save(model, words, settings, before, job, threads, progress)
        parts = [_matrix(collected, words, n_context), *parts]
        matrix = _write_sum(parts, identity, out, [model, *others], n_context, force)
        job.remove()
    done, resumed = collected.n_window * n_context, before.n_window * n_context
    notes += note_long_windows([model], n_context)
    return Collection(out, matrix, done, resumed, len(merged), find_scarce_experts(matrix), tuple(notes))


def _write_sum(
    parts: Sequence[ImportanceMatrix], identity: str, out: Path, sources: Sequence[Path], n_context: int, force: bool
) -> ImportanceMatrix:
    matrix = replace(merge(parts, n_context), model=identity)
    write_imatrix(matrix, out, sources, force=force)
    return matrix


def _describe(model: Path, text: Text, settings: CollectionSettings) -> dict[str, str]:
    """The manifest: everything that decides the sums, the options by their names on the command line."""
    options = {
        "--tokens": settings.n_token,
        "--context": settings.n_context,
        "--used": settings.n_expert_used,
        "--output-matrix": settings.vocabulary,
    }
    return {
        "command": "imatrix",
        "model": digest_identity(read_model(model)),
        "text": text.digest,
        **{name: describe(value) for name, value in options.items()},
        "llama.cpp": read_package_version("llama-cpp-python"),
    }


def _collect_and_save(
    model: Path,
    text: Text,
    settings: CollectionSettings,
    before: Collected,
    job: Job,
    threads: int | None,
    progress: Progress,
) -> Collected:
    """Go on after the windows of `before`; the job gets what is done so far every `SAVE_EVERY` seconds.

    Raises:
        HarnessError: llama.cpp cannot run the file, the text is too short, or activations are not finite.
    """
    arguments = model, text.text, settings, before, threads, SAVE_EVERY
    stream = stream_from_child(_collect, *arguments, what=f"running {model}")
    done, n_window, _ = next(stream)
    with progress("collect", n_window * settings.n_context) as advance:
        advance(done * settings.n_context)
        while True:
            try:
                now, _, sums = next(stream)
            except StopIteration as end:
                found: Collected = end.value
                return found
            if sums is not None:
                _save(job, Collected(sums, now))
            advance((now - done) * settings.n_context)
            done = now


def _save(job: Job, collected: Collected) -> None:
    arrays: dict[str, Any] = {f"squares/{name}": value for name, value in collected.sums.squares.items()}
    arrays |= {f"counts/{name}": value for name, value in collected.sums.counts.items()}
    name = f"sums-{collected.n_window}.npz"
    with job.save(name) as path:
        np.savez(path, n_window=np.array(collected.n_window), **arrays)
    job.drop_others(_SAVED, name)


def _load(job: Job) -> Collected:
    """What the job has saved, or nothing."""
    name = job.last(_SAVED)
    if name is None:
        return Collected()
    with np.load(job.folder / name, allow_pickle=False) as file:
        squares, counts = (
            {name.removeprefix(kind): file[name] for name in file.files if name.startswith(kind)}
            for kind in ("squares/", "counts/")
        )
        return Collected(Sums(squares, counts), int(file["n_window"]))


def _matrix(collected: Collected, text: Text, n_context: int) -> ImportanceMatrix:
    sums = collected.sums
    entries = {
        name: Activity(squares.astype(np.float32).reshape(-1), sums.counts[name])
        for name, squares in sums.squares.items()
    }
    return ImportanceMatrix(entries, (text.label,), collected.n_window, n_context)


def _read_merged(path: Path, file: GGUFFile, identity: str) -> ImportanceMatrix:
    """Read a matrix to merge, which must be of this model: no other tensors, widths, layers or norms."""
    matrix = read_imatrix(path)
    reasons = [
        f"{name} has another shape there or is missing"
        for name, entry in matrix.entries.items()
        if not _fits(entry, file.tensors.get(name))
    ]
    predicting = _find_layers(name for name in file.tensors if ".nextn." in name)
    if missing := _find_layers(file.tensors) - predicting - _find_layers(matrix.entries):
        reasons.append(f"it has nothing for {len(missing)} of the layers, such as {min(missing)}")
    if matrix.model not in ("", identity):
        reasons.append("it was collected from a model with other norms")
    if reasons:
        raise ImportanceError(list_problems(path, [f"is not of {file.path}: {reason}" for reason in reasons], limit=3))
    return matrix


def _fits(entry: Activity, tensor: TensorInfo | None) -> bool:
    if tensor is None or not tensor.shape:
        return False
    n_mat = math.prod(tensor.shape[:-2])
    return len(entry.counts) in (1, n_mat) and entry.sums.size == n_mat * tensor.shape[-1]


def _find_layers(names: Iterable[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := re.match(r"blk\.(\d{1,9})\.", name))}


def find_scarce_experts(matrix: ImportanceMatrix) -> tuple[Coverage, ...]:
    """The experts of each layer that fewer than `FEW` tokens reached."""
    layers = {name.rpartition(".ffn_")[0]: entry.counts for name, entry in matrix.entries.items() if "_exps." in name}
    return tuple(
        Coverage(layer, expert, int(n))
        for layer, counts in layers.items()
        for expert, n in enumerate(counts)
        if n < FEW and len(counts) > 1
    )


def _collect(
    path: Path, text: str, settings: CollectionSettings, before: Collected, threads: int | None, save_every: float
) -> Generator[tuple[int, int, Sums | None], None, Collected]:
    """Run `text` through the file, in a child process, and add to what there is `before`; returns all sums.

    Yields (windows done, windows in all, None), and every `save_every` seconds the sums so far in the place of None.
    What is continued has the same sums to the bit as what was not stopped.
    """
    sums, n_context = before.sums, settings.n_context
    setup = Setup(n_expert_used=settings.n_expert_used, n_context=0, n_batch=min(BATCH, n_context), n_threads=threads)
    with open_model(path, setup) as model:
        watcher = Watcher(model.lib, sums, vocabulary=settings.vocabulary)
        model.start(n_context, watcher.callback)
        windows = _cut_text(model, text, settings)
        n_window, saved = len(windows.tokens), time.monotonic()
        yield before.n_window, n_window, None
        for done, window in enumerate(windows.tokens[before.n_window :], before.n_window + 1):
            for _ in model.blocks(window):
                watcher.finish()
            is_due = time.monotonic() - saved >= save_every and done < n_window
            yield done, n_window, sums if is_due else None
            if is_due:
                saved = time.monotonic()
        return Collected(sums, n_window)


def _cut_text(model: Llama, text: str, settings: CollectionSettings) -> Windows:
    tokens, n = model.tokenize(text), settings.n_context
    available = len(tokens) // n
    if not available:
        raise HarnessError(f"the text has {len(tokens)} tokens, fewer than a window of {n}: give a longer text")
    n_window = available if settings.n_token is None else min(available, max(1, settings.n_token // n))
    return cut_windows(tokens, n_token=n_window * (n - 1), n_context=n, first=0, bos=model.bos())
