"""moe2gguf.experts.slice_layer: one layer, every combination of methods, against what the graph must give."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe2gguf.errors import CalibrationError
from moe2gguf.experts.methods import AMPLIFICATIONS, GROUPS, ROUTERS
from moe2gguf.experts.mlp import MLP, LayerInputs, Stream
from moe2gguf.experts.refit import fit_scale
from moe2gguf.experts.slice_layer import slice_layer
from moe2gguf.experts.slicing import default_n_shared
from moe2gguf.experts.stats import expert_agreement
from moe2gguf.spec import Method, Slicing

D_MODEL, D_FF, N, K = 24, 80, 8, 4


def layer(seed: Any = 0, n_token: Any = 1500) -> Any:
    """(mlp, inputs): neurons in clusters that fire together, inputs with a common offset as after a norm."""
    g = torch.Generator().manual_seed(seed)
    topics = torch.randn(10, D_MODEL, generator=g)
    gate = topics.repeat_interleave(D_FF // 10, 0) + 0.3 * torch.randn(D_FF, D_MODEL, generator=g)
    mlp = MLP(gate, torch.randn(D_FF, D_MODEL, generator=g), torch.randn(D_FF, D_MODEL, generator=g) / 8)
    x = topics[torch.randint(10, (n_token,), generator=g)] * 0.4 + 0.3 * torch.randn(n_token, D_MODEL, generator=g)
    x[:, 0] = 1.0
    y = mlp(x)
    return mlp, LayerInputs((Stream(K, x, mlp.activations(x), y),))


def slice_by(mlp: Any, inputs: Any, slicing: Any) -> Any:
    """`slice_layer`, without its types: every report has all figures here."""
    return slice_layer(mlp, inputs, slicing)


def slicing(**recipe: Any) -> Any:
    """n = 8, k = 4, no padding."""
    return Slicing(N, K, D_FF // N, Method(**recipe))


def error(sliced: Any, inputs: Any, k: Any = K) -> Any:
    """Share of the dense output's energy that is missing."""
    return float(
        (sliced(inputs.streams[0].x, k) - inputs.streams[0].target).square().sum()
        / inputs.streams[0].target.square().sum()
    )


@pytest.mark.parametrize(("group", "router"), list(itertools.product(GROUPS, ROUTERS)))
def test_all_experts_in_exact_mode_are_the_dense_mlp(group: Any, router: Any) -> None:
    """Whatever the grouping and the router."""
    mlp, inputs = layer()
    shared = 0 if group == "contiguous" or router == "zero" else 2

    sliced = slice_by(mlp, inputs, slicing(group=group, router=router, n_shared=shared, amplify="exact"))

    torch.testing.assert_close(inputs.streams[0].target, sliced(inputs.streams[0].x, N), rtol=0.1, atol=0.06)
    assert error(sliced, inputs, N) < 1e-3


def test_always_on_experts_always_run() -> None:
    """For every token, at every count above them."""
    mlp, inputs = layer()
    sliced = slice_by(mlp, inputs, slicing(group="activations", router="least-squares", n_shared=2, amplify="used"))

    for k in (3, 4, 7):
        assert (sliced.expert_weights(inputs.streams[0].x, k)[:, :2] > 0).all()
    assert 2.0 == sliced.report.n_shared
    assert [1.0, 1.0] == sliced.report.load[:2]


def test_what_was_learned_beats_what_was_not() -> None:
    """Activation groups with a least-squares router keep more than contiguous groups do."""
    mlp, inputs = layer()

    def left(**recipe: Any) -> Any:
        return error(slice_by(mlp, inputs, slicing(amplify="used", **recipe)), inputs)

    ours = left(group="activations", router="least-squares", n_shared=2)
    assert ours < left(group="contiguous", router="least-squares", n_shared=0)
    assert ours < left(group="contiguous", router="zero")


