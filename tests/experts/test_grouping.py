"""moe2gguf.experts.grouping: balanced, complete, and close to the best assignment."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe2gguf.experts.grouping import balanced_assign, cluster, group_sizes, regroup_neurons, split_neurons
from moe2gguf.experts.mlp import MLP, Router
from moe2gguf.experts.stats import energy_by_expert

TOPICS, WIDTH = 4, 3
GENERATOR = torch.Generator().manual_seed(0)


@given(m=st.integers(2, 40), n=st.integers(1, 6), n_shared=st.integers(0, 3), seed=st.integers(0, 5))
def test_groups_are_balanced_and_complete(m: Any, n: Any, n_shared: Any, seed: Any) -> None:
    """Every neuron once; sizes differ by at most one; sorted within a group."""
    n, n_shared = min(n, m), min(n_shared, n)
    a = torch.randn(100, m, generator=torch.Generator().manual_seed(seed))
    importance = a.square().sum(0)
    groups = split_neurons(importance, a, group_sizes(m, n), n_shared, seed)

    assert group_sizes(m, n) == [len(group) for group in groups]
    assert list(range(m)) == sorted(torch.cat(groups).tolist())
    assert all(group.tolist() == sorted(group.tolist()) for group in groups)


def test_always_on_experts_hold_the_most_important_neurons() -> None:
    """No routed neuron matters more than an always-on one."""
    importance = torch.rand(32, generator=GENERATOR)
    groups = split_neurons(importance, torch.eye(32), group_sizes(32, 4), 2, 0)

    assert importance[torch.cat(groups[:2])].min() >= importance[torch.cat(groups[2:])].max()


def test_neurons_that_fire_together_are_found() -> None:
    """Three blocks of correlated neurons, shuffled: the clustering recovers them."""
    block = torch.arange(24) % 3
    rows = torch.eye(3)[block] + 0.2 * torch.rand(24, 3, generator=torch.Generator().manual_seed(0))

    label = cluster(rows, [8, 8, 8], seed=0)

    assert 3 == len({(int(a), int(b)) for a, b in zip(block, label, strict=True)})


@pytest.mark.parametrize("seed", range(20))
def test_the_assignment_is_near_the_best_one(seed: Any) -> None:
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


def test_the_worked_example() -> None:
    """The one of the docstring."""
    score = torch.tensor([[3.0, 0], [2, 1], [5, 0], [4, 0]])

    assert [1, 1, 0, 0] == balanced_assign(score, [2, 2]).tolist()


def test_identical_neurons_do_no_harm() -> None:
    """Seeding needs distances; where there are none, any balanced grouping will do."""
    label = cluster(torch.ones(12, 12), [4, 4, 4], seed=0)

    assert [4, 4, 4] == torch.bincount(label, minlength=3).tolist()


def topical(always: Any = 0) -> Any:
    """(mlp, x, router, topic of each neuron): a neuron fires for one topic of four, `always` more for every token.

    The router's rows are the topics, so the best groups are known.
    """
    g = torch.Generator().manual_seed(3)
    topic = torch.arange(TOPICS).repeat_interleave(WIDTH)[torch.randperm(TOPICS * WIDTH, generator=g)]
    topic = torch.cat([topic, torch.full((always,), -1)])
    gate = torch.where((topic >= 0)[:, None], 4 * torch.eye(TOPICS + 1)[topic], 4 * torch.eye(TOPICS + 1)[TOPICS])
    up = torch.rand(len(topic), TOPICS + 1, generator=g) + 0.5
    down = torch.randn(len(topic), 6, generator=g)
    x = torch.cat([torch.eye(TOPICS)[torch.randint(TOPICS, (400,), generator=g)], torch.ones(400, 1)], 1)
    return MLP(gate, up, down), x, torch.eye(TOPICS, TOPICS + 1), topic


def kept_energy(mlp: Any, x: Any, router: Any, k: int) -> Any:
    """`energy_by_expert` of an MLP's activations."""
    return energy_by_expert(mlp.down, x, mlp.activations(x), Router(router), k)


def test_energy_by_expert() -> None:
    """a_i^2 = h_i^2 |d_i|^2 summed over the tokens for which the expert is among the first k, in plain loops."""
    mlp, x, router, _ = topical()
    router = router + 0.01 * torch.randn(router.shape, generator=torch.Generator().manual_seed(0))

    found = kept_energy(mlp, x, router, 2)

    expected = torch.zeros_like(found)
    for token in x:
        h = torch.nn.functional.silu(mlp.gate @ token) * (mlp.up @ token)
        for e in (router @ token).argsort(descending=True)[:2]:
            expected[:, e] += h.square() * mlp.down.square().sum(1)
    torch.testing.assert_close(expected, found, rtol=1e-4, atol=1e-4)


def test_neurons_find_the_expert_that_runs_for_them() -> None:
    """From any groups to those of the topics, in one round."""
    mlp, x, router, topic = topical()

    groups = regroup_neurons(kept_energy(mlp, x, router, 1), [WIDTH] * TOPICS, 0, topic < -1)

    assert [WIDTH] * TOPICS == [len(group) for group in groups]
    assert [{t} for t in range(TOPICS)] == [set(topic[group].tolist()) for group in groups]


def test_who_loses_most_by_being_routed_always_runs() -> None:
    """Not the loudest neurons, which their topic's expert keeps whole, but those that fire for every token."""
    mlp, x, router, topic = topical(always=WIDTH)
    loud = torch.where(topic >= 0, 3.0, 1.0)[:, None]
    mlp = MLP(mlp.gate, mlp.up, mlp.down / mlp.down.norm(dim=1, keepdim=True) * loud)
    router = torch.cat([10 * torch.eye(TOPICS + 1)[[TOPICS]], router])

    groups = regroup_neurons(kept_energy(mlp, x, router, 2), [WIDTH] * (TOPICS + 1), 1, topic < -1)

    assert {-1} == set(topic[groups[0]].tolist())
    energy = kept_energy(mlp, x, router, 2)[:, 0]
    assert energy[topic >= 0].mean() > energy[topic < 0].mean()


def test_outliers_stay_in_shared_experts() -> None:
    """While there is room, whatever they keep elsewhere."""
    mlp, x, router, topic = topical(always=WIDTH)
    router = torch.cat([10 * torch.eye(TOPICS + 1)[[TOPICS]], router])
    outliers = torch.zeros(len(topic), dtype=torch.bool)
    outliers[(topic >= 0).nonzero()[:4, 0]] = True

    groups = regroup_neurons(kept_energy(mlp, x, router, 2), [WIDTH] * (TOPICS + 1), 1, outliers)

    assert outliers[groups[0]].all()
