"""The whole model, layer by layer: text goes in, experts come out, one layer's weights in memory at a time.

Several sets of hidden states move through the layers side by side: the dense model's, and for each number of used
experts that is fitted those of the model whose earlier layers are sliced already. Each layer is fitted so that these
return to the first (sequential refit), hence later layers mend what earlier ones lost. After every layer the result and
all sets are on disk, so that a stopped calibration resumes.
"""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moe2gguf.errors import CalibrationError
from moe2gguf.experts.forward import Block, Layers, choose_device
from moe2gguf.experts.hidden_states import HiddenStates, KeptRows, LazyRows, allocate, chunks
from moe2gguf.experts.layer import LayerExperts, LayerReport
from moe2gguf.experts.mlp import MLP, LayerInputs, SlicedLayer, Stream
from moe2gguf.experts.slice_layer import slice_layer
from moe2gguf.experts.text import Text
from moe2gguf.gguf.resume import Job, checksum_path, describe_record
from moe2gguf.progress import Progress
from moe2gguf.spec import Slicing

ACTIVATIONS = 2**31
"""Bytes of a layer's activations that are kept, and of its inputs; the rest is computed each time it is read."""

Slicer = Callable[[MLP, LayerInputs, Slicing], SlicedLayer]
"""Slices one layer, see `moe2gguf.experts.slice_layer.slice_layer`."""


class CalibrationModel(Protocol):
    """The dense model to calibrate, wherever its weights and its tokenizer come from."""

    @property
    def identity(self) -> str:
        """A digest of its weights: a stopped calibration of other weights is not continued."""

    def layers(self, device: torch.device, /) -> Layers:
        """Return its blocks, on a device."""

    def windows(self, text: Text, n_token: int, n_context: int, /) -> NDArray[np.int64]:
        """Return token ids (n_window, n_context) of a text, see `moe2gguf.experts.text.tokenize_windows`."""


@dataclass(frozen=True)
class CalibrationSettings:
    """How to calibrate.

    n_token    how many tokens of the text
    n_context  tokens of a window
    device     torch device (None: the best there is)
    memory     bytes of hidden states that are kept in memory; the rest is spilled to disk
    """

    n_token: int = 16384
    n_context: int = 512
    device: str | None = None
    memory: int = 4 * 10**9


@dataclass(frozen=True)
class _States:
    """Hidden states (n_token, d_model) of the dense model, if layers are fitted to it, and the sliced one by count."""

    dense: HiddenStates
    sliced: dict[int, HiddenStates]

    @property
    def moving(self) -> list[HiddenStates]:
        """What moves through the layers."""
        return [self.dense, *self.sliced.values()]


def calibrate(
    model: CalibrationModel,
    text: Text,
    slicing: Slicing,
    settings: CalibrationSettings,
    work: Path,
    progress: Progress,
    slicer: Slicer | None = None,
    *,
    resume: bool = True,
) -> list[LayerReport]:
    """Write `layer-I.npz` (see `LayerExperts`) for every sliced layer into `work`, and return these layers' reports.

    A `work` folder of the same job is continued after its last finished layer. `progress` receives the stage
    "calibrate" and the tokens times layers done. `slicer` slices a layer in place of `slice_layer`.
    With `resume` False the work starts anew.

    Raises:
        CalibrationError: the text is too short, the activations are not finite, or a device or the disk cannot be used.
        OutputError: `work` belongs to another job (every difference is named), or cannot be written.
    """
    device = choose_device(settings.device)
    with torch.inference_mode(), device:
        layers = model.layers(device)
        ids = _cut_windows(model, text, settings)
        with Job(work, _describe(model, text, ids, slicing), resume=resume) as job:
            first = _find_first_layer(job, slicing.leading_dense)
            spilled = tempfile.TemporaryDirectory(prefix="unfinished-states-", dir=work)
            with spilled as spill, progress("calibrate", ids.size * len(layers)) as advance:
                advance(first * ids.size)
                counts = slicing.refit_counts if slicing.method.refit else (slicing.n_fitted,)
                n_token = {"dense": ids.size if slicing.method.needs_target else 0}
                n_token |= {f"sliced-{k}": ids.size for k in counts}
                dense, *rest = allocate(n_token, layers.d_model, settings.memory, Path(spill))
                states = _States(dense, dict(zip(counts, rest, strict=True)))
                _fill_states(states, work, first, layers, ids)
                for i, block in layers.attend_blocks(states.moving, settings.n_context, first):
                    if i < slicing.leading_dense:
                        for hidden in states.moving:
                            _add_mlp(block, hidden)
                    else:
                        layer = _slice_block(block, states, slicing, slicer or slice_layer)
                        layer.to_experts(slicing.d_expert, new_down=slicing.method.refit).save(work, i)
                        _save_states(job, i, states)
                    advance(ids.size)
        numbers = range(slicing.leading_dense, len(layers))
        return [report for i in numbers if (report := LayerExperts.load(work, i).report)]


