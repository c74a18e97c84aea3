"""Layer by layer: each layer's experts learn to return the residual stream to the dense model's, one in memory.

Two streams run side by side, as in calibration: the dense model's, and that of the healed layers so far. Every window
of text keeps one count of experts through all layers, so later layers learn to mend what earlier ones lost at that
count. First the down projections are solved in closed form over all counts at once (`moe2gguf.experts.refit`), then
everything that trains follows by gradient; the best of all passes on held-out windows stays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe2gguf.experts.forward import Layers
from moe2gguf.experts.heal import losses
from moe2gguf.experts.heal.moe_layer import Layer, Stored
from moe2gguf.experts.heal.optimize import freeze, optimizer_for, require_finite, trained
from moe2gguf.experts.heal.router import scale_of
from moe2gguf.experts.heal.settings import HealSettings, Windows, batch_at, used_at
from moe2gguf.experts.refit import Normal, choose_ridge

LOUDEST = 100
"""How much more than the worst count another may weigh: with all experts on there may be no error at all."""

Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """The windows, those to train on first; `counts` (n_window,) is each one's number of experts."""

    ids: Windows
    counts: list[int]
    n_train: int

    @classmethod
    def of(cls, ids: Windows, held_out: Windows, settings: HealSettings) -> Job:
        """Training windows at counts drawn from the range, held-out windows once at every count of interest."""
        counts = [used_at(settings, w) for w in range(len(ids))]
        counts += [k for k in settings.evaluate_at for _ in held_out]
        return cls(np.concatenate([ids, *[held_out] * len(settings.evaluate_at)]), counts, len(ids))


def heal_layers(
    layers: Layers,
    load: Callable[[int], Stored],
    job: Job,
    settings: HealSettings,
    work: Path,
    log: Log,
    advance: Callable[[int], None],
    tied: bool | None = None,
) -> None:
    """Write `layer-I.npz` (see `Stored`) of every layer into `work`; goes on after the last finished one.

    `layers` is the dense model, `load` reads a layer of the sliced one. `log` receives one line per layer, `advance`
    the training tokens done. Frozen tensors are written as they were. Where no other stage follows, `tied` says whether
    the embedding is the output matrix, and the held-out text is scored at the end.

    Raises:
        HealError: an activation or a weight is not finite; the layer and step are named.
    """
    first = next((i for i in range(len(layers)) if not (work / f"layer-{i}.npz").exists()), len(layers))
    dense, sliced = _streams(work, first, layers, job)
    for i in range(first, len(layers)):
        with torch.no_grad():
            block = layers.block(i)
            for stream in (dense, sliced):
                block.attend(stream.flatten(0, 1), stream.shape[1])
            dense += block.mlp(block.mlp_input(dense.flatten(0, 1))).reshape(dense.shape).to(dense.device)
            x = block.mlp_input(sliced.flatten(0, 1))[:].reshape(dense.shape)
            target = (dense - sliced).to(x.device)
        require_finite(target, f"layer {i}, before its first step")
        stored = load(i)
        scale = scale_of(torch.from_numpy(stored.router).to(x.device), x[0])
        layer = Layer(stored, scale).to(x.device)
        report = fit(layer, Data(x, target, job, layer), settings, i)
        with torch.no_grad():
            for w, k in enumerate(job.counts):
                sliced[w] += layer(x[w], k).to(sliced.device)
        _save(work, i, _kept(layer, stored, settings), dense, sliced)
        layers.release(i)
        log({"stage": "layerwise", "layer": i, **report})
        advance(job.ids[: job.n_train].size)
    if tied is not None:
        log({"stage": "evaluation", "step": 0, "best": True, **scores(layers.head(tied), dense, sliced, job)})


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def scores(head: Callable[[Tensor], Tensor], dense: Tensor, sliced: Tensor, job: Job) -> dict[str, Any]:
    """Divergence and loss by count of the held-out windows, from both streams behind the last layer; see `evaluate`."""
    kl: dict[str, list[float]] = {}
    nll: dict[str, list[float]] = {}
    base_nll = []
    for w in range(job.n_train, len(job.ids)):
        k, following = str(job.counts[w]), torch.from_numpy(job.ids[w, 1:])
        base, ours = (head(stream[w, :-1]).cpu() for stream in (dense, sliced))
        kl.setdefault(k, []).append(float(losses.kl(ours, base).mean()))
        nll.setdefault(k, []).append(float(losses.next_token(ours, following).mean()))
        base_nll.append(float(losses.next_token(base, following).mean()))
    means = {k: float(np.mean(values)) for k, values in kl.items()}
    return {
        "kl": means,
        "nll": {k: float(np.mean(values)) for k, values in nll.items()},
        "nll_dense": float(np.mean(base_nll)),
        "kl_mean": float(np.mean([*means.values()])),
    }


def _kept(layer: Layer, stored: Stored, settings: HealSettings) -> Stored:
    """The layer's tensors, those that do not train bit for bit as they came."""
    new = layer.stored()
    names = {"router": "router.weight", "gate": "gate", "up": "up", "down": "down"}
    chosen = {f: getattr(new if trained(name, settings.train) else stored, f) for f, name in names.items()}
    return Stored(**chosen)


