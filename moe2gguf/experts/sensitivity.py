"""What the predictions feel of each layer's output: from gradients, one layer's weights in memory at a time.

To second order, a small change y of what an MLP gives changes the predictions by the divergence y^T F y / 2. F is the
Fisher information: the mean over tokens of g g^T, with g the gradient of the log-likelihood of tokens that are drawn
from the model's own predictions (https://arxiv.org/abs/1412.1193, section 5). Energies |y^T R|^2, with R R^T = F, rank
neurons and experts by what their absence does to the predictions.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe2gguf.errors import CalibrationError
from moe2gguf.experts.forward import Layers
from moe2gguf.experts.hidden_states import HiddenStates, allocate, chunks
from moe2gguf.experts.stats import cap_massive_tokens
from moe2gguf.progress import Progress

TOKENS_PER_DIMENSION, LEAST, MOST = 4, 2048, 4096
"""Tokens that are read for each dimension of the hidden states, and their least and largest number: with 3.6 for each
nothing is lost, with 1.8 half of the gain (docs/log/experts.md)."""

FLOOR = 1e-3
"""Added to every eigenvalue of F, relative to their mean: no direction of the output is free."""

TOKENS_AT_ONCE = 256
"""Tokens whose logits are in memory together."""


def measure_sensitivity(
    layers: Layers, ids: NDArray[np.int64], seed: int, memory: int, spill: Path, progress: Progress
) -> list[Tensor]:
    """Return the root R of F, (d_model, d_model) on the CPU, for every layer.

    ids     (n_window, n_context) token ids; some windows, at equal distances, are read
    seed    decides the drawn tokens
    memory  bytes of hidden states that are kept in memory; the rest is in files of `spill`

    `progress` receives the stage "gradients" and the tokens times layers done, there and back.

    Raises:
        CalibrationError: hidden states or gradients are not finite, or the disk has no room.
    """
    n_context = ids.shape[1]
    n_token = min(max(TOKENS_PER_DIMENSION * layers.d_model, LEAST), MOST)
    ids = ids[:: max(ids.size // n_token, 1)]
    # What every layer starts from, and what the last one leaves, is kept for the way back.
    names = {f"into-{i}": ids.size for i in range(len(layers) + 1)}
    hidden = allocate(names, layers.d_model, memory, spill)
    layers.embed(ids, hidden[0])
    with progress("gradients", 2 * ids.size * len(layers)) as advance:
        for i, block in layers.blocks():
            for part in chunks(ids.size, n_context):
                with torch.no_grad():
                    hidden[i + 1][part] = block(hidden[i][part].to(block.device), n_context).cpu()
            advance(ids.size)
        gradients = _from_logits(layers, hidden[-1], seed)
        roots = list[Tensor]()
        for i, block in layers.blocks(reverse=True):
            roots.insert(0, find_root(gradients))
            for part in chunks(ids.size, n_context):
                x = hidden[i][part].to(block.device).requires_grad_()
                (gradient,) = torch.autograd.grad(block(x, n_context), x, gradients[part].to(block.device))
                gradients[part] = gradient.cpu()
            advance(ids.size)
    return roots


def _from_logits(layers: Layers, hidden: HiddenStates, seed: int) -> Tensor:
    """Return (n_token, d_model): gradients of -log p(drawn token) by the last layer's hidden states."""
    head, generator = layers.head(), torch.Generator("cpu").manual_seed(seed)
    found = []
    for part in chunks(len(hidden), TOKENS_AT_ONCE):
        x = hidden[part].to(layers.device).requires_grad_()
        logits = head(x)
        if not logits.isfinite().all():
            raise CalibrationError("the logits are not finite; check the checkpoint's weights with `moe2gguf verify`")
        p = logits.detach().softmax(-1)
        drawn = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
        by_logits = p.scatter_add(1, drawn, -torch.ones_like(drawn, dtype=p.dtype))
        found.append(torch.autograd.grad(logits, x, by_logits)[0].cpu())
    return torch.cat(found)


def find_root(gradients: Tensor) -> Tensor:
    """Return R (d, d) of gradients (n, d): R R^T is their mean outer product, of trace d, plus a floor.

    Raises:
        CalibrationError: they are not finite.
    """
    if not gradients.isfinite().all():
        raise CalibrationError("gradients are not finite; check the checkpoint's weights with `moe2gguf verify`")
    weight = cap_massive_tokens(gradients.square().sum(1))
    values, vectors = torch.linalg.eigh(((gradients * weight[:, None]).T @ gradients).double())
    values = values.clamp_min(0) / values.mean().clamp_min(1e-300) + FLOOR
    return (vectors * values.sqrt()).float()
