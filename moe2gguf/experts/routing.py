"""Linear routers for llama.cpp's bias-free softmax, and the constant direction that stands in for a bias.

All rows end up *ordering-only*: so small that the softmax is uniform to within their size, in F32. Then only the order
of the logits counts, every chosen expert weighs 1/k, and with all experts on the file is still the dense model.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIZE = 1e-2
"""The largest |logit| on the calibration tokens: small, and far above the rounding of a float32 softmax."""

EXACT_SIZE = 1e-3
"""The same where the file must be the dense model with all experts on; near-ties are then decided by rounding."""

RIDGE = 1e-3
"""Ridge of the regressions, relative to the mean diagonal."""


def ridge(xx: Tensor, xt: Tensor, strength: float = RIDGE) -> Tensor:
    """Rows (n, d) that regress targets on inputs, from the moments xx = X^T X (d, d) and xt = X^T T (d, n).

    Raises:
        torch.linalg.LinAlgError: the inputs are all zero.
    """
    a, b = xx.cpu().double(), xt.cpu().double()  # small, and not every device has doubles
    a.diagonal().add_(strength * a.diagonal().mean())
    return torch.linalg.solve(a, b).T.float().to(xx.device)


def constant_direction(xx: Tensor, x1: Tensor) -> Tensor:
    """v (d,) with v . x close to 1 for every token, from E[x x^T] (d, d) and E[x] (d,).

    A row B * v is then a constant logit B: an always-on expert, or a router bias. The fit is unweighted: up-weighting
    the first token of a sequence costs all others more than it gains.
    """
    return ridge(xx, x1[:, None])[0]


def least_squares(xx: Tensor, xt: Tensor) -> Tensor:
    """Rows (n, d_model) that predict the norm of each expert's output, from X^T X and X^T T.

    The target is D2DMoE's (https://arxiv.org/abs/2310.04361, section 3.2), the regression linear and closed-form.
    The intercept is implicit, because v . x is 1.
    """
    return ridge(xx, xt)


def assemble(rows: Tensor, v: Tensor, n_shared: int, largest: float, size: float = SIZE) -> Tensor:
    """The router (n_shared + n, d_model): always-on rows B * v above every routed logit, all of it ordering-only.

    `largest` is the largest |logit| of the centered rows on the calibration tokens. The always-on rows descend a
    little, so that their order is no tie.
    """
    top = 3.0 * largest if len(rows) and largest > 0 else 1.0
    steps = 1 + 0.05 * torch.arange(n_shared, 0, -1) / max(n_shared, 1)
    return torch.cat([(top * steps)[:, None] * v, rows]) * (size / (1.1 * top))


def concentrated(rows: Tensor, v: Tensor, n_shared: int, routed_mass: float, largest: float) -> Tensor:
    """The router (n_shared + n, d_model) of the `any` mode: the always-on experts hold most of the softmax.

    With all experts on they hold 1 - routed_mass of it, evenly, and each routed expert an equal part of the rest, up
    to its ordering term. Leaving light experts out then rescales the others by at most 1 / (1 - routed_mass).
    """
    shared_weight, routed_weight = (1 - routed_mass) / n_shared, routed_mass / len(rows)
    gap = float(torch.log(torch.tensor(shared_weight / routed_weight)))
    return torch.cat([(gap * v).expand(n_shared, -1), rows * (SIZE / max(largest, 1e-30))])


def centered(rows: Tensor) -> Tensor:
    """The rows less their mean, which the softmax does not see."""
    return rows - rows.mean(0) if len(rows) else rows
