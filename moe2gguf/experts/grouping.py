"""Balanced groups: which neurons share an expert.

A grouping is a list of n_expert sorted index tensors whose lengths differ by at most one; the first n_shared of them
are the shared experts. Nothing here sees a token: a first grouping is made from how neurons contribute together, a
later one from the energy that each neuron would keep in each expert (`moe2gguf.experts.stats`).
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe2gguf.experts.mlp import Groups


def group_sizes(n_neuron: int, n_group: int) -> list[int]:
    """Return sizes that sum to n_neuron and differ by at most one, the larger ones first."""
    return [len(part) for part in np.array_split(np.arange(n_neuron), n_group)]


def split_neurons(importance: Tensor, fires: Tensor, sizes: Sequence[int], n_shared: int, seed: int) -> Groups:
    """Give the most important neurons to the shared experts, and cluster the others by the tokens they fire for.

    importance: (d_ff,); fires: (n_token, d_ff), how much; sizes: (n_expert,), the `n_shared` shared experts first.

    Shared experts hold what matters for nearly every token: those of CMoE
    (https://arxiv.org/abs/2502.04416, section 4.1), with output energy for importance.
    """
    order = importance.argsort(descending=True, stable=True)
    cut = sum(sizes[:n_shared])
    shared, rest = order[:cut].sort().values, order[cut:].sort().values
    groups = list(shared.split(list(sizes[:n_shared]))) if n_shared else []
    if len(rest) == 0:
        return groups
    label = cluster(fires[:, rest].T, sizes[n_shared:], seed)
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


def cluster(rows: Tensor, sizes: Sequence[int], seed: int, n_iter: int = 10) -> Tensor:
    """Cluster by balanced spherical k-means: rows (m, d) -> labels (m,), label e used sizes[e] times.

    k-means++ seeding; then groups and cosine similarity to their means are updated in turn until nothing moves. With
    gate rows this is the clustering of MoEfication (https://arxiv.org/abs/2110.01786, section 3.2) and EMoE; with what
    neurons give for each token it is that of CMoE, on real contributions instead of 0/1 marks.
    """
    n = len(sizes)
    if n == 1:
        return torch.zeros(len(rows), dtype=torch.long)
    unit = torch.nn.functional.normalize(rows, eps=1e-10)
    label = balanced_assign(_similarity_to_centers(unit, n, seed), sizes)
    for _ in range(n_iter):
        means = torch.nn.functional.one_hot(label, n).to(unit.dtype).T @ unit
        new = balanced_assign(unit @ torch.nn.functional.normalize(means).T, sizes)
        if torch.equal(new, label):
            break
        label = new
    return label


def _similarity_to_centers(unit: Tensor, n: int, seed: int) -> Tensor:
    """Return (m, n): inner products of the unit rows (m, d) with n centers, each drawn far from those before it."""
    generator = torch.Generator("cpu").manual_seed(seed)  # on the processor, whatever the device: the same numbers
    centers = [int(torch.randint(len(unit), (1,), generator=generator, device="cpu"))]
    similarity = [unit @ unit[centers[0]]]
    for _ in range(n - 1):
        far = (1 - torch.stack(similarity).amax(0)).clamp_min(0) ** 2
        far[centers] = 0
        if float(far.sum()) <= 0:  # all neurons alike: any that is left will do
            far = torch.ones_like(far)
            far[centers] = 0
        centers.append(int(torch.multinomial((far / far.sum()).cpu(), 1, generator=generator)))
        similarity.append(unit @ unit[centers[-1]])
    return torch.stack(similarity, 1)


def balanced_assign(score: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return labels (m,) near the best total of score (m, n), label e used sizes[e] times (sum(sizes) = m).

    Greedy by regret (best minus second best), then exchanges between two groups until none improves. A stand-in for the
    assignment problem of CMoE, whose exact solution is cubic in m.

    Example: scores [[3, 0], [2, 1], [5, 0], [4, 0]] and sizes [2, 2] give labels [1, 1, 0, 0].
    """
    values = score.double().cpu().numpy()  # many small steps: numpy does each in microseconds
    label = _assign_by_regret(values, sizes)
    members = [np.flatnonzero(label == e) for e in range(len(sizes))]
    for _ in range(100):  # a handful will do
        if not sum(_exchange(values, members, e, f) for e, f in itertools.combinations(range(len(sizes)), 2)):
            break
    for e, own in enumerate(members):
        label[own] = e
    return torch.from_numpy(label).to(score.device)


def _exchange(values: NDArray[np.float64], members: list[NDArray[np.int64]], e: int, f: int) -> bool:
    """Exchange members of two groups where that improves the total of values (m, n); returns whether any did.

    What a neuron gains by moving does not depend on the others, so the best exchanges pair those that gain most.
    """
    gain = [values[members[a], b] - values[members[a], a] for a, b in ((e, f), (f, e))]
    if not len(gain[0]) or not len(gain[1]) or gain[0].max() + gain[1].max() <= 1e-12:
        return False
    order = [np.argsort(-own, kind="stable")[: min(map(len, gain))] for own in gain]
    count = int((gain[0][order[0]] + gain[1][order[1]] > 1e-12).sum())
    in_e, in_f = order[0][:count], order[1][:count]
    members[e][in_e], members[f][in_f] = members[f][in_f], members[e][in_e]
    return True


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
