"""Every long job, on tiny models, as a command line: `python long_jobs.py NAME INPUTS OUT CHANGED STOP`.

Each finished piece is a line on stdout; with STOP the process waits for its end after the first one. CHANGED selects
an option of another job.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import checkpoints
import sweeps
import tiny_gguf
from flat_options import flat_options

from moe2gguf import convert
from moe2gguf.gguf.resume import Journal, Piece
from moe2gguf.measure import imatrix
from moe2gguf.measure.compare import compare
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.quantize import quantize

WORDS = "the man and an inner theme of it is to mend a thin and rather other thing in the tan. "


def make_inputs(folder: Path) -> Path:
    """The models and texts that the jobs read."""
    dense = tiny_gguf.dense_weights(n_layer=3)
    tiny_gguf.write_gguf(folder / "dense.gguf", dense)
    tiny_gguf.write_gguf(folder / "routed.gguf", tiny_gguf.sliced_weights(dense, 4, router_seed=1), n_expert_used=2)
    (folder / "words.txt").write_text(WORDS * 8)
    checkpoints.make(folder / "warm", num_hidden_layers=3)
    return folder


def run_convert(inputs: Path, out: Path, changed: bool, resume: bool) -> None:
    """One file, tensor by tensor."""
    convert(inputs / "dense.gguf", out, flat_options(experts=2 if changed else 4), threads=1, resume=resume)


def run_convert_shards(inputs: Path, out: Path, changed: bool, resume: bool) -> None:
    """A set of files, tensor by tensor."""
    options = flat_options(experts=4, shard_size=90_000 if changed else 100_000)
    convert(inputs / "dense.gguf", out, options, threads=1, resume=resume)


def run_calibration(inputs: Path, out: Path, changed: bool, resume: bool) -> None:
    """Experts that fit a text, layer by layer, in the model's folder."""
    options = flat_options(experts=4, used=2, n_token=1024, seed=1 if changed else 0, device="cpu")
    convert(inputs / "warm", out, options, threads=1, resume=resume)


def run_quantize(inputs: Path, out: Path, changed: bool, resume: bool) -> None:
    """Another type for every tensor."""
    quantize(inputs / "dense.gguf", out, TypeOptions("q8_0", pure=changed), threads=1, resume=resume)


def run_imatrix(inputs: Path, out: Path, changed: bool, resume: bool) -> None:
    """Sums that grow window by window."""
    imatrix.SAVE_EVERY = 0
    n_token = 96 if changed else 128
    text = inputs / "words.txt"
    imatrix.collect_imatrix(inputs / "routed.gguf", out, text, n_context=32, n_token=n_token, threads=1, resume=resume)


def run_compare(inputs: Path, out: Path, changed: bool, resume: bool) -> None:
    """Rows, whose journal other comparisons may share; `out` is the table of them, but for the time they took."""
    journal = out.with_name("journal.jsonl")
    found = compare(
        [inputs / "routed.gguf"],
        inputs / "dense.gguf",
        used=[1, 2],
        settings=sweeps.settings(out.parent, journal=journal, resume=resume, n_token=20 if changed else 30),
    )
    rows = [row.quality.to_dict() | {"seconds": None} for row in found.rows if row.quality]
    out.write_text(json.dumps(rows))
    journal.unlink()


JOBS: dict[str, tuple[Callable[..., None], str | None]] = {
    "convert": (run_convert, "experts: 4 there, 2 now"),
    "convert-shards": (run_convert_shards, "shard size: 100000 there, 90000 now"),
    "text": (run_calibration, "seed: 0 there, 1 now"),
    "quantize": (run_quantize, "pure: False there, True now"),
    "imatrix": (run_imatrix, "--tokens: 128 there, 96 now"),
    "compare": (run_compare, None),
}
"""The function of each job, and how it names the changed option; None: the rows of other jobs are no obstacle."""


def main() -> None:
    """Run one job in this process and print the pieces that it finishes."""
    name, inputs, out, changed, stop = sys.argv[1:]
    record = Journal.record

    def record_and_print(journal: Journal, piece_name: str, piece: Piece, *, durable: bool = False) -> None:
        record(journal, piece_name, piece, durable=durable)
        print(json.dumps(piece_name), flush=True)
        if stop == "stop":
            time.sleep(600)

    Journal.record = record_and_print  # type: ignore[method-assign, assignment]
    JOBS[name][0](Path(inputs), Path(out), changed == "changed", resume=True)


if __name__ == "__main__":
    main()
