"""scripts/experiments/rivals.py: every rival makes whole, balanced experts of a small layer."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from moe2gguf.experts.mlp import MLP, LayerInputs, Stream
from moe2gguf.spec import Method, Slicing

D_MODEL, D_FF, N, K = 12, 48, 8, 4
EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"


def test_every_rival_slices_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each neuron is in one expert; K experts run per token; FLAP keeps half, and its bias is the mean of the rest."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import rivals

    generator = torch.Generator().manual_seed(0)
    mlp = MLP(*(torch.randn(D_FF, D_MODEL, generator=generator) for _ in range(3)))
    x = torch.randn(640, D_MODEL, generator=generator)
    x[:, 0] = 2.0
    inputs = LayerInputs((Stream(K, x, mlp.activations(x), mlp(x)),))
    slicing = Slicing(N, K, D_FF // N, Method(router="least-squares", amplify="used"))
    slicers: list[Any] = [
        functools.partial(rivals.cmoe, n_shared=2),
        functools.partial(rivals.expert_weaver, n_context=64),
        rivals.random_groups,
        rivals.emoe,
    ]
    for slicer in slicers:
        sliced = slicer(mlp, inputs, slicing)
        assert list(range(D_FF)) == sorted(torch.cat(sliced.groups).tolist())
        assert {D_FF // N} == {len(group) for group in sliced.groups}
        assert {K} == {int(n) for n in (sliced.expert_weights(x, K) > 0).sum(1)}

    layer = rivals.fluctuation(mlp, x)
    (keep,) = rivals.flap_uniform([layer], 0.5)
    assert D_FF // 2 == int(keep.sum())
    expected = (mlp.activations(x) * ~keep @ mlp.down).mean(0)
    torch.testing.assert_close(expected, rivals.flap_bias(layer, keep), rtol=1e-3, atol=1e-4)
