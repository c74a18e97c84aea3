"""Other methods in our protocol, for scripts/bench quality: written from their papers, on the same dense activations.

Slicers take the place of `moe2gguf.experts.slice_layer.slice_layer` and give one layer's experts; FLAP gives masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe2gguf.experts import grouping, routing
from moe2gguf.experts.grouping import balanced_assign, group_sizes
from moe2gguf.experts.hidden_states import Rows, chunks
from moe2gguf.experts.layer import LayerReport
from moe2gguf.experts.mlp import MLP, Groups, LayerInputs, Router, SlicedLayer
from moe2gguf.experts.slice_layer import slice_groups
from moe2gguf.experts.stats import largest_logit, router_moments
from moe2gguf.spec import Slicing

MARKED = 10
"""Neurons that CMoE marks per token (K_a)."""

VARIED = 0.6
"""ExpertWeaver's tau: the coefficient of variation above which a neuron counts as specialized."""


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1."""
    return torch.nn.functional.normalize(rows, dim=1)


@dataclass(frozen=True)
class CMoE(SlicedLayer):
    """A layer with CMoE's router: not linear, so no GGUF file has it.

    `score_mlp` has the rows of each routed expert's representative neuron, at length 1.
    """

    score_mlp: MLP = field(kw_only=True)

    def expert_weights(self, x: Tensor, k: int) -> Tensor:
        """1 for the shared experts and for those whose representative neuron is largest."""
        n_routed = len(self.score_mlp.gate)
        n_shared = len(self.groups) - n_routed
        chosen = self.score_mlp.activations(x).abs().topk(k - n_shared, dim=1).indices + n_shared
        weights = torch.zeros(len(x), len(self.groups))
        weights[:, :n_shared] = 1
        return weights.scatter_(1, chosen, 1.0)


def cmoe_split(mlp: MLP, x: Rows, n_expert: int, n_shared: int) -> tuple[Groups, Tensor]:
    """CMoE's groups, and a representative neuron for each routed one (https://arxiv.org/abs/2502.04416, section 4).

    Every token marks its largest |h|, with x and the rows of gate and up at length 1 as in the authors' code. Shared
    are the neurons marked most often; the others join, one assignment, whichever of the next most often marked
    columns is nearest (of 0/1 columns: count + count - 2 marked together), to groups of equal size.
    """
    d_ff = len(mlp.gate)
    normed, together = MLP(unit(mlp.gate), unit(mlp.up), mlp.down), torch.zeros(d_ff, d_ff)
    for part in chunks(len(x)):
        top = normed.activations(unit(x[part])).abs_().topk(MARKED, 1).indices
        marks = torch.zeros(len(top), d_ff).scatter_(1, top, 1.0)
        together.addmm_(marks.T, marks)
    count, sizes = together.diagonal(), group_sizes(d_ff, n_expert)
    order = count.argsort(descending=True, stable=True)
    cut = sum(sizes[:n_shared])
    shared, rest = order[:cut], order[cut:]
    gram, often = together[rest][:, rest], count[rest]
    n_routed = n_expert - n_shared
    distance = often[:, None] + often[None, :n_routed] - 2 * gram[:, :n_routed]
    label = balanced_assign(-distance, sizes[n_shared:])
    groups, representatives = list(shared.split(sizes[:n_shared])) if n_shared else [], []
    for e in range(n_routed):
        members = (label == e).nonzero()[:, 0]
        from_center = often[members] - 2 * gram[members][:, members].mean(1)  # |c_i - mean|^2, less a constant
        representatives.append(rest[members[from_center.argmin()]])
        groups.append(rest[members])
    return groups, torch.stack(representatives)


def cmoe(mlp: MLP, inputs: LayerInputs, slicing: Slicing, n_shared: int) -> SlicedLayer:
    """CMoE, training-free: its split, its representative neurons for a router, weights 1."""
    groups, neurons = cmoe_split(mlp, inputs.streams[0].x, slicing.n_expert, n_shared)
    score = MLP(unit(mlp.gate[neurons]), unit(mlp.up[neurons]), mlp.down[neurons])
    zero = torch.zeros(slicing.n_expert, mlp.gate.shape[1])
    return CMoE(mlp, groups, Router(zero), torch.ones(slicing.n_expert), score_mlp=score)


def expert_weaver(mlp: MLP, inputs: LayerInputs, slicing: Slicing, n_context: int) -> SlicedLayer:
    """ExpertWeaver's rule for how many experts are shared, and its router of mean gate rows, on CMoE's split.

    https://arxiv.org/abs/2602.15521: S = round((0.7 - 0.5 r) n), r the share of neurons whose mean activation varies
    from sample to sample by more than tau of its mean. Its own split ranks by |silu(g x)|, which did worse here; on
    CMoE's split the rule has been tested before. Capped at k: more would not fit the budget.
    """
    n, k = slicing.n_expert, slicing.n_expert_used
    n_shared = min(weaver_count(mlp, inputs.streams[0].x, n, n_context), k)
    groups, _ = cmoe_split(mlp, inputs.streams[0].x, n, n_shared)
    router = mean_router(mlp, inputs.streams[0].x, groups, n_shared)
    return SlicedLayer(mlp, groups, Router(router), torch.full((n,), float(k)), _no_report(n, n_shared))


def random_groups(mlp: MLP, inputs: LayerInputs, slicing: Slicing) -> SlicedLayer:
    """LLaMA-MoE's split (https://arxiv.org/abs/2406.16554), neurons dealt out at random; our router, all routed."""
    sizes = group_sizes(len(mlp.gate), slicing.n_expert)
    shuffled = torch.randperm(len(mlp.gate), generator=torch.Generator().manual_seed(slicing.method.seed))
    groups = [part.sort().values for part in shuffled.split(sizes)]
    return slice_groups(mlp, inputs, slicing, groups, 0)


