"""Layer by layer: each layer's experts learn to bring the hidden states back to the dense model's; one is in memory.

The hidden states of two models are computed side by side, as in calibration: those of the dense model, and those of the
healed layers so far. Every window of text keeps one count of experts used through all layers, so later layers learn to
mend what earlier ones lost at that count. First the down projections are solved in closed form over all counts at once
(`moe2gguf.experts.refit`), then everything that trains follows by gradient; the pass that is best on held-out windows
stays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe2gguf.experts.forward import Block, Layers
from moe2gguf.experts.heal.log import LayerLine, ScoreLine
from moe2gguf.experts.heal.losses import kl_divergence, next_token_loss
from moe2gguf.experts.heal.moe_layer import MoELayer
from moe2gguf.experts.heal.optimize import freeze, is_trained, make_optimizer, require_finite
from moe2gguf.experts.heal.router import find_scale
from moe2gguf.experts.heal.settings import HealSettings, Windows, draw_batch, draw_used
from moe2gguf.experts.heal.work import ExpertWeights, HealRun, WorkFolder
from moe2gguf.experts.refit import Normal, choose_ridge
from moe2gguf.experts.stats import cap_massive_tokens
from moe2gguf.graphs import Graph

MAX_RATIO = 100
"""How much more than the worst count another may weigh: with all experts used there may be no error at all."""


@dataclass(frozen=True)
class CountedWindows:
    """Windows, those to train on first; `counts` (n_window,) is how many experts each one uses."""

    ids: Windows
    counts: list[int]
    n_train: int

    @classmethod
    def draw(cls, run: HealRun) -> CountedWindows:
        """Training windows at counts drawn from the range, held-out windows once at every count to evaluate at."""
        used = run.settings.evaluation.used
        counts = [draw_used(run.settings.training, w) for w in range(len(run.ids))]
        counts += [k for k in used for _ in run.held_out]
        return cls(np.concatenate([run.ids, *[run.held_out] * len(used)]), counts, len(run.ids))

    @property
    def held_out(self) -> range:
        """The windows that are not trained on."""
        return range(self.n_train, len(self.ids))


@dataclass(frozen=True)
class PairedStates:
    """Hidden states (n_window, n_context, d_model) of the dense model and of the healed one; they change in place."""

    dense: Tensor
    healed: Tensor

    @classmethod
    def before(cls, i: int, layers: Layers, windows: CountedWindows, work: WorkFolder) -> PairedStates:
        """Those before layer `i`: the embeddings, or what was saved behind the layer before."""
        if i:
            states = work.load_states(i - 1)
            return cls(torch.from_numpy(states["dense"]), torch.from_numpy(states["sliced"]))
        hidden = torch.empty(*windows.ids.shape, layers.d_model)
        layers.embed(windows.ids, hidden.flatten(0, 1))
        return cls(hidden, hidden.clone())

    def flatten(self) -> tuple[Tensor, Tensor]:
        """Both as (n_token, d_model), which share their memory with them."""
        return self.dense.flatten(0, 1), self.healed.flatten(0, 1)

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
    def enter_mlp(self, block: Block) -> tuple[Tensor, Tensor]:
        """(input of the healed MLP, what it should give), once both models' attention is added; adds the dense MLP."""
        y = block.mlp(block.mlp_input(self.dense.flatten(0, 1)))
        self.dense.add_(y.reshape(self.dense.shape).to(self.dense.device))
        x = block.mlp_input(self.healed.flatten(0, 1))[:].reshape(self.dense.shape)
        return x, (self.dense - self.healed).to(x.device)

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
    def leave_mlp(self, layer: Callable[..., Tensor], x: Tensor, windows: CountedWindows) -> None:
        """Add what `layer` gives on its input x (n_window, n_context, d_model) and each window's count of experts."""
        for w, k in enumerate(windows.counts):
            self.healed[w] += layer(x[w], k).to(self.healed.device)


def heal_layers(
    layers: Layers, read_layer: Callable[[int], ExpertWeights], run: HealRun, graph: Graph, n_dense: int
) -> None:
    """Save every healed layer in `run.work`; goes on after the last finished one.

    `layers` is the dense model, `read_layer` reads a layer of the sliced one, made for `graph`; its first `n_dense`
    layers have no experts and stay as they are. Tensors that do not train are saved as they were. Where no other stage
    follows, the held-out text is scored at the end.

    Raises:
        HealError: an activation or a weight is not finite; the layer and step are named.
    """
    windows = CountedWindows.draw(run)
    first = run.work.find_first_layer(range(n_dense, len(layers)))
    states = PairedStates.before(first, layers, windows, run.work)
    with run.progress("layers", run.ids.size * len(layers)) as advance:
        advance(run.ids.size * first)
        for i, block in layers.attend_blocks(states.flatten(), windows.ids.shape[1], first):
            x, target = states.enter_mlp(block)
            if i < n_dense:
                states.leave_mlp(lambda x, _, mlp=block.mlp: mlp(x), x, windows)
                advance(run.ids.size)
                continue
            require_finite(target, f"layer {i}, before its first step")
            weights = read_layer(i)
            scale = find_scale(torch.from_numpy(weights.router).to(x.device), x[0])
            layer = MoELayer(weights, scale, graph).to(x.device)
            line = train_layer(layer, LayerData(x, target, windows, layer), run.settings, i)
            states.leave_mlp(layer, x, windows)
            arrays = {"dense": states.dense.numpy(), "sliced": states.healed.numpy()}
            run.work.save_layer(i, keep_frozen(layer, weights, run.settings.training.parts), arrays)
            run.log(line)
            advance(run.ids.size)
    if not run.settings.training.steps:
        run.log(score_states(layers.head(), states, windows))


