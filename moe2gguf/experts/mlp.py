"""What one layer is made of: the dense MLP, the inputs it sees, and the experts and router that replace it.

Shapes: x (n_token, d_model) is the post-norm MLP input, h (n_token, d_ff) = silu(G x) * (U x); `down` is kept as
(d_ff, d_model), one row per neuron, so that the MLP is h @ down. Activations are made chunk by chunk and never kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe2gguf.experts.grouping import Groups
from moe2gguf.experts.hidden_states import Rows, chunks

Report = dict[str, Any]
"""What is found about a layer, JSON-ready; the keys are listed at `moe2gguf.experts.slice_layer.carve`."""


@dataclass(frozen=True)
class MLP:
    """The weights of one dense MLP, float32: gate, up and down, each (d_ff, d_model)."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def hidden(self, x: Tensor) -> Tensor:
        """(n_token, d_model) -> (n_token, d_ff)."""
        return torch.nn.functional.silu(x @ self.gate.T).mul_(x @ self.up.T)

    def __call__(self, x: Rows) -> Tensor:
        """(n_token, d_model) -> (n_token, d_model)."""
        return torch.cat([self.hidden(x[part]) @ self.down for part in chunks(len(x))])


@dataclass(frozen=True)
class Inputs:
    """What the layer sees, (n_token, d_model) each; read piece by piece.

    dense   the MLP's input in the dense model
    output  what the dense MLP makes of it
    sliced  its input in the model whose earlier layers are sliced already
    target  what the sliced MLP should add to that model's residual stream
    """

    dense: Rows
    output: Rows
    sliced: Rows
    target: Rows


@dataclass(frozen=True)
class Carved:
    """The sliced MLP: `groups` of neuron numbers, `router` (n_expert, d_model), `scale` (n_expert,), new weights.

    `report` holds what the user is shown, see `moe2gguf.experts.slice_layer.carve`.
    """

    mlp: MLP
    groups: Groups
    router: Tensor
    scale: Tensor
    report: Report = field(default_factory=dict)

    def weights(self, x: Tensor, k: int) -> Tensor:
        """(n_token, n_expert): renormalized top-k softmax times the amplification, zero where an expert does not run.

        llama.cpp's graph: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-graph.cpp#L2148-L2162
        """
        p = (x @ self.router.T).softmax(-1)
        top, chosen = p.topk(k, dim=-1)
        return torch.zeros_like(p).scatter_(1, chosen, top / top.sum(-1, keepdim=True)) * self.scale

    def masked(self, x: Tensor, k: int) -> Tensor:
        """(n_token, d_ff): hidden activations times the weight of their expert."""
        return self.mlp.hidden(x).mul_(self.weights(x, k)[:, owners(self.groups)])

    def __call__(self, x: Rows, k: int) -> Tensor:
        """(n_token, d_model) -> (n_token, d_model), as the file will compute it."""
        return torch.cat([self.masked(x[part], k) @ self.mlp.down for part in chunks(len(x))])


def owners(groups: Groups) -> Tensor:
    """(d_ff,): the expert each neuron belongs to."""
    owner = torch.empty(sum(map(len, groups)), dtype=torch.long, device=groups[0].device)
    for e, group in enumerate(groups):
        owner[group] = e
    return owner
