"""Balanced groups: which neurons share an expert.

A grouping returns `groups`, a list of n_expert sorted index tensors whose lengths differ by at most one; the first
n_shared of them are the always-on experts, made of the most important neurons. Nothing here keeps activations: the
input is pairwise similarities (d_ff, d_ff) and an importance per neuron (d_ff,).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Groups = list[Tensor]


def group_sizes(n_neuron: int, n_group: int) -> list[int]:
    """Sizes that sum to n_neuron and differ by at most one, the larger ones first."""
    return [len(part) for part in np.array_split(np.arange(n_neuron), n_group)]


def split(importance: Tensor, similarity: Tensor, sizes: Sequence[int], n_shared: int, seed: int) -> Groups:
    """The n_shared always-on experts by importance, the others by clustering.

    Always-on experts hold what matters for nearly every token: CMoE's shared experts
    (https://arxiv.org/abs/2502.04416, section 4.1), with output energy for importance.
    """
    order = importance.argsort(descending=True, stable=True)
    cut = sum(sizes[:n_shared])
    shared, rest = order[:cut].sort().values, order[cut:].sort().values
    groups = list(shared.split(list(sizes[:n_shared]))) if n_shared else []
    if len(rest) == 0:
        return groups
    label = cluster(similarity[rest][:, rest], sizes[n_shared:], seed)
    return groups + [rest[label == e] for e in range(len(sizes) - n_shared)]


def cluster(similarity: Tensor, sizes: Sequence[int], seed: int, n_iter: int = 30) -> Tensor:
    """Balanced spherical kernel k-means: similarity (m, m), symmetric -> labels (m,), label e used sizes[e] times.

    k-means++ seeding; then groups and cosine similarity to their means are updated in turn until nothing moves. With
    gate rows' inner products this is the clustering of MoEfication (https://arxiv.org/abs/2110.01786, section 3.2)
    and EMoE; with co-activation it is that of CMoE, on real contributions instead of 0/1 marks.
    """
    m, n = len(similarity), len(sizes)
    if n == 1:
        return torch.zeros(m, dtype=torch.long)
    norm = similarity.diagonal().clamp_min(1e-20).sqrt()
    kernel = similarity / norm[:, None] / norm[None]
    label = balanced_assign(kernel[:, _seeds(kernel, n, seed)], sizes)
    for _ in range(n_iter):
        member = torch.nn.functional.one_hot(label, n).to(kernel.dtype)
        closeness = kernel @ member
        score = closeness / (member * closeness).sum(0).clamp_min(1e-12).sqrt()
        new = balanced_assign(score, sizes)
        if torch.equal(new, label):
            break
        label = new
    return label


def _seeds(kernel: Tensor, n: int, seed: int) -> list[int]:
    """k-means++: each next center is drawn far from those already chosen."""
    generator = torch.Generator("cpu").manual_seed(seed)  # on the processor, whatever the device: the same numbers
    centers = [int(torch.randint(len(kernel), (1,), generator=generator, device="cpu"))]
    closest = kernel[centers[0]].clone()
    for _ in range(n - 1):
        far = (1 - closest).clamp_min(0) ** 2
        far[centers] = 0
        if float(far.sum()) <= 0:  # all neurons alike: any that is left will do
            far = torch.ones_like(far)
            far[centers] = 0
        centers.append(int(torch.multinomial((far / far.sum()).cpu(), 1, generator=generator)))
        closest = torch.maximum(closest, kernel[centers[-1]])
    return centers


def balanced_assign(score: Tensor, sizes: Sequence[int]) -> Tensor:
    """Labels (m,) near the best total of score (m, n), label e used exactly sizes[e] times (sum(sizes) = m).

    Greedy by regret (best minus second best), then the best exchange of two neurons until none improves. A stand-in
    for the assignment problem of CMoE, whose exact solution is cubic in m.

    Example: scores [[3, 0], [2, 1], [5, 0], [4, 0]] and sizes [2, 2] give labels [1, 1, 0, 0].
    """
    values = score.double().cpu().numpy()  # many small steps: numpy does each in microseconds
    m, n = values.shape
    top = np.sort(values, axis=1)[:, -min(2, n) :]
    room, label = list(sizes), np.empty(m, np.int64)
    preference = np.argsort(-values, axis=1, kind="stable").tolist()
    for i in np.argsort(top[:, 0] - top[:, -1], kind="stable").tolist():
        e = next(e for e in preference[i] if room[e])
        room[e] -= 1
        label[i] = e
    starts = np.cumsum([0, *sizes[:-1]])
    for _ in range(20 * m):
        by_group = np.argsort(label, kind="stable")
        gain = values[by_group] - values[by_group, label[by_group]][:, None]  # of moving a neuron to each group
        best = np.maximum.reduceat(gain, starts, axis=0)
        exchange = np.triu(best + best.T, 1)
        e, f = divmod(int(exchange.argmax()), n)
        if exchange[e, f] <= 1e-12:
            break
        one = by_group[starts[e] : starts[e] + sizes[e]][gain[starts[e] : starts[e] + sizes[e], f].argmax()]
        two = by_group[starts[f] : starts[f] + sizes[f]][gain[starts[f] : starts[f] + sizes[f], e].argmax()]
        label[one], label[two] = f, e
    return torch.from_numpy(label).to(score.device)
