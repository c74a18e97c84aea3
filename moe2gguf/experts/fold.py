"""Experts back to one MLP: which constant each expert's output is multiplied by, where that is not known beforehand.

The sparse layer gives y = sum over the chosen experts of w_e(x) E_e(x). One MLP that holds all of them gives
sum over all of c_e E_e(x) with constants c. `factors` finds the c that comes closest to y in the mean square over a
text: n unknowns per layer, so a few thousand tokens are plenty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe2gguf.experts.forward import Layers
from moe2gguf.experts.heal.moe_layer import Layer, Stored

RIDGE = 1e-6
"""Relative to the mean diagonal: an expert that is never active keeps a factor near zero."""

CHUNK = 256


@dataclass(frozen=True)
class Folded:
    """`factors` (n_expert,) float32; `error` is the share of the output's energy that one MLP misses."""

    factors: NDArray[np.float32]
    error: float


def fold(
    layers: Layers, load: Callable[[int], Stored], ids: NDArray[np.int64], k: int, advance: Callable[[int], None]
) -> list[Folded]:
    """The factors of every layer at k experts per token, each fitted on what it sees in the sparse model.

    `layers` is the sparse model, `load` reads a layer's experts, `ids` (n_window, n_context) the text. One layer is in
    memory at a time.
    """
    found = []
    with torch.inference_mode():
        hidden = torch.empty(ids.size, layers.d_model)
        layers.embed(ids, hidden)
        for i in range(len(layers)):
            block = layers.block(i)
            block.attend(hidden, ids.shape[1])
            x = block.mlp_input(hidden)[:]
            layer = Layer(load(i), 1.0).to(x.device).eval()
            folded, y = factors(layer, x, k)
            found.append(folded)
            hidden += y.to(hidden.device)
            layers.release(i)
            advance(ids.size)
    return found


def factors(layer: Layer, x: Tensor, k: int) -> tuple[Folded, Tensor]:
    """The least-squares factors on inputs x (n_token, d_model), and the sparse output (n_token, d_model)."""
    n = len(layer.router.weight)
    gram, dot = torch.zeros(n, n, device=x.device), torch.zeros(n, device=x.device)
    outputs = []
    for part in x.split(CHUNK):
        h = torch.nn.functional.silu(part @ layer.gate.T) * (part @ layer.up.T)
        down = layer.down.reshape(n, layer.d_expert, -1)
        each = torch.einsum("tnf,nfd->tnd", h.reshape(len(part), n, -1), down)
        y = layer(part, k)
        gram += torch.einsum("tnd,tmd->nm", each, each)
        dot += torch.einsum("tnd,td->n", each, y)
        outputs.append(y)
    a = gram.double() + RIDGE * gram.diagonal().double().mean() * torch.eye(n, dtype=torch.float64, device=x.device)
    c = torch.linalg.solve(a, dot.double())
    y = torch.cat(outputs)
    energy = float(y.double().square().sum())
    left = energy - 2 * float(c @ dot.double()) + float(c @ gram.double() @ c)
    return Folded(c.float().cpu().numpy(), max(left, 0.0) / max(energy, 1e-30)), y
