"""Every long job, on tiny models, in processes that are forks of one that has imported torch and transformers."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

import checkpoints
import sweeps
import tiny_gguf
from flat_options import flat_options

import moe2gguf.experts.heal.layerwise
import moe2gguf.experts.heal.train  # noqa: F401 - so that the forks have them
from moe2gguf import convert
from moe2gguf.experts.heal.settings import Compute, Evaluation, HealSettings, Training
from moe2gguf.gguf.resume import Journal, Piece
from moe2gguf.measure import imatrix
from moe2gguf.measure.compare import compare
from moe2gguf.measure.metrics import as_json
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.heal import HealText, heal
from moe2gguf.recipes.hf_output import write_folder
from moe2gguf.recipes.quantize import quantize

WORDS = "the man and an inner theme of it is to mend a thin and rather other thing in the tan. "


def make_inputs(folder: Path) -> Path:
    """The models and texts that the jobs read."""
    dense = tiny_gguf.dense_weights(n_layer=3)
    tiny_gguf.write_gguf(folder / "dense.gguf", dense)
    tiny_gguf.write_gguf(folder / "routed.gguf", tiny_gguf.sliced_weights(dense, 4, router_seed=1), n_expert_used=2)
    (folder / "words.txt").write_text(WORDS * 40)
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
    rows = [as_json(row.quality) | {"seconds": None} for row in found.rows if row.quality]
    out.write_text(json.dumps(rows))
    journal.unlink()


def heal_settings(layerwise: int, steps: int, seed: int) -> HealSettings:
    """A few passes or steps, with a score and a checkpoint after each step."""
    training = Training(used_range=(2, 2), layerwise=layerwise, steps=steps, batch=2, seed=seed)
    return HealSettings(training, evaluation=Evaluation((2,), every=1), compute=Compute(device="cpu"))


def run_heal(
    inputs: Path,
    out: Path,
    changed: bool,
    resume: bool,
    layerwise: int = 0,
    steps: int = 3,
    **sliced_for: Any,
) -> None:
    """Steps of the whole model; `out` is its weights, without the log, which has times."""
    sliced = out.parent / "sliced"
    if not sliced.exists():
        options = flat_options(experts=4, align=8, preset="exact", **sliced_for)
        write_folder(inputs / "warm", sliced, options)
    text = HealText((inputs / "words.txt",), n_token=256, n_held_out=32, n_context=32)
    settings = heal_settings(layerwise, steps, seed=int(changed))
    heal(sliced, inputs / "warm", text, out, settings, resume=resume, force=True)
    (out / "model.safetensors").rename(out.with_suffix(".weights"))
    shutil.rmtree(out)
    shutil.rmtree(sliced)


def run_heal_layers(inputs: Path, out: Path, changed: bool, resume: bool) -> None:
    """Passes over one layer after the other."""
    run_heal(inputs, out, changed, resume, layerwise=1, steps=0)


def run_heal_shared(inputs: Path, out: Path, changed: bool, resume: bool) -> None:
    """Both stages, in the graph with a shared expert, behind a dense first layer."""
    run_heal(inputs, out, changed, resume, 1, 2, target="glm4moe", n_shared=1, leading_dense=1)


JOBS: dict[str, tuple[Callable[..., None], str | None]] = {
    "convert": (run_convert, "experts: 4 there, 2 now"),
    "convert-shards": (run_convert_shards, "shard size: 100000 there, 90000 now"),
    "text": (run_calibration, "seed: 0 there, 1 now"),
    "quantize": (run_quantize, "pure: False there, True now"),
    "imatrix": (run_imatrix, "--tokens: 128 there, 96 now"),
    "compare": (run_compare, None),
    "heal": (run_heal, "seed: 0 there, 1 now"),
    "heal-layers": (run_heal_layers, "seed: 0 there, 1 now"),
    "heal-shared": (run_heal_shared, "seed: 0 there, 1 now"),
}
"""The function of each job, and how it names the changed option; None: the rows of other jobs are no obstacle."""


STOP_AFTER = {"heal": "step", "heal-layers": "layer", "heal-shared": "layer"}
"""Where not every piece is a point to go on from: how the name of the first such point begins."""


def start_server() -> ForkServerContext:
    """Start the process whose forks run the jobs, unless it runs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    return context


def run_job(name: str, inputs: Path, out: Path, stop: bool, pieces: Connection) -> None:
    """Run one job and send the names of the pieces that it finishes.

    With `stop` the process waits for its end after the first piece from which it can go on.
    """
    record = Journal.record

    def record_and_send(journal: Journal, piece_name: str, piece: Piece, *, durable: bool = False) -> None:
        record(journal, piece_name, piece, durable=durable)
        pieces.send(piece_name)
        if stop and re.match(STOP_AFTER.get(name, ""), piece_name):
            time.sleep(600)

    Journal.record = record_and_send  # type: ignore[method-assign, assignment]
    JOBS[name][0](inputs, out, changed=False, resume=True)
