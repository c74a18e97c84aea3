"""moe2gguf.experts.heal.layerwise on one layer: what is solved, and on which windows."""

from typing import Any

import numpy as np
import torch

from moe2gguf.experts.heal.layerwise import CountedWindows, LayerData, train_layer
from moe2gguf.experts.heal.moe_layer import MoELayer
from moe2gguf.experts.heal.settings import HealSettings, Optimizer, Training
from moe2gguf.experts.heal.work import ExpertWeights
from moe2gguf.experts.refit import STRENGTHS

SHAPES = ((4, 6), (4, 5, 6), (4, 5, 6), (4, 6, 5))
COUNTS = [1, 2, 3, 4, 2, 3, 2, 4]
N_TRAIN = 6


def problem() -> Any:
    """(layer, data): the targets are what the layer gives with another down projection, plus noise."""
    rng = np.random.default_rng(0)
    weights = ExpertWeights(*(rng.normal(size=shape).astype(np.float32) for shape in SHAPES))
    layer = MoELayer(weights, 1.0)
    torch.manual_seed(0)
    x = torch.randn(len(COUNTS), 40, 6)
    other = torch.randn_like(layer.down)
    with torch.no_grad():
        outputs = [
            layer.activations(window, k) @ (layer.down + 0.3 * other) for window, k in zip(x, COUNTS, strict=True)
        ]
    target = torch.stack(outputs) + 0.05 * torch.randn(len(COUNTS), 40, 6)
    ids = np.zeros((len(COUNTS), 40), np.int64)
    return layer, LayerData(x, target, CountedWindows(ids, COUNTS, N_TRAIN), layer)


def test_the_closed_form_sees_the_training_windows_alone() -> None:
    """The down projection of one of the ridge problems over them, solved directly; held-out windows only choose."""
    layer, data = problem()
    before = layer.down.detach().clone()
    with torch.no_grad():
        h = torch.cat([layer.activations(data.x[w], COUNTS[w]) for w in range(N_TRAIN)]).double()
    y = data.target[:N_TRAIN].flatten(0, 1).double() - h @ before.double()
    w = data.weight[:N_TRAIN].flatten()[:, None].double()

    line = train_layer(layer, data, HealSettings(Training(("down",), layerwise=0)), 0)

    strength = line.refit_strength
    hh = h.T @ (w * h)
    expected = torch.linalg.solve(hh + strength * hh.diagonal().mean() * torch.eye(len(hh)), h.T @ (w * y))
    assert strength in STRENGTHS
    torch.testing.assert_close(layer.down.detach() - before, expected.float(), rtol=1e-3, atol=1e-4)


def test_passes_by_gradient_go_on_where_the_closed_form_ends() -> None:
    """The best pass on held-out windows stays; gate, up and router are what the closed form cannot change."""
    layer, data = problem()
    settings = HealSettings(Training(layerwise=20, batch=2), optimizer=Optimizer(layer_lr=3e-3))
    torch.manual_seed(1)
    with torch.no_grad():
        layer.gate += 0.2 * torch.randn_like(layer.gate)

    line = train_layer(layer, data, settings, 0)

    assert line.error_after < 0.9 * line.error_refit < 0.9 * line.error_before


def test_every_count_weighs_the_same() -> None:
    """What the layer leaves at the start is weighed alike at each count, whatever few experts lose."""
    layer, data = problem()
    with torch.no_grad():
        errors = {k: [float(data.error(layer, w)) for w in range(len(COUNTS)) if COUNTS[w] == k] for k in set(COUNTS)}

    means = [sum(found) / len(found) for found in errors.values()]
    assert max(means) - min(means) < 1e-4 * max(means)
