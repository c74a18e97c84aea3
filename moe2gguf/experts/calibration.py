"""The whole model, layer by layer: hidden states go in, experts come out, one layer's weights in memory at a time.

Two streams run side by side: the dense model's hidden states, and those of the model whose earlier layers are sliced
already. Each layer is fitted so that the second returns to the first (sequential refit), hence later layers mend what
earlier ones lost. After every layer the result and both streams are on disk, so that a stopped run resumes.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe2gguf.errors import CalibrationError
from moe2gguf.experts.forward import Layers, choose_device
from moe2gguf.experts.hidden_states import Made, Rows, Shelf, Store, chunks
from moe2gguf.experts.layer import LayerExperts
from moe2gguf.experts.mlp import MLP, Carved, Inputs
from moe2gguf.experts.slice_layer import Contributions, carve, observe
from moe2gguf.experts.slicing import PADDING
from moe2gguf.experts.text import Text
from moe2gguf.spec import Slicing

Carver = Callable[[MLP, Inputs, Slicing, Contributions], Carved]
"""Makes one layer's experts, see `moe2gguf.experts.slice_layer.carve`."""


@dataclass(frozen=True)
class Subject:
    """The dense model that is calibrated, wherever its weights and its tokenizer come from.

    layers     its blocks, on a device
    windows    (text, n_token, n_context) -> ids (n_window, n_context), see `moe2gguf.experts.text.windows`
    identity   what tells its weights from others, for a calibration that is continued
    """

    layers: Callable[[torch.device], Layers]
    windows: Callable[[Text, int, int], NDArray[np.int64]]
    identity: str = ""


@dataclass(frozen=True)
class Settings:
    """How to calibrate: tokens, window length, device (None: the best there is).

    memory     bytes of hidden states that stay in memory; more of them go to disk, piece by piece
    """

    n_token: int = 16384
    n_context: int = 512
    device: str | None = None
    memory: int = 4 * 10**9


@dataclass(frozen=True)
class _Streams:
    """Hidden states (n_token, d_model) of the dense and of the sliced model, and the dense MLP's output."""

    dense: Store
    sliced: Store
    output: Store


@dataclass(frozen=True)
class _Run:
    """What stays the same from layer to layer."""

    layers: Layers
    n_context: int
    slicing: Slicing
    carver: Carver
    work: Path


def calibrate(
    subject: Subject,
    text: Text,
    slicing: Slicing,
    settings: Settings,
    work: Path,
    advance: Callable[[int], None],
    carver: Carver | None = None,
) -> list[dict[str, Any]]:
    """Write `layer-I.npz` (see `LayerExperts`) for every layer into `work`; returns the layers' reports.

    A `work` folder of the same job is continued after its last finished layer. `advance` is told the tokens done, once
    per layer. `carver` makes a layer's experts, if not `carve`.

    Raises:
        CalibrationError: see `subject.windows`, `Shelf`, `carve` and `choose_device`; or `work` belongs to another job
            (the difference is named).
    """
    device = choose_device(settings.device)
    with torch.inference_mode(), device:
        layers = subject.layers(device)
        ids = _windows(subject, text, settings)
        job = {"text": text.digest, "ids": _digest(ids), "slicing": asdict(slicing), "checkpoint": subject.identity}
        begin = _resume(work, job)
        advance(begin * ids.size)
        run = _Run(layers, settings.n_context, slicing, carver or carve, work)
        with tempfile.TemporaryDirectory(prefix="states-", dir=work) as spill:
            shelf = Shelf(ids.size, layers.d_model, 3, settings.memory, Path(spill))
            streams = _Streams(shelf.store("dense"), shelf.store("sliced"), shelf.store("output"))
            _start(work, begin, layers, ids, streams)
            for i in range(begin, len(layers)):
                _layer(run, i, streams)
                advance(ids.size)
        return [LayerExperts.load(work, i).report for i in range(len(layers))]


