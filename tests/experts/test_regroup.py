"""moe2gguf.experts.regroup: neurons move to the expert that runs when they contribute."""

import torch

from moe2gguf.experts import regroup
from moe2gguf.experts.hidden_states import thinned
from moe2gguf.experts.mlp import MLP

TOPICS, WIDTH = 4, 3


def topical(always=0):
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


def test_energy_by_expert():
    """a_i^2 = h_i^2 |d_i|^2 summed over the tokens for which the expert is among the first k, in plain loops."""
    mlp, x, router, _ = topical()
    router = router + 0.01 * torch.randn(router.shape, generator=torch.Generator().manual_seed(0))

    found = regroup.kept_by(mlp, x, router, 2)

    expected = torch.zeros_like(found)
    for token in x:
        h = torch.nn.functional.silu(mlp.gate @ token) * (mlp.up @ token)
        for e in (router @ token).argsort(descending=True)[:2]:
            expected[:, e] += h.square() * mlp.down.square().sum(1)
    torch.testing.assert_close(expected, found, rtol=1e-4, atol=1e-4)


def test_neurons_find_the_expert_that_runs_for_them():
    """From any groups to those of the topics, in one round."""
    mlp, x, router, topic = topical()
    mixed = list(torch.arange(TOPICS * WIDTH).split(WIDTH))

    groups = regroup.regrouped(mlp, x, mixed, router, 0, 1, torch.zeros(len(topic)))

    assert [WIDTH] * TOPICS == [len(group) for group in groups]
    assert [{t} for t in range(TOPICS)] == [set(topic[group].tolist()) for group in groups]


def test_who_loses_most_by_being_routed_always_runs():
    """Not the loudest neurons, which their topic's expert keeps whole, but those that fire for every token."""
    mlp, x, router, topic = topical(always=WIDTH)
    loud = torch.where(topic >= 0, 3.0, 1.0)[:, None]
    mlp = MLP(mlp.gate, mlp.up, mlp.down / mlp.down.norm(dim=1, keepdim=True) * loud)
    router = torch.cat([10 * torch.eye(TOPICS + 1)[[TOPICS]], router])
    mixed = list(torch.arange(len(topic)).split(WIDTH))

    groups = regroup.regrouped(mlp, x, mixed, router, 1, 2, torch.zeros(len(topic)))

    assert {-1} == set(topic[groups[0]].tolist())
    energy = regroup.kept_by(mlp, x, router, 2)[:, 0]
    assert energy[topic >= 0].mean() > energy[topic < 0].mean()


def test_what_is_pinned_stays_always_on():
    """The highest first, when there is no room for all."""
    mlp, x, router, topic = topical(always=WIDTH)
    router = torch.cat([10 * torch.eye(TOPICS + 1)[[TOPICS]], router])
    mixed = list(torch.arange(len(topic)).split(WIDTH))
    some = (topic >= 0).nonzero()[:4, 0]
    pinned = torch.zeros(len(topic))
    pinned[some] = torch.tensor([1.0, 1.0, 1.0, 2.0])

    groups = regroup.regrouped(mlp, x, mixed, router, 1, 2, pinned)

    assert set(groups[0].tolist()) <= set(some.tolist())
    assert int(some[3]) in groups[0].tolist()


def test_thinned_rows_are_spread_over_all():
    """However they are read."""
    rows = torch.arange(103.0)[:, None]

    few = thinned(rows, 20)

    assert len(few) == 20
    assert torch.equal(rows[:100:5], few[slice(0, 20)])
    assert torch.equal(few[slice(0, 20)], torch.cat([few[slice(0, 7)], few[slice(7, 20)]]))
    assert 103 == len(thinned(rows, 60))
