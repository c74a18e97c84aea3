"""What each expert's down projection is multiplied by, (n_expert,).

With an ordering-only router every chosen expert weighs 1/k, so a factor a gives (a / k) * sum of the chosen outputs:
`exact` a = n is the dense MLP with all experts on, `used` a = k the plain sum at that k, `fitted` what comes closest to
the dense output at that k, expert by expert. `any` belongs to the concentrated router: one over the weight that an
expert gets with all on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe2gguf.experts.hidden_states import Rows, chunks
from moe2gguf.experts.mlp import Carved

FITTED_RIDGE = 1e-3
"""Relative to the mean diagonal."""


def uniform(n_expert: int, factor: float) -> Tensor:
    """`exact` (factor = n_expert) and `used` (factor = n_expert_used)."""
    return torch.full((n_expert,), float(factor))


def fitted(plain: Carved, x: Rows, weight: Tensor, k: int) -> Tensor:
    """k * m * c: c (n_expert,) brings the sum of the chosen experts closest to the dense output, m to its loudness.

    plain   the layer amplified by k; x (n_token, d_model) its inputs, `weight` (n_token,) how much each token counts

    c are the least-squares constants, mostly above 1: what does not run points, on average, where what runs does. A
    small ridge keeps experts that hardly run at 1. Least squares makes quiet what it cannot predict; m gives the sum
    the energy of the dense output again, which the layers behind it are used to.
    """
    gram, dot, energy = _agreement(plain, x, weight, k)
    ridge = FITTED_RIDGE * gram.diagonal().mean().clamp_min(1e-30)
    c = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), dot + ridge)
    ours = float(c @ gram @ c)
    m = (energy / ours) ** 0.5 if ours > 0 else 1.0
    return (k * m * c).float().to(x[slice(0, 1)].device)


def _agreement(plain: Carved, x: Rows, weight: Tensor, k: int) -> tuple[Tensor, Tensor, float]:
    """Sums over the tokens of <y_e, y_f> (n_expert, n_expert), <y_e, F> (n_expert,) and |F|^2, in doubles on the CPU.

    y_e is what an expert gives, zero where it does not run, F what the dense MLP gives.
    """
    n, down = len(plain.groups), plain.mlp.down
    gram, dot, energy = torch.zeros(n, n), torch.zeros(n), 0.0
    for part in chunks(len(x)):
        h, runs = plain.mlp.hidden(x[part]), plain.weights(x[part], k).T[..., None]
        outputs = torch.stack([h[:, group] @ down[group] for group in plain.groups])
        dense, chosen = outputs.sum(0), (outputs * runs).flatten(1)
        weighted = (outputs * (runs * weight[part][:, None])).flatten(1)
        gram.addmm_(weighted, chosen.T)
        dot += weighted @ dense.flatten()
        energy += float(dense.square().sum(1) @ weight[part])
    return gram.cpu().double(), dot.cpu().double(), energy


def inverse_weights(weights: Tensor) -> Tensor:
    """`any`: the factors a_e = sum p / sum p^2 that bring every expert's weight closest to 1 with all experts on.

    weights p (n_token, n_expert): the router's, all experts on. With fewer, those that run become louder by the part
    of the softmax that was left out.
    """
    return weights.sum(0) / weights.square().sum(0).clamp_min(1e-30)
