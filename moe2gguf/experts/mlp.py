"""One layer in torch: the dense MLP, the inputs it is sliced on, and the experts and router that replace it.

Shapes: x (n_token, d_model) is the MLP's input, behind its norm; h (n_token, d_ff) = silu(G x) * (U x) are the neurons'
activations; `down` is kept as (d_ff, d_model), one row per neuron, so that the MLP's output is h @ down.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe2gguf.experts.hidden_states import LazyRows, Rows, chunks
from moe2gguf.experts.layer import LayerExperts, LayerReport
from moe2gguf.experts.slicing import PADDING
from moe2gguf.graphs import MIXTRAL, Graph

Groups = list[Tensor]
"""For each expert the sorted numbers of its neurons."""


@dataclass(frozen=True)
class MLP:
    """The weights of one dense MLP, float32: gate, up and down, each (d_ff, d_model)."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def activations(self, x: Tensor) -> Tensor:
        """Return the activations of inputs x (n_token, d_model): (n_token, d_ff)."""
        return torch.nn.functional.silu(x @ self.gate.T).mul_(x @ self.up.T)

    def __call__(self, x: Rows) -> Tensor:
        """Return the output of inputs x (n_token, d_model): (n_token, d_model)."""
        return torch.cat([self.activations(x[part]) @ self.down for part in chunks(len(x))])


@dataclass(frozen=True)
class Stream:
    """What the layer sees in the model whose earlier layers are sliced already, k experts used; read piece by piece.

    x        (n_token, d_model): the MLP's input
    neurons  (n_token, d_ff): the activations that it makes
    target   (n_token, d_model): what the sliced MLP should add to that model's residual stream; no rows where nothing
             is fitted to it (`moe2gguf.spec.Method.needs_target`)
    """

    k: int
    x: Rows
    neurons: Rows
    target: Rows


@dataclass(frozen=True)
class LayerInputs:
    """What the layer sees on the calibration text, at each count of used experts that is fitted."""

    streams: tuple[Stream, ...]

    def stream(self, k: int) -> Stream:
        """The stream whose count is closest to k."""
        return min(self.streams, key=lambda stream: abs(stream.k - k))


def find_probabilities(logits: Tensor, graph: Graph) -> Tensor:
    """Return what a target graph makes of a router's logits (n_token, n_expert): sigmoids, or a softmax."""
    return logits.sigmoid() if graph.gating == "sigmoid" else logits.softmax(-1)


def choose_experts(p: Tensor, order: Tensor, k: int, graph: Graph) -> tuple[Tensor, Tensor]:
    """Return the weights of the k experts with the largest `order`, and their numbers, (n_token, k) each.

    p and `order` are (n_token, n_expert): what a target graph weighs and what it chooses by.

    llama.cpp's graph: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-graph.cpp#L2059-L2165
    """
    chosen = order.topk(k, dim=-1).indices
    top = p.gather(-1, chosen)
    if graph.gating == "renormalized":
        top = top / top.sum(-1, keepdim=True)
    return top * graph.weight_scale, chosen


@dataclass(frozen=True)
class Router:
    """What llama.cpp computes to choose and to weigh experts.

    rows       (n_expert, d_model)
    bias       (n_expert,) added to the probabilities when experts are chosen
    graph      the target graph
    in_shared  the first so many experts are the graph's own shared expert: they run for every token, with weight 1
    """

    rows: Tensor
    bias: Tensor | float = 0.0
    graph: Graph = MIXTRAL
    in_shared: int = 0

    def logits(self, x: Tensor) -> Tensor:
        """Return (n_token, n_expert) for inputs x (n_token, d_model)."""
        return x @ self.rows.T

    def probabilities(self, x: Tensor) -> Tensor:
        """Return (n_token, n_expert): of the softmax, or sigmoids; 1 for a shared expert of the graph's own."""
        logits = self.logits(x)
        routed = logits[:, self.in_shared :]
        return torch.cat([torch.ones_like(logits[:, : self.in_shared]), find_probabilities(routed, self.graph)], 1)

    def rank(self, p: Tensor) -> Tensor:
        """Return what experts are chosen by (n_token, n_expert), from their probabilities; always the shared ones."""
        order = p + self.bias
        order[:, : self.in_shared] = torch.inf
        return order

    def prefer(self, x: Tensor) -> Tensor:
        """Return what experts are ordered by (n_token, n_expert) for inputs x (n_token, d_model)."""
        return self.logits(x) if self.graph.gating == "renormalized" else self.rank(self.probabilities(x))

    def weigh(self, x: Tensor, k: int) -> Tensor:
        """Return (n_token, n_expert): the weight of each expert when k are used, zero where one does not run."""
        p = self.probabilities(x)
        top, chosen = choose_experts(p, self.rank(p), k, self.graph)
        top = torch.where(chosen < self.in_shared, 1.0, top)
        return torch.zeros_like(p).scatter_(1, chosen, top)


@dataclass(frozen=True)
class SlicedLayer:
    """The sliced MLP: its weights, `groups` of neurons, router, output `scale` (n_expert,)."""

    mlp: MLP
    groups: Groups
    router: Router
    scale: Tensor
    report: LayerReport | None = None

    def expert_weights(self, x: Tensor, k: int) -> Tensor:
        """Return (n_token, n_expert): the router's weight times the scale, zero where an expert does not run."""
        return self.router.weigh(x, k) * self.scale

    def weigh_neurons(self, x: Tensor, h: Tensor, k: int) -> Tensor:
        """Return (n_token, d_ff): the activations h of inputs x, each times the weight of its expert."""
        return h * self.expert_weights(x, k)[:, experts_of_neurons(self.groups)]

    def __call__(self, x: Rows, k: int, neurons: Rows | None = None) -> Tensor:
        """Return the output (n_token, d_model) of inputs x, as the file will compute it with k experts used.

        The activations are computed unless they are given as `neurons` (n_token, d_ff).
        """
        h = LazyRows(len(x), lambda part: self.mlp.activations(x[part])) if neurons is None else neurons
        return torch.cat([self.weigh_neurons(x[part], h[part], k) @ self.mlp.down for part in chunks(len(x))])

    def to_experts(self, d_expert: int, *, new_down: bool) -> LayerExperts:
        """Return the layer as numpy arrays, padded to `d_expert`; with its down projection if that is a new one."""
        order = np.full((len(self.groups), d_expert), PADDING, np.int64)
        for row, group in zip(order, self.groups, strict=True):
            row[: len(group)] = group.cpu().numpy()
        down = self.mlp.down.T.contiguous().cpu().numpy() if new_down else None
        router, scale = self.router.rows.cpu().numpy(), self.scale.cpu().numpy()
        bias = [self.router.bias.cpu().numpy()] if isinstance(self.router.bias, Tensor) else []
        return LayerExperts(order, router, scale, down, self.report, *bias)


def experts_of_neurons(groups: Groups) -> Tensor:
    """Return (d_ff,): the expert that each neuron belongs to."""
    expert = torch.empty(sum(map(len, groups)), dtype=torch.long, device=groups[0].device)
    for e, group in enumerate(groups):
        expert[group] = e
    return expert