def _streams(work: Path, first: int, layers: Layers, job: Job) -> tuple[Tensor, Tensor]:
    """Hidden states (n_window, n_context, d_model) of the dense and of the sliced model before layer `first`."""
    if first == 0:
        hidden = torch.empty(*job.ids.shape, layers.d_model)
        layers.embed(job.ids, hidden.flatten(0, 1))
        return hidden, hidden.clone()
    with np.load(work / f"state-{first - 1}.npz") as state:
        return torch.from_numpy(state["dense"]), torch.from_numpy(state["sliced"])


def _save(work: Path, i: int, stored: Stored, dense: Tensor, sliced: Tensor) -> None:
    """The streams first, then the layer that says it is finished; both by rename."""
    np.savez(work / "state.tmp.npz", dense=dense.numpy(), sliced=sliced.numpy())
    (work / "state.tmp.npz").replace(work / f"state-{i}.npz")
    stored.save(work / f"layer-{i}.npz")
    (work / f"state-{i - 1}.npz").unlink(missing_ok=True)


class Data:
    """x and target (n_window, n_context, d_model) of one layer, and how much each token counts.

    No token may own the fit: the weight of massive ones is cut, as in `moe2gguf.experts.slice_layer`. Nor may a count:
    few experts leave many times the error of many, so each window is divided by what `layer` leaves at its count.
    """

    def __init__(self, x: Tensor, target: Tensor, job: Job, layer: Layer) -> None:
        self.x, self.target, self.job = x, target, job
        energy = target.square().sum(-1)
        self.weight = (100 * energy.median() / energy.clamp_min(1e-30)).clamp(max=1)
        self.total = 1.0
        left = _by_count(layer, self, range(len(x)))
        least = max(max(left.values()) / LOUDEST, 1e-30)
        for w, k in enumerate(job.counts):
            self.weight[w] *= least / max(left[k], least)
        self.total = float((self.weight * energy).mean())

    @property
    def held_out(self) -> range:
        """The windows that are not trained on."""
        return range(self.job.n_train, len(self.x))

    def error(self, layer: Layer, w: int) -> Tensor:
        """Weighted squared error of one window, as a share of the target's mean."""
        left = (layer(self.x[w], self.job.counts[w]) - self.target[w]).square().sum(-1)
        return (self.weight[w] * left).mean() / self.total


def fit(layer: Layer, data: Data, settings: HealSettings, i: int) -> dict[str, Any]:
    """Train `layer` in place; the report has held-out errors (shares of the target's energy) before and after."""
    freeze(layer, settings.train)
    report: dict[str, Any] = {"error_before": _held_out(layer, data), "counts": _per_count(layer, data)}
    if layer.down.requires_grad:
        report["refit_strength"] = _solve_down(layer, data)
    best, report["error_refit"] = copy.deepcopy(layer.state_dict()), _held_out(layer, data)
    error = report["error_refit"]
    per_pass = -(-data.job.n_train // settings.batch)
    optimizer, schedule = optimizer_for(layer, settings, settings.layerwise * per_pass, settings.layer_lr)
    for step in range(settings.layerwise * per_pass):
        _step(layer, data, settings, optimizer, step, i)
        schedule.step()
        if (step + 1) % per_pass == 0 and (now := _held_out(layer, data)) < error:
            best, error = copy.deepcopy(layer.state_dict()), now
    layer.load_state_dict(best)
    return report | {"error_after": error, "counts_after": _per_count(layer, data)}


def _step(layer: Layer, data: Data, settings: HealSettings, optimizer: Any, step: int, i: int) -> None:
    optimizer.zero_grad()
    batch = batch_at(settings, data.job.n_train, step)
    for w in batch:
        loss = data.error(layer, int(w)) / len(batch)
        require_finite(loss, f"layer {i}, step {step}")
        loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in layer.parameters() if p.requires_grad], settings.clip)
    optimizer.step()


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def _held_out(layer: Layer, data: Data) -> float:
    layer.eval()
    return float(torch.stack([data.error(layer, w) for w in data.held_out]).mean())


def _per_count(layer: Layer, data: Data) -> dict[str, float]:
    """Held-out error at each count."""
    return {str(k): error for k, error in _by_count(layer, data, data.held_out).items()}


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def _by_count(layer: Layer, data: Data, span: range) -> dict[int, float]:
    """Mean error of these windows at each count."""
    layer.eval()
    found: dict[int, list[float]] = {}
    for w in span:
        found.setdefault(data.job.counts[w], []).append(float(data.error(layer, w)))
    return {k: sum(errors) / len(errors) for k, errors in found.items()}


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def _solve_down(layer: Layer, data: Data) -> float:
    """The closed form: the down projections that fit best over the training windows at their counts. Returns the ridge.

    Held-out windows choose it and are not solved on: they say afterwards which pass was best, and what it is worth.
    """
    n = data.job.n_train
    normals = []
    for span in (range(n), data.held_out):
        normal = Normal.empty(*layer.down.shape)
        for w in span:
            h = layer.masked(data.x[w], data.job.counts[w])
            normal.add(h, data.target[w] - h @ layer.down, data.weight[w])
        normals.append(normal.finished())
    train, held_out = normals
    strength, error = choose_ridge(train, held_out)
    if error < 1:
        layer.down += train.solve(strength)
    return strength
