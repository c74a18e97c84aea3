"""The whole model, layer by layer: hidden states go in, experts come out, one layer's weights in memory at a time.

Two streams run side by side: the dense model's hidden states, and those of the model whose earlier layers are sliced
already. Each layer is fitted so that the second returns to the first (sequential refit), hence later layers mend what
earlier ones lost. After every layer the result and both streams are on disk, so that a stopped run resumes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe2gguf.errors import CalibrationError
from moe2gguf.experts.carve import Carved, Inputs, carve
from moe2gguf.experts.forward import Layers, Load, choose_device
from moe2gguf.experts.layer import LayerExperts
from moe2gguf.experts.slicing import PADDING
from moe2gguf.experts.text import Text, windows
from moe2gguf.spec import Slicing


@dataclass(frozen=True)
class Settings:
    """How to calibrate: tokens, window length, the token each window starts with, device (None: the best there is)."""

    n_token: int = 16384
    n_context: int = 512
    bos: int | None = None
    device: str | None = None


def calibrate(
    folder: Path,
    load: Load,
    text: Text,
    slicing: Slicing,
    settings: Settings,
    work: Path,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Write `layer-NNN.npz` (see `LayerExperts`) for every layer into `work`; returns the layers' reports.

    `load` reads a tensor of the checkpoint in `folder`. A `work` folder of the same job is continued after its last
    finished layer. `advance` is told the tokens done, once per layer.

    Raises:
        CalibrationError: see `windows` and `carve`; or `work` belongs to another job (the difference is named).
    """
    with torch.inference_mode():
        device = choose_device(settings.device)
        layers = Layers(folder, load, device)
        ids = windows(folder, text, settings.n_token, settings.n_context, settings.bos)
        first = _resume(work, {"text": text.digest, "ids": _digest(ids), "slicing": asdict(slicing)})
        dense, sliced = _streams(work, first, layers, ids)
        for i in range(first, len(layers)):
            block = layers.block(i)
            block.attend(dense)
            block.attend(sliced)
            x_dense, x_sliced = block.mlp_input(dense), block.mlp_input(sliced)
            output = block.mlp(x_dense)
            dense += output.reshape(dense.shape).to(dense.device)
            target = (dense - sliced).reshape(-1, dense.shape[-1]).to(device)
            carved = carve(block.mlp, Inputs(x_dense, output, x_sliced, target), slicing)
            sliced += carved(x_sliced, slicing.n_expert_used).reshape(sliced.shape).to(sliced.device)
            _save(work, i, carved, slicing, dense, sliced)
            layers.release(i)
            advance(ids.size)
        return [LayerExperts.load(work, i).report for i in range(len(layers))]


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
    states = sorted(int(path.stem.split("-")[1]) for path in work.glob("state-*.npz"))
    return states[-1] + 1 if states else 0


def _streams(work: Path, first: int, layers: Layers, ids: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (n_window, n_context, d_model) of the dense and of the sliced model before layer `first`."""
    if first == 0:
        hidden = layers.embed(ids)
        return hidden, hidden.clone()
    with np.load(work / f"state-{first - 1}.npz") as state:
        return torch.from_numpy(state["dense"]), torch.from_numpy(state["sliced"])


def _save(work: Path, i: int, carved: Carved, slicing: Slicing, dense: torch.Tensor, sliced: torch.Tensor) -> None:
    """The layer first, then the state that says it is finished; both by rename."""
    order = np.full((slicing.n_expert, slicing.d_expert), PADDING, np.int64)
    for row, group in zip(order, carved.groups, strict=True):
        row[: len(group)] = group.cpu().numpy()
    down = carved.mlp.down.T.contiguous().cpu().numpy() if slicing.recipe.refit else None
    LayerExperts(order, carved.router.cpu().numpy(), carved.scale.cpu().numpy(), down, carved.report).save(work, i)
    state = work / f"state-{i}.npz"
    np.savez(work / "state.tmp.npz", dense=dense.numpy(), sliced=sliced.numpy())
    (work / "state.tmp.npz").replace(state)
    (work / f"state-{i - 1}.npz").unlink(missing_ok=True)


def _digest(ids: NDArray[np.int64]) -> str:
    return hashlib.sha256(ids.tobytes()).hexdigest()
