"""What each expert's down projection is multiplied by, (n_expert,).

With an ordering-only router every chosen expert weighs 1/k, so a factor a gives (a / k) * sum of the chosen outputs:
`exact` a = n is the dense MLP with all experts on, `used` a = k the plain sum at that k, `fitted` the least-squares
optimum at that k. `any` belongs to the concentrated router: one over the weight that an expert gets with all on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(n_expert: int, factor: float) -> Tensor:
    """`exact` (factor = n_expert) and `used` (factor = n_expert_used)."""
    return torch.full((n_expert,), float(factor))


def fitted(target_dot_sum: float, sum_dot_sum: float, n_expert: int, n_expert_used: int) -> Tensor:
    """k * c with c the scalar that brings the plain sum of the chosen experts closest to the dense output.

    c = <F, P> / <P, P>, from the two sums over the calibration tokens.
    """
    return uniform(n_expert, n_expert_used * target_dot_sum / max(sum_dot_sum, 1e-30))


def inverse_weights(weights: Tensor) -> Tensor:
    """`any`: the factors a_e = sum p / sum p^2 that bring every expert's weight closest to 1 with all experts on.

    weights p (n_token, n_expert): the router's, all experts on. With fewer, those that run become louder by the part
    of the softmax that was left out.
    """
    return weights.sum(0) / weights.square().sum(0).clamp_min(1e-30)