def test_a_refit_is_never_worse_on_its_own_tokens() -> None:
    """And here much better."""
    mlp, inputs = layer()
    recipe = {"group": "activations", "router": "least-squares", "n_shared": 2, "amplify": "used"}
    without, with_refit = (slice_by(mlp, inputs, slicing(refit=refit, **recipe)) for refit in (False, True))

    assert error(with_refit, inputs) < 0.9 * error(without, inputs)
    assert 0 < with_refit.report.refit_error < 1
    torch.testing.assert_close(mlp.gate, with_refit.mlp.gate)


def test_a_refit_for_several_counts_stays_closest_with_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They count more than half of them do: the error there is a fraction, and half is still better than unfitted."""
    mlp, inputs = layer()
    (half,) = inputs.streams
    inputs = LayerInputs((half, replace(half, k=N)))
    recipe: dict[str, Any] = {"group": "activations", "router": "least-squares", "n_shared": 2, "amplify": "used"}
    cut = Slicing(N, N, D_FF // N, Method(refit=True, **recipe), target="glm4moe", in_shared=2)
    unfitted = slice_by(mlp, inputs, replace(cut, method=replace(cut.method, refit=False)))

    weighed = slice_by(mlp, inputs, cut)
    monkeypatch.setattr("moe2gguf.experts.slice_layer.ALL_EXPERTS_WEIGHT", 1)
    alike = slice_by(mlp, inputs, cut)

    assert error(weighed, inputs, N) < 0.5 * error(alike, inputs, N)
    assert error(weighed, inputs, K) < 0.95 * error(unfitted, inputs, K)


def test_router_rows_keep_the_oracles_order_better_than_chance() -> None:
    """Hit rate against the true largest outputs; energy kept is at most the oracle's."""
    mlp, inputs = layer()
    report = slice_by(mlp, inputs, slicing(group="activations", router="least-squares", n_shared=1)).report

    assert report.hit_rate > 1.3 * (K - 1) / (N - 1)
    assert report.energy_kept <= report.energy_oracle + 1e-6
    assert abs(sum(report.load) - K) < 1e-5


def test_groups_that_know_their_router_keep_more() -> None:
    """Of the dense output's energy, and of what the first k experts of the router's order have."""
    mlp, inputs = layer()
    recipe = {"router": "least-squares", "n_shared": 2, "amplify": "used"}
    clustered, routed = (slice_by(mlp, inputs, slicing(group=g, **recipe)) for g in ("activations", "routed"))

    assert error(routed, inputs) < 0.95 * error(clustered, inputs)
    assert routed.report.energy_by_used[K - 1] > clustered.report.energy_by_used[K - 1]


def test_fitted_amplification_is_the_least_squares_constant_of_each_expert() -> None:
    """Against a solver that sees every expert's output for every token, as loud as the dense output; tokens without
    weight do not count."""
    mlp, inputs = layer()
    sliced = slice_by(mlp, inputs, slicing(group="activations", router="least-squares", n_shared=2, amplify="fitted"))

    h, runs = mlp.activations(inputs.streams[0].x), sliced.expert_weights(inputs.streams[0].x, K) > 0
    outputs = torch.stack([h[:, g] @ mlp.down[g] * runs[:, e, None] for e, g in enumerate(sliced.groups)], 2)
    found = torch.linalg.lstsq(outputs.flatten(0, 1), inputs.streams[0].target.flatten()[:, None]).solution[:, 0]
    louder = sliced.scale / (K * found)
    torch.testing.assert_close(louder.mean().expand(N), louder, rtol=0.01, atol=0)
    assert sliced.scale.std() > 0.01 * K
    assert 1.01 < louder.mean()
    energy = sliced(inputs.streams[0].x, K).square().sum() / inputs.streams[0].target.square().sum()
    torch.testing.assert_close(torch.tensor(1.0), energy, rtol=0.01, atol=0)
    plain = replace(sliced, scale=torch.full((N,), float(K)))
    weight = torch.ones(len(inputs.streams[0].x)).index_fill_(0, torch.arange(700), 0.0)
    ignored = fit_scale(*expert_agreement(plain, inputs.streams[0].x, inputs.streams[0].neurons, weight, K), K)
    rest = inputs.streams[0].x[700:]
    without = fit_scale(*expert_agreement(plain, rest, mlp.activations(rest), weight[700:], K), K)
    torch.testing.assert_close(without, ignored)