def emoe(mlp: MLP, inputs: LayerInputs, slicing: Slicing) -> SlicedLayer:
    """EMoE (https://arxiv.org/abs/2310.10908): balanced k-means on gate rows at length 1, which is MoEfication's split
    (https://arxiv.org/abs/2110.01786, section 3.2), and a router of mean gate rows.
    """
    n, k = slicing.n_expert, slicing.n_expert_used
    label = grouping.cluster(mlp.gate, group_sizes(len(mlp.gate), n), slicing.method.seed)
    groups = [(label == e).nonzero()[:, 0] for e in range(n)]
    router = mean_router(mlp, inputs.streams[0].x, groups, 0)
    return SlicedLayer(mlp, groups, Router(router), torch.full((n,), float(k)), _no_report(n, 0))


def gate_mean(gate: Tensor, groups: Groups) -> Tensor:
    """Rows (n, d_model): the mean gate row of each group; gate (d_ff, d_model)."""
    return torch.stack([gate[group].mean(0) for group in groups])


def mean_router(mlp: MLP, x: Rows, groups: Groups, n_shared: int) -> Tensor:
    """The router (n_expert, d_model) of mean gate rows, fitted to inputs x (n_token, d_model)."""
    rows = routing.center_rows(gate_mean(mlp.gate, groups[n_shared:]))
    v = routing.constant_direction(router_moments(x, torch.empty(len(x), 0)))
    return routing.order_only(rows, v, n_shared, largest_logit(x, rows))


def weaver_count(mlp: MLP, x: Rows, n_expert: int, n_context: int) -> int:
    """ExpertWeaver's number of shared experts; a sample is one window of n_context tokens."""
    means = [torch.nn.functional.silu(x[part] @ mlp.gate.T).mean(0).abs() for part in chunks(len(x), n_context)]
    activation = torch.stack(means)
    variation = activation.std(0) / activation.mean(0).clamp_min(1e-12)
    specialized = float((variation > VARIED).float().mean())
    return round(min(0.7, max(0.2, 0.7 - 0.5 * specialized)) * n_expert)


def _no_report(n_expert: int, n_shared: int) -> LayerReport:
    return LayerReport(n_shared, [0.0] * n_expert, 0.0, [0.0] * n_expert)


@dataclass(frozen=True)
class Fluctuation:
    """FLAP's statistics of one layer: score and mean of every neuron, each (d_ff,), and its row of `down`."""

    score: Tensor
    mean: Tensor
    down: Tensor


def fluctuation(mlp: MLP, x: Rows) -> Fluctuation:
    """FLAP (https://arxiv.org/abs/2312.11983, equation 4): var(h_i) |d_i|^2, and the mean of h_i for the bias."""
    total, square = torch.zeros(len(mlp.gate), dtype=torch.float64), torch.zeros(len(mlp.gate), dtype=torch.float64)
    for part in chunks(len(x)):
        h = mlp.activations(x[part]).double()
        total += h.sum(0)
        square += h.square().sum(0)
    mean = total / len(x)
    variance = (square - len(x) * mean.square()) / (len(x) - 1)
    return Fluctuation((variance * mlp.down.double().square().sum(1)).float(), mean.float(), mlp.down.clone())


def flap_uniform(layers: Sequence[Fluctuation], share: float) -> list[Tensor]:
    """Keep the same share of every layer (the paper's UL-UM): masks (d_ff,)."""
    masks = []
    for layer in layers:
        keep = torch.zeros(len(layer.score), dtype=torch.bool)
        keep[layer.score.topk(round(share * len(keep))).indices] = True
        masks.append(keep)
    return masks


def flap_standard(layers: Sequence[Fluctuation], share: float) -> list[Tensor]:
    """Scores standardized within each layer, one threshold for all (the paper's AL-AM, on the MLPs only): masks."""
    scores = torch.stack([(layer.score - layer.score.mean()) / layer.score.std() for layer in layers])
    threshold = scores.flatten().sort(descending=True).values[round(share * scores.numel()) - 1]
    return [row >= threshold for row in scores]


def flap_bias(layer: Fluctuation, keep: Tensor) -> Tensor:
    """(d_model,): what the pruned neurons give on average (the paper's baseline bias compensation)."""
    return (layer.mean * ~keep) @ layer.down