def _windows(subject: Subject, text: Text, settings: Settings) -> NDArray[np.int64]:
    """The windows of the text, (n_window, n_context), all that are asked for."""
    n_context = settings.n_context
    ids = subject.windows(text, settings.n_token, n_context)
    if ids.size < settings.n_token // n_context * n_context:
        raise CalibrationError(
            f"{text.label}: too few tokens, {ids.size:,} of {settings.n_token:,} in windows of {n_context}; "
            f"give more text or --calibration-tokens {ids.size}"
        )
    return ids


def _layer(run: _Run, i: int, streams: _Streams) -> None:
    """Layer `i`: attention, the dense MLP, its experts, and what both models add to their streams."""
    dense, sliced, output = streams.dense, streams.sliced, streams.output
    block, slicing = run.layers.block(i), run.slicing
    for stream in (dense, sliced):
        block.attend(stream, run.n_context)
    x_dense, x_sliced = block.mlp_input(dense), block.mlp_input(sliced)
    target = Made(len(dense), lambda part: (dense[part] + output[part] - sliced[part]).to(block.device))
    seen = observe(block.mlp, x_dense, output)
    carved = run.carver(block.mlp, Inputs(x_dense, output, x_sliced, target), slicing, seen)
    for part in chunks(len(dense)):
        dense[part] = dense[part] + output[part]
        sliced[part] = sliced[part] + carved(x_sliced[part], slicing.n_expert_used).cpu()
    _save(run.work, i, carved, slicing, (dense, sliced))
    run.layers.release(i)


def _resume(work: Path, job: dict[str, Any]) -> int:
    """The first layer to do; makes the folder's manifest, or compares it with this job."""
    manifest = work / "job.json"
    if not manifest.exists():
        work.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps(job))
        return 0
    known = json.loads(manifest.read_text())
    if differing := [key for key in job if known.get(key) != json.loads(json.dumps(job[key]))]:
        raise CalibrationError(
            f"{work}: holds another calibration (other {', '.join(differing)}); remove the folder to start anew"
        )
    states = sorted(int(path.stem.split("-")[1]) for path in work.glob("state-*.f32"))
    return states[-1] + 1 if states else 0


def _start(work: Path, first: int, layers: Layers, ids: NDArray[np.int64], streams: _Streams) -> None:
    """Fill both streams with what layer `first` starts from: the embedding, or what was left on disk."""
    if first == 0:
        layers.embed(ids, streams.dense)
        for part in chunks(ids.size):
            streams.sliced[part] = streams.dense[part]
        return
    with (work / f"state-{first - 1}.f32").open("rb") as file:
        for stream in (streams.dense, streams.sliced):
            for part in chunks(ids.size):
                shape = part.stop - part.start, layers.d_model
                values = np.fromfile(file, np.float32, shape[0] * shape[1])
                if values.size < shape[0] * shape[1]:
                    raise CalibrationError(f"{file.name}: ends early; remove the folder {work} to start anew")
                stream[part] = torch.from_numpy(values.reshape(shape))


def _save(work: Path, i: int, carved: Carved, slicing: Slicing, streams: tuple[Rows, Rows]) -> None:
    """The layer first, then the state that says it is finished; both by rename."""
    order = np.full((slicing.n_expert, slicing.d_expert), PADDING, np.int64)
    for row, group in zip(order, carved.groups, strict=True):
        row[: len(group)] = group.cpu().numpy()
    made = LayerExperts(order, carved.router.cpu().numpy(), carved.scale.cpu().numpy(), report=carved.report)
    if slicing.method.refit:
        made = replace(made, down=carved.mlp.down.T.contiguous().cpu().numpy())
    made.save(work, i)
    unfinished = work / "state.tmp"
    with unfinished.open("wb") as file:
        for rows in streams:
            for part in chunks(len(rows)):
                file.write(rows[part].contiguous().numpy().data)
    unfinished.replace(work / f"state-{i}.f32")
    (work / f"state-{i - 1}.f32").unlink(missing_ok=True)


def _digest(ids: NDArray[np.int64]) -> str:
    return hashlib.sha256(ids.tobytes()).hexdigest()