@pytest.mark.parametrize("amplify", AMPLIFICATIONS)
def test_amplifications(amplify: Any) -> None:
    """exact: n; used: k; fitted: no worse than used but for its loudness; any: every expert counts once with all
    on, and graceful below."""
    mlp, inputs = layer()
    recipe = {"group": "activations", "router": "least-squares", "n_shared": 2}
    sliced = slice_by(mlp, inputs, slicing(amplify=amplify, **recipe))
    used = slice_by(mlp, inputs, slicing(amplify="used", **recipe))

    if amplify == "exact":
        assert {float(N)} == set(sliced.scale.tolist())
    elif amplify == "used":
        assert {float(K)} == set(sliced.scale.tolist())
    elif amplify == "fitted":
        ours = sliced(inputs.streams[0].x, K)
        quieter = float((ours * inputs.streams[0].target).sum() / ours.square().sum())
        assert error(replace(sliced, scale=quieter * sliced.scale), inputs) <= error(used, inputs) + 1e-6
    else:
        assert (sliced.expert_weights(inputs.streams[0].x, N).mean(0) - 1).abs().max() < 0.02
        assert error(sliced, inputs, N) < 1e-3
        exact = slice_by(mlp, inputs, slicing(amplify="exact", **recipe))
        assert error(sliced, inputs) < 0.2 * error(exact, inputs)


def test_outlier_neurons_are_always_on() -> None:
    """One neuron makes a huge output for one token in a hundred (an attention sink): it must be in an always-on expert,
    though its mean energy over all tokens may be small."""
    mlp, inputs = layer(n_token=20000)
    down = mlp.down.clone()
    x = inputs.streams[0].x.clone()
    x[5000, 1] = 40.0
    gate, up = mlp.gate.clone(), mlp.up.clone()
    gate[:, 1], up[:, 1] = 0, 0
    gate[77], up[77] = 0, 0
    gate[77, 1], up[77, 1] = 1.0, 0.5
    mlp = MLP(gate, up, down)
    y = mlp(x)

    sliced = slice_by(
        mlp,
        LayerInputs((Stream(K, x, mlp.activations(x), y),)),
        slicing(group="activations", router="least-squares", n_shared=1),
    )

    a = mlp.activations(x).abs() * down.norm(dim=1)
    assert int((a.square().mean(0) > a[:, 77].square().mean()).sum()) >= 10  # its mean alone would not put it there
    assert 77 in sliced.groups[0].tolist()


def test_activations_that_are_not_finite() -> None:
    """An error, not a file of NaN."""
    mlp, inputs = layer()
    inputs.streams[0].x[3, 3] = float("nan")

    with pytest.raises(CalibrationError, match="not finite"):
        slice_by(mlp, inputs, slicing(group="activations", router="least-squares", n_shared=1))


@pytest.mark.parametrize(("k", "expected"), [(12, 8), (8, 4), (4, 2), (2, 1), (1, 0)])
def test_how_many_are_always_on_by_default(k: int, expected: int) -> None:
    """Of 16."""
    assert expected == default_n_shared(16, k)


def test_a_few_experts_leave_one_to_route() -> None:
    """Of two or three experts a quarter is none; a choice that is always the same would not be one."""
    assert {(2, 1): 0, (3, 1): 0, (3, 2): 1, (4, 1): 0, (4, 3): 2} == {
        (n, k): default_n_shared(n, k) for n, k in ((2, 1), (3, 1), (3, 2), (4, 1), (4, 3))
    }
    assert all(default_n_shared(n, k) < k for n in range(2, 65) for k in range(1, n))
