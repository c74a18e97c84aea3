"""One layer in torch: the dense MLP, the inputs it is sliced on, and the experts and router that replace it.

Shapes: x (n_token, d_model) is the MLP's input, behind its norm; h (n_token, d_ff) = silu(G x) * (U x) are the neurons'
activations; `down` is kept as (d_ff, d_model), one row per neuron, so that the MLP's output is h @ down. Activations
are computed chunk by chunk and never kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe2gguf.experts.hidden_states import Rows, chunks
from moe2gguf.experts.layer import LayerExperts, LayerReport
from moe2gguf.experts.slicing import PADDING

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
class LayerInputs:
    """What the layer sees on the calibration text, (n_token, d_model) each; read piece by piece.

    dense   the MLP's input in the dense model
    output  what the dense MLP makes of it
    sliced  the MLP's input in the model whose earlier layers are sliced already
    target  what the sliced MLP should add to that model's residual stream
    """

    dense: Rows
    output: Rows
    sliced: Rows
    target: Rows


@dataclass(frozen=True)
class SlicedLayer:
    """The sliced MLP: its weights, `groups` of neurons, `router` (n_expert, d_model), output `scale` (n_expert,)."""

    mlp: MLP
    groups: Groups
    router: Tensor
    scale: Tensor
    report: LayerReport | None = None

    def expert_weights(self, x: Tensor, k: int) -> Tensor:
        """Return (n_token, n_expert): renormalized top-k softmax times the scale, zero where an expert does not run.

        llama.cpp's graph: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-graph.cpp#L2148-L2162
        """
        p = (x @ self.router.T).softmax(-1)
        top, chosen = p.topk(k, dim=-1)
        return torch.zeros_like(p).scatter_(1, chosen, top / top.sum(-1, keepdim=True)) * self.scale

    def weighted_activations(self, x: Tensor, k: int) -> Tensor:
        """Return (n_token, d_ff): each neuron's activation times the weight of its expert."""
        return self.mlp.activations(x).mul_(self.expert_weights(x, k)[:, experts_of_neurons(self.groups)])

    def __call__(self, x: Rows, k: int) -> Tensor:
        """Return the output (n_token, d_model) of inputs x, as the file will compute it with k experts used."""
        return torch.cat([self.weighted_activations(x[part], k) @ self.mlp.down for part in chunks(len(x))])

    def to_experts(self, d_expert: int, *, new_down: bool) -> LayerExperts:
        """Return the layer as numpy arrays, padded to `d_expert`; with its down projection if that is a new one."""
        order = np.full((len(self.groups), d_expert), PADDING, np.int64)
        for row, group in zip(order, self.groups, strict=True):
            row[: len(group)] = group.cpu().numpy()
        down = self.mlp.down.T.contiguous().cpu().numpy() if new_down else None
        return LayerExperts(order, self.router.cpu().numpy(), self.scale.cpu().numpy(), down, self.report)


def experts_of_neurons(groups: Groups) -> Tensor:
    """Return (d_ff,): the expert that each neuron belongs to."""
    expert = torch.empty(sum(map(len, groups)), dtype=torch.long, device=groups[0].device)
    for e, group in enumerate(groups):
        expert[group] = e
    return expert
