"""moe2gguf.experts.grouping: balanced, complete, and close to the best assignment."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe2gguf.experts.grouping import balanced_assign, cluster, group_sizes, split

GENERATOR = torch.Generator().manual_seed(0)


@given(m=st.integers(2, 40), n=st.integers(1, 6), n_shared=st.integers(0, 3), seed=st.integers(0, 5))
def test_groups_are_balanced_and_complete(m, n, n_shared, seed):
    """Every neuron once; sizes differ by at most one; sorted within a group."""
    n, n_shared = min(n, m), min(n_shared, n)
    a = torch.randn(100, m, generator=torch.Generator().manual_seed(seed))
    importance = a.square().sum(0)
    groups = split(importance, a.T @ a, group_sizes(m, n), n_shared, seed)

    assert group_sizes(m, n) == [len(group) for group in groups]
    assert list(range(m)) == sorted(torch.cat(groups).tolist())
    assert all(group.tolist() == sorted(group.tolist()) for group in groups)


def test_always_on_experts_hold_the_most_important_neurons():
    """No routed neuron matters more than an always-on one."""
    importance = torch.rand(32, generator=GENERATOR)
    groups = split(importance, torch.eye(32), group_sizes(32, 4), 2, 0)

    assert importance[torch.cat(groups[:2])].min() >= importance[torch.cat(groups[2:])].max()


def test_neurons_that_fire_together_are_found():
    """Three blocks of correlated neurons, shuffled: the clustering recovers them."""
    block = torch.arange(24) % 3
    similarity = (block[:, None] == block[None]).float() + 0.1 * torch.eye(24)

    label = cluster(similarity, [8, 8, 8], seed=0)

    assert 3 == len({(int(a), int(b)) for a, b in zip(block, label, strict=True)})


@pytest.mark.parametrize("seed", range(20))
def test_the_assignment_is_near_the_best_one(seed):
    """Against every assignment of six neurons to three pairs: never worse than 5 % below the best total."""
    score = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)).double()

    label = balanced_assign(score, [2, 2, 2])

    totals = [
        sum(score[i, e] for i, e in enumerate(labels))
        for labels in itertools.product(range(3), repeat=6)
        if all(labels.count(e) == 2 for e in range(3))
    ]
    spread = max(totals) - min(totals)
    ours = score.gather(1, label[:, None]).sum()
    assert max(totals) - ours <= 0.05 * spread
    assert [2, 2, 2] == torch.bincount(label, minlength=3).tolist()


def test_the_worked_example():
    """The one of the docstring."""
    score = torch.tensor([[3.0, 0], [2, 1], [5, 0], [4, 0]])

    assert [1, 1, 0, 0] == balanced_assign(score, [2, 2]).tolist()


def test_identical_neurons_do_no_harm():
    """Seeding needs distances; where there are none, any balanced grouping will do."""
    label = cluster(torch.ones(12, 12), [4, 4, 4], seed=0)

    assert [4, 4, 4] == torch.bincount(label, minlength=3).tolist()
