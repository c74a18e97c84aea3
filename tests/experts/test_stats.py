"""moe2gguf.experts.stats: sums over tokens, against plain loops over single tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moe2gguf.experts import stats
from moe2gguf.experts.mlp import MLP, Router, SlicedLayer, Stream

D_MODEL, D_FF, N_TOKEN = 6, 10, 70
GROUPS = [torch.arange(0, 4), torch.arange(4, 7), torch.arange(7, 10)]


def make_layer() -> tuple[MLP, Tensor]:
    """A small MLP and inputs x (n_token, d_model)."""
    generator = torch.Generator().manual_seed(5)
    mlp = MLP(*(torch.randn(D_FF, D_MODEL, generator=generator) for _ in range(3)))
    return mlp, torch.randn(N_TOKEN, D_MODEL, generator=generator)


def neuron_outputs(mlp: MLP, token: Tensor) -> Tensor:
    """(d_ff, d_model): what each neuron adds to the output for one token."""
    h = torch.nn.functional.silu(mlp.gate @ token) * (mlp.up @ token)
    return h[:, None] * mlp.down


def test_importance_is_the_energy_of_a_neurons_output() -> None:
    """Summed over all tokens."""
    mlp, x = make_layer()

    found = stats.collect_statistics(mlp.down, mlp.activations(x))

    expected = torch.stack([neuron_outputs(mlp, token).square().sum(1) for token in x]).sum(0)
    torch.testing.assert_close(expected, found.importance, rtol=1e-4, atol=1e-4)
    assert not found.outliers.any()


def test_a_neuron_that_carries_a_massive_activation_is_an_outlier() -> None:
    """One token in seventy makes one neuron huge, and the token's output has far over 100 times the median energy."""
    mlp, x = make_layer()
    mlp.gate[3], mlp.up[3] = 0, 0
    mlp.gate[3, 0], mlp.up[3, 0] = 1, 1
    for row in (mlp.gate, mlp.up):
        row[:3, 0], row[4:, 0] = 0, 0
    x[20, 0] = 60.0

    found = stats.collect_statistics(mlp.down, mlp.activations(x))

    assert [3] == found.outliers.nonzero().flatten().tolist()


def test_expert_energies_are_squared_norms() -> None:
    """Of the sum of an expert's neurons, token by token."""
    mlp, x = make_layer()

    found = stats.expert_energies(mlp.down, mlp.activations(x), GROUPS)

    expected = [[float(neuron_outputs(mlp, t)[g].sum(0).square().sum()) for g in GROUPS] for t in x]
    torch.testing.assert_close(torch.tensor(expected), found, rtol=1e-4, atol=1e-4)


def test_a_massive_token_counts_less() -> None:
    """Worked by hand: the median energy is 2, so a token of energy 400 counts by a half, one of 200 as a whole."""
    energy = torch.tensor([1.0, 2.0, 2.0, 200.0, 400.0])

    assert [1, 1, 1, 1, 0.5] == stats.cap_massive_tokens(energy).tolist()


def test_normal_equations_count_the_tokens_of_their_span() -> None:
    """sum w h h^T and sum w h y^T, y being what the target has beyond the layer's own output."""
    mlp, x = make_layer()
    generator = torch.Generator().manual_seed(6)
    layer = SlicedLayer(mlp, GROUPS, Router(torch.randn(3, D_MODEL, generator=generator)), torch.full((3,), 2.0))
    target, weight = mlp(x), torch.rand(N_TOKEN, generator=generator)

    found = stats.normal_equations(layer, Stream(2, x, mlp.activations(x), target), weight, range(10, 60))

    hh, hy = torch.zeros(D_FF, D_FF), torch.zeros(D_FF, D_MODEL)
    for i in range(10, 60):
        p = (layer.router.rows @ x[i]).softmax(0)
        top, chosen = p.topk(2)
        by_expert = torch.zeros(3).index_put_((chosen,), 2.0 * top / top.sum())
        runs = torch.cat([by_expert[e].expand(len(group)) for e, group in enumerate(GROUPS)])
        h = torch.nn.functional.silu(mlp.gate @ x[i]) * (mlp.up @ x[i]) * runs
        hh += weight[i] * h[:, None] * h[None]
        hy += weight[i] * h[:, None] * (target[i] - h @ mlp.down)[None]
    torch.testing.assert_close(hh, found.hh, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(hy, found.hy, rtol=1e-3, atol=1e-3)
