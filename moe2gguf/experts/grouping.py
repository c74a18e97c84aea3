"""Balanced groups: which neurons share an expert.

A grouping is a list of n_expert sorted index tensors whose lengths differ by at most one; the first n_shared of them
are the shared experts. Nothing here sees a token: a first grouping is made from how neurons contribute together, a
later one from the energy that each neuron would keep in each expert (`moe2gguf.experts.stats`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe2gguf.experts.mlp import Groups


def group_sizes(n_neuron: int, n_group: int) -> list[int]:
    """Return sizes that sum to n_neuron and differ by at most one, the larger ones first."""
    return [len(part) for part in np.array_split(np.arange(n_neuron), n_group)]


def split_neurons(importance: Tensor, similarity: Tensor, sizes: Sequence[int], n_shared: int, seed: int) -> Groups:
    """Give the most important neurons to the shared experts, and cluster the others by similarity.

    importance: (d_ff,); similarity: (d_ff, d_ff), symmetric; sizes: (n_expert,), the `n_shared` shared experts first.

    Shared experts hold what matters for nearly every token: those of CMoE
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


def regroup_neurons(kept: Tensor, sizes: Sequence[int], n_shared: int, outliers: Tensor) -> Groups:
    """Move each neuron to the expert that runs when the neuron contributes.

    kept      (d_ff, n_expert): the energy that each neuron keeps in each expert, see `stats.energy_by_expert`
    sizes     (n_expert,): the groups' sizes, the `n_shared` shared experts first
    outliers  (d_ff,) bool: neurons that go to a shared expert first, while there is room

    A clustering puts together what fires together, but which experts run is up to a linear router. So router and groups
    are found in turn, as k-means finds centers and labels. A shared expert runs for every token, so the neurons that
    get there are those that lose most by being routed, not those with the most energy.
    """
    if not n_shared:
        return _groups_of(balanced_assign(kept, sizes))
    # All shared experts keep the same, everything: they are one group, which is cut afterwards. The bonus of an outlier
    # is more than any neuron can keep.
    shared_column = kept[:, 0] + outliers.float() * kept.sum()
    score = torch.cat([shared_column[:, None], kept[:, n_shared:]], 1)
    shared, *routed = _groups_of(balanced_assign(score, [sum(sizes[:n_shared]), *sizes[n_shared:]]))
    return [*shared.split(list(sizes[:n_shared])), *routed]


def _groups_of(label: Tensor) -> Groups:
    return [(label == e).nonzero()[:, 0] for e in range(int(label.max()) + 1)]


def cluster(similarity: Tensor, sizes: Sequence[int], seed: int, n_iter: int = 30) -> Tensor:
    """Cluster by balanced spherical kernel k-means: similarity (m, m) -> labels (m,), label e used sizes[e] times.

    k-means++ seeding; then groups and cosine similarity to their means are updated in turn until nothing moves. With
    gate rows' inner products this is the clustering of MoEfication (https://arxiv.org/abs/2110.01786, section 3.2)
    and EMoE; with co-activation it is that of CMoE, on real contributions instead of 0/1 marks.
    """
    m, n = len(similarity), len(sizes)
    if n == 1:
        return torch.zeros(m, dtype=torch.long)
    norm = similarity.diagonal().clamp_min(1e-20).sqrt()
    kernel = similarity / norm[:, None] / norm[None]
    label = balanced_assign(kernel[:, _choose_centers(kernel, n, seed)], sizes)
    for _ in range(n_iter):
        # The mean of a group is not computed, only inner products with it: of neuron i the sum of kernel[i] over the
        # members, and the mean's own length from the same sums over the members' rows.
        member = torch.nn.functional.one_hot(label, n).to(kernel.dtype)
        closeness = kernel @ member
        score = closeness / (member * closeness).sum(0).clamp_min(1e-12).sqrt()
        new = balanced_assign(score, sizes)
        if torch.equal(new, label):
            break
        label = new
    return label


def _choose_centers(kernel: Tensor, n: int, seed: int) -> list[int]:
    """Choose n centers by k-means++: each next one is drawn far from those already chosen."""
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
    """Return labels (m,) near the best total of score (m, n), label e used sizes[e] times (sum(sizes) = m).

    Greedy by regret (best minus second best), then the best exchange of two neurons until none improves. A stand-in
    for the assignment problem of CMoE, whose exact solution is cubic in m.

    Example: scores [[3, 0], [2, 1], [5, 0], [4, 0]] and sizes [2, 2] give labels [1, 1, 0, 0].
    """
    values = score.double().cpu().numpy()  # many small steps: numpy does each in microseconds
    m, n = values.shape
    label = _assign_by_regret(values, sizes)
    starts = np.cumsum([0, *sizes[:-1]])
    for _ in range(20 * m):
        # The neurons group by group: those of group e are by_group[starts[e] : starts[e] + sizes[e]].
        by_group = np.argsort(label, kind="stable")
        # gain[i, f]: what the total gains when neuron by_group[i] moves to group f.
        gain = values[by_group] - values[by_group, label[by_group]][:, None]
        # best[e, f]: the best single move from e to f. An exchange is one move there and one back.
        best = np.maximum.reduceat(gain, starts, axis=0)
        exchange = np.triu(best + best.T, 1)
        e, f = divmod(int(exchange.argmax()), n)
        if exchange[e, f] <= 1e-12:
            break
        in_e, in_f = (slice(starts[g], starts[g] + sizes[g]) for g in (e, f))
        one, two = by_group[in_e][gain[in_e, f].argmax()], by_group[in_f][gain[in_f, e].argmax()]
        label[one], label[two] = f, e
    return torch.from_numpy(label).to(score.device)


def _assign_by_regret(values: NDArray[np.float64], sizes: Sequence[int]) -> NDArray[np.int64]:
    """Return labels (m,) of values (m, n): each neuron gets the best group that has room, in the order of regret.

    The regret is what a neuron would lose by its second best group; the largest comes first. Label e is used sizes[e]
    times.
    """
    m, n = values.shape
    top = np.sort(values, axis=1)[:, -min(2, n) :]
    room, label = list(sizes), np.empty(m, np.int64)
    preference = np.argsort(-values, axis=1, kind="stable").tolist()
    for i in np.argsort(top[:, 0] - top[:, -1], kind="stable").tolist():
        e = next(e for e in preference[i] if room[e])
        room[e] -= 1
        label[i] = e
    return label
