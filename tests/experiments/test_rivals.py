"""scripts/rivals.py: each rival against what its paper says, by brute force on small inputs."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import rivals

from moe2gguf.experts.mlp import MLP, Inputs
from moe2gguf.spec import Recipe, Slicing

D_MODEL, D_FF, N, K = 12, 48, 8, 4


@pytest.fixture(scope="module")
def layer():
    """(mlp, x): a small MLP and inputs with a constant part."""
    g = torch.Generator().manual_seed(0)
    mlp = MLP(*(torch.randn(D_FF, D_MODEL, generator=g) for _ in range(3)))
    x = torch.randn(640, D_MODEL, generator=g)
    x[:, 0] = 2.0
    return mlp, x


def inputs(mlp, x):
    """The dense model's inputs for both streams."""
    return Inputs(x, mlp(x), x, mlp(x))


SLICING = Slicing(N, K, D_FF // N, Recipe())


def test_cmoe_splits_by_marks(layer):
    """Shared: the neurons most often among a token's ten largest; groups complete and balanced; representatives own."""
    mlp, x = layer
    groups, neurons = rivals.cmoe_split(mlp, x, N, 2)
    h = torch.nn.functional.silu(rivals.unit(x) @ rivals.unit(mlp.gate).T) * (rivals.unit(x) @ rivals.unit(mlp.up).T)
    marks = torch.zeros_like(h).scatter_(1, h.abs().topk(10, 1).indices, 1)

    shared = torch.cat(groups[:2])
    assert float(marks.sum(0)[shared].min()) >= float(marks.sum(0)[torch.cat(groups[2:])].max())
    assert list(range(D_FF)) == sorted(torch.cat(groups).tolist())
    assert {D_FF // N} == {len(group) for group in groups}
    for group, neuron in zip(groups[2:], neurons, strict=True):
        distances = (marks[:, group] - marks[:, group].mean(1, keepdim=True)).square().sum(0)
        assert float(distances[group == neuron]) == pytest.approx(float(distances.min()), rel=1e-4)


def test_cmoe_runs_the_experts_whose_representative_is_largest(layer):
    """Weights 0 and 1; the shared ones always; with all of them the dense MLP."""
    mlp, x = layer
    carved = rivals.cmoe(mlp, inputs(mlp, x), SLICING, None, n_shared=2)
    _, neurons = rivals.cmoe_split(mlp, x, N, 2)
    score = (
        torch.nn.functional.silu(x @ rivals.unit(mlp.gate[neurons]).T) * (x @ rivals.unit(mlp.up[neurons]).T)
    ).abs()

    weights = carved.weights(x, K)

    assert {0.0, 1.0} == set(weights.unique().tolist())
    assert torch.equal(weights.sum(1), torch.full((len(x),), float(K)))
    assert bool((weights[:, :2] == 1).all())
    assert torch.equal(score.argmax(1), (weights[:, 2:] * score).argmax(1))
    torch.testing.assert_close(mlp(x), carved(x, N), rtol=1e-4, atol=1e-4)


def test_expert_weaver_shares_by_how_much_neurons_vary(layer):
    """0.7 n where no neuron varies from sample to sample, 0.2 n where all do; never more than run."""
    mlp, x = layer
    steady, loud = x[:64].repeat(10, 1), x[:64].repeat(10, 1)
    loud[:64] *= 50

    assert round(0.7 * 16) == rivals.weaver_count(mlp, steady, 16, 64)
    assert round(0.2 * 16) == rivals.weaver_count(mlp, loud, 16, 64)
    carved = rivals.expert_weaver(mlp, inputs(mlp, steady), SLICING, None, n_context=64)
    assert float(K) == carved.report["always_on"]


def test_flap_keeps_what_fluctuates(layer):
    """Score var(h) |d|^2 and mean from torch's own; both rules keep the share; the bias is the mean of what goes."""
    mlp, x = layer
    found = rivals.fluctuation(mlp, x)
    h = mlp.hidden(x)
    torch.testing.assert_close(h.var(0) * mlp.down.square().sum(1), found.score, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(h.mean(0), found.mean, rtol=1e-4, atol=1e-5)
    louder = rivals.Fluctuation(found.score * 100, found.mean, found.down)

    (keep, same) = rivals.flap_uniform([found, louder], 0.5)
    standard = rivals.flap_standard([found, louder], 0.5)

    assert [D_FF // 2] * 2 == [int(keep.sum()), int(same.sum())]
    assert float(found.score[keep].min()) >= float(found.score[~keep].max())
    assert D_FF == int(standard[0].sum() + standard[1].sum())
    assert torch.equal(standard[0], standard[1])  # the scale of a layer does not matter
    expected = (h * ~keep @ mlp.down).mean(0)
    torch.testing.assert_close(expected, rivals.flap_bias(found, keep), rtol=1e-3, atol=1e-4)
