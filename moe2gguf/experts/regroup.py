"""Groups that know their router: each neuron moves to the expert that runs when the neuron contributes.

A clustering puts together what fires together, but which experts run is up to a linear router, and which neurons
always run was decided before there was one. So both are found in turn, as k-means finds centers and labels: the router
for the groups, then the groups for the router. An always-on expert runs for every token, so the neurons that get there
are those that lose most by being routed, not those with the most energy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe2gguf.experts.grouping import Groups, balanced_assign
from moe2gguf.experts.hidden_states import Rows, chunks
from moe2gguf.experts.mlp import MLP

ROUNDS = 2
"""The first brings most of it, a third next to nothing (docs/log/experts.md)."""

TOKENS = 8192
"""At least so many, spread over the text, are looked at: enough (docs/log/experts.md)."""


def regrouped(mlp: MLP, x: Rows, groups: Groups, router: Tensor, n_shared: int, k: int, pinned: Tensor) -> Groups:
    """Groups of the same sizes that keep the most energy when `router` (n_expert, d_model) picks `k` for inputs x.

    x (n_token, d_model). The first `n_shared` groups always run; what is `pinned` (d_ff,) above 0 is there, while there
    is room, the highest first.
    """
    gained, sizes = kept_by(mlp, x, router, k), [len(group) for group in groups]
    if not n_shared:
        return _groups(balanced_assign(gained, sizes))
    always = gained[:, 0] + pinned * gained.sum()
    score = torch.cat([always[:, None], gained[:, n_shared:]], 1)
    shared, *routed = _groups(balanced_assign(score, [sum(sizes[:n_shared]), *sizes[n_shared:]]))
    return [*shared.split(sizes[:n_shared]), *routed]


def kept_by(mlp: MLP, x: Rows, router: Tensor, k: int) -> Tensor:
    """(d_ff, n_expert): the energy that a neuron keeps in each expert, the sum of a_i^2 with a_i = |h_i| |d_i|."""
    size = mlp.down.square().sum(1)
    gained = torch.zeros(len(size), len(router))
    for part in chunks(len(x)):
        rows = x[part]
        chosen = (rows @ router.T).topk(k, dim=-1).indices
        runs = torch.zeros(len(rows), len(router)).scatter_(1, chosen, 1.0)
        gained.addmm_(mlp.hidden(rows).square_().T, runs)
    return gained * size[:, None]


def _groups(label: Tensor) -> Groups:
    return [(label == e).nonzero()[:, 0] for e in range(int(label.max()) + 1)]