def keep_frozen(layer: MoELayer, before: ExpertWeights, parts: Iterable[str]) -> ExpertWeights:
    """The layer's tensors; those that do not train are bit for bit the ones `before`."""
    after, names = layer.to_weights(), {"router": "router.weight"}
    names |= {f"shared_{name}": name for name in ("gate", "up", "down")}
    chosen = {
        field.name: getattr(after if is_trained(names.get(field.name, field.name), parts) else before, field.name)
        for field in fields(ExpertWeights)
    }
    return ExpertWeights(**chosen)


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def score_states(head: Callable[[Tensor], Tensor], states: PairedStates, windows: CountedWindows) -> ScoreLine:
    """The scores of the held-out windows, from the hidden states behind the last layer; `head` makes logits of them."""
    kl: dict[str, list[float]] = {}
    nll: dict[str, list[float]] = {}
    nll_dense = []
    for w in windows.held_out:
        k, following = str(windows.counts[w]), torch.from_numpy(windows.ids[w, 1:])
        dense, healed = (head(hidden[w, :-1]).cpu() for hidden in (states.dense, states.healed))
        kl.setdefault(k, []).append(float(kl_divergence(healed, dense).mean()))
        nll.setdefault(k, []).append(float(next_token_loss(healed, following).mean()))
        nll_dense.append(float(next_token_loss(dense, following).mean()))
    kl_means, nll_means = ({k: float(np.mean(values)) for k, values in found.items()} for found in (kl, nll))
    return ScoreLine(0, True, kl_means, nll_means, float(np.mean(nll_dense)))


class LayerData:
    """x and target (n_window, n_context, d_model) of one layer, and how much each token counts (`weight`).

    No token may dominate the fit: the weight of massive ones is cut. Nor may a count: few experts leave many times the
    error of many, so each window is divided by the error of its count.
    """

    def __init__(self, x: Tensor, target: Tensor, windows: CountedWindows, layer: MoELayer) -> None:
        self.x, self.target, self.windows = x, target, windows
        energy = target.square().sum(-1)
        self.weight = cap_massive_tokens(energy)
        self.total = 1.0
        left = find_errors(layer, self, range(len(x)))
        least = max(max(left.values()) / MAX_RATIO, 1e-30)
        for w, k in enumerate(windows.counts):
            self.weight[w] *= least / max(left[str(k)], least)
        self.total = float((self.weight * energy).mean())

    def error(self, layer: MoELayer, w: int) -> Tensor:
        """Weighted squared error of one window, as a share of the target's mean."""
        left = (layer(self.x[w], self.windows.counts[w]) - self.target[w]).square().sum(-1)
        return (self.weight[w] * left).mean() / self.total


def train_layer(layer: MoELayer, data: LayerData, settings: HealSettings, i: int) -> LayerLine:
    """Train layer `i` in place: the closed form, then passes by gradient, of which the best stays."""
    training = settings.training
    freeze(layer, training.parts)
    error_before, counts = held_out_error(layer, data), find_errors(layer, data, data.windows.held_out)
    strength = solve_down(layer, data) if layer.down.requires_grad else None
    best, error = copy.deepcopy(layer.state_dict()), held_out_error(layer, data)
    error_refit = error
    n_train = data.windows.n_train
    per_pass = -(-n_train // training.batch)
    n_step = training.layerwise * per_pass
    optimizer, schedule = make_optimizer(layer, settings.optimizer, n_step, settings.optimizer.layer_lr)
    for step in range(n_step):
        batch = draw_batch(training, n_train, step)
        _step(layer, data, batch, optimizer, settings.optimizer.clip, f"layer {i}, step {step}")
        schedule.step()
        if (step + 1) % per_pass == 0 and (now := held_out_error(layer, data)) < error:
            best, error = copy.deepcopy(layer.state_dict()), now
    layer.load_state_dict(best)
    counts_after = find_errors(layer, data, data.windows.held_out)
    return LayerLine(i, error_before, counts, strength, error_refit, error, counts_after)


def _step(layer: MoELayer, data: LayerData, batch: Any, optimizer: Any, clip: float, where: str) -> None:
    """One step on the windows `batch`, whose gradients add up."""
    layer.train()
    optimizer.zero_grad()
    for w in batch:
        loss = data.error(layer, int(w)) / len(batch)
        require_finite(loss, where)
        loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in layer.parameters() if p.requires_grad], clip)
    optimizer.step()


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def held_out_error(layer: MoELayer, data: LayerData) -> float:
    """Mean error of the held-out windows."""
    layer.eval()
    return float(torch.stack([data.error(layer, w) for w in data.windows.held_out]).mean())


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def find_errors(layer: MoELayer, data: LayerData, span: range) -> dict[str, float]:
    """Mean error of these windows by count of experts used."""
    layer.eval()
    found: dict[str, list[float]] = {}
    for w in span:
        found.setdefault(str(data.windows.counts[w]), []).append(float(data.error(layer, w)))
    return {k: sum(errors) / len(errors) for k, errors in found.items()}


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def solve_down(layer: MoELayer, data: LayerData) -> float:
    """The closed form: the down projections that fit best over the training windows at their counts. Returns the ridge.

    Held-out windows choose the ridge and are not solved on: afterwards they tell which pass was best.
    """
    normals = []
    for span in (range(data.windows.n_train), data.windows.held_out):
        normal = Normal.empty(*layer.down.shape)
        for w in span:
            h = layer.activations(data.x[w], data.windows.counts[w])
            normal.add(h, data.target[w] - h @ layer.down, data.weight[w])
        normals.append(normal.finished())
    train, held_out = normals
    strength, error = choose_ridge(train, held_out)
    if error < 1:
        layer.down += train.solve(strength)
    return strength