def _describe(model: CalibrationModel, text: Text, ids: NDArray[np.int64], slicing: Slicing) -> dict[str, str]:
    """Describe everything that decides the result."""
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    return {"text": text.digest, "tokens": digest, **describe_record(slicing), "checkpoint": model.identity}


def _cut_windows(model: CalibrationModel, text: Text, settings: CalibrationSettings) -> NDArray[np.int64]:
    """Return the windows of the text, (n_window, n_context), all that are asked for."""
    n_context = settings.n_context
    ids = model.windows(text, settings.n_token, n_context)
    if ids.size < settings.n_token // n_context * n_context:
        raise CalibrationError(
            f"{text.label}: too few tokens, {ids.size:,} of {settings.n_token:,} in windows of {n_context}; "
            f"give more text, or --calibration-tokens {ids.size}"
        )
    return ids


def _slice_block(block: Block, states: _States, slicing: Slicing, slicer: Slicer) -> SlicedLayer:
    """Slice one block, whose attention is added already, and add what both MLPs give to the hidden states."""
    _add_mlp(block, states.dense)
    streams = [_make_stream(block, states, k) for k in states.sliced]
    layer = slicer(block.mlp, LayerInputs(tuple(streams)), slicing)
    for stream, sliced in zip(streams, states.sliced.values(), strict=True):
        for part in chunks(len(sliced)):
            sliced[part] = sliced[part] + layer(stream.x[part], stream.k, stream.neurons[part]).cpu()
    return layer


def _add_mlp(block: Block, hidden: HiddenStates) -> None:
    """Add what the dense MLP gives to hidden states."""
    for part in chunks(len(hidden)):
        hidden[part] = hidden[part] + block.mlp(block.mlp_input(hidden)[part]).cpu()


def _make_stream(block: Block, states: _States, k: int) -> Stream:
    """What the layer sees with k experts used before it; it should bring that to the dense model's residual stream."""
    dense, sliced, limit = states.dense, states.sliced[k], ACTIVATIONS // len(states.sliced)
    target = LazyRows(len(dense), lambda part: (dense[part] - sliced[part]).to(block.device))
    x = KeptRows(block.mlp_input(sliced), limit)
    return Stream(k, x, KeptRows(LazyRows(len(x), lambda part: block.mlp.activations(x[part])), limit), target)


def _find_first_layer(job: Job, leading_dense: int) -> int:
    """Return the first layer to do: the one behind the last hidden states, if all sliced ones before are unharmed."""
    if (name := job.last(r"state-\d+\.f32")) is None:
        return 0
    first = int(name[len("state-") : -len(".f32")]) + 1
    for i in range(leading_dense, first):
        finished, path = job.find(f"state-{i}.f32"), job.folder / f"layer-{i}.npz"
        if finished is None or not path.exists() or checksum_path(path) != finished.facts.get("layer"):
            return 0
    return first


def _fill_states(states: _States, work: Path, first: int, layers: Layers, ids: NDArray[np.int64]) -> None:
    """Fill the hidden states that layer `first` starts from: with the embedding, or with what was saved."""
    if first == 0:
        embedded, *others = states.sliced.values()
        layers.embed(ids, embedded)
        for rows in (states.dense, *others):
            for part in chunks(len(rows)):
                rows[part] = embedded[part]
        return
    with (work / f"state-{first - 1}.f32").open("rb") as file:
        for rows in states.moving:
            for part in chunks(len(rows)):
                shape = part.stop - part.start, layers.d_model
                values = np.fromfile(file, np.float32, shape[0] * shape[1])
                if values.size < shape[0] * shape[1]:
                    raise CalibrationError(f"{file.name}: ends early; remove the folder {work} to start anew")
                rows[part] = torch.from_numpy(values.reshape(shape))


def _save_states(job: Job, i: int, states: _States) -> None:
    """Save what layer `i` + 1 starts from: with it layer `i` is finished."""
    facts = {"layer": checksum_path(job.folder / f"layer-{i}.npz", flush=True)}
    with job.save(f"state-{i}.f32", facts) as path, path.open("wb") as file:
        for rows in states.moving:
            for part in chunks(len(rows)):
                file.write(rows[part].contiguous().numpy().data)
    job.drop(f"state-{i - 1}.f32")
