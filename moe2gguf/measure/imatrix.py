"""The recipe: a text through a GGUF file in llama.cpp becomes an importance matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe2gguf.errors import ImportanceError
from moe2gguf.experts.text import Text, read_text
from moe2gguf.gguf.shards import read_model
from moe2gguf.gguf.writer import check_target
from moe2gguf.measure.imatrix_collect import Collected, Job, collect
from moe2gguf.measure.sweep import identity
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
    """What `collect_imatrix` did; `scarce` are the experts that fewer than `FEW` tokens reached."""

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
        words = read_text(text)
        job = Job(identity(read_model(model)), words.digest, n_token, n_context, n_expert_used, vocabulary)
        collected = _run(model, words, job, work, threads, progress)
        parts = [_matrix(collected, words, n_context), *others]
    matrix = merge(parts, n_context)
    _require_this_model(matrix, model)
    write_imatrix(matrix, out, [model, *merged], force=force)
    work.unlink(missing_ok=True)
    done, resumed = (collected.n_window, collected.n_resumed) if collected else (0, 0)
    return Collection(out, matrix, done * n_context, resumed * n_context, len(others), scarce(matrix))


def _run(model: Path, text: Text, job: Job, work: Path, threads: int | None, progress: Progress) -> Collected:
    stream = collect(model, text.text, job, work, threads=threads)
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


def scarce(matrix: ImportanceMatrix) -> tuple[Coverage, ...]:
    """The experts of each layer that fewer than `FEW` tokens reached."""
    layers = {name.rpartition(".ffn_")[0]: entry.counts for name, entry in matrix.entries.items() if "_exps." in name}
    return tuple(
        Coverage(layer, expert, int(n))
        for layer, counts in layers.items()
        for expert, n in enumerate(counts)
        if n < FEW and len(counts) > 1
    )
