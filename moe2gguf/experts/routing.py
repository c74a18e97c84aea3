"""Linear routers for llama.cpp's bias-free softmax, and the constant direction that stands in for a bias.

All rows end up *ordering-only*: so small that the softmax is uniform to within their size, in float32. Then only the
order of the logits counts, every chosen expert weighs 1/k, and with all experts used the file is still the dense model.
Nothing here sees a token: routers are solved from the moments of the inputs (`moe2gguf.experts.stats`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe2gguf.experts.slicing import EXACT_ROUTER_SIZE, ROUTER_SIZE

ROUTED_MASS = 0.3
"""The routed experts' share of the softmax in the `any` mode."""

RIDGE = 1e-3
"""Ridge of the regressions, relative to the mean diagonal."""


@dataclass(frozen=True)
class RouterMoments:
    """Sums over n_token tokens, of inputs X and targets T.

    xx = X^T X (d_model, d_model), x1 = X^T 1 (d_model,), xt = X^T T (d_model, n), t1 = T^T 1 (n,)
    """

    xx: Tensor
    x1: Tensor
    xt: Tensor
    t1: Tensor
    n_token: int


def solve_ridge(xx: Tensor, xt: Tensor, strength: float = RIDGE) -> Tensor:
    """Return rows (n, d) that regress targets on inputs, from the moments xx = X^T X (d, d) and xt = X^T T (d, n).

    Raises:
        torch.linalg.LinAlgError: the inputs are all zero.
    """
    a, b = xx.cpu().double(), xt.cpu().double()  # small, and not every device has doubles
    a.diagonal().add_(strength * a.diagonal().mean())
    return torch.linalg.solve(a, b).T.float().to(xx.device)


def constant_direction(moments: RouterMoments) -> Tensor:
    """Return v (d_model,) with v . x close to 1 for every token: the least-squares fit of the constant 1.

    A row B * v is then a constant logit B: a shared expert, or a router bias. The fit is unweighted: up-weighting the
    first token of a sequence costs all others more than it gains.
    """
    return solve_ridge(moments.xx, moments.x1[:, None])[0]


def expert_rows(moments: RouterMoments) -> Tensor:
    """Return centered rows (n, d_model) that predict the targets, the norm of each routed expert's output.

    The target is D2DMoE's (https://arxiv.org/abs/2310.04361, section 3.2), the regression linear and closed-form.
    The intercept is implicit, because v . x is 1. The mean row is taken off, which the softmax does not see.
    """
    return center_rows(solve_ridge(moments.xx, moments.xt))


def rows_and_bias(moments: RouterMoments) -> tuple[Tensor, Tensor]:
    """Return centered rows (n, d_model) and biases (n,) that predict the targets, in a graph that has such biases."""
    n, device = moments.n_token, moments.xx.device
    x, t = moments.x1.cpu().double() / n, moments.t1.cpu().double() / n  # not every device has doubles
    xx, xt = moments.xx.cpu() - n * torch.outer(x, x), moments.xt.cpu() - n * torch.outer(x, t)
    rows = center_rows(solve_ridge(xx, xt))
    return rows.to(device), ((t - t.mean()).float() - rows @ x.float()).to(device)


def order_by_sigmoid(rows: Tensor, bias: Tensor, n_shared: int, largest: float) -> tuple[Tensor, Tensor]:
    """Return router rows (n_shared + n, d_model) and selection biases (n_shared + n,) that only order.

    A small logit l has the sigmoid 1/2 + l/4, so a quarter of a logit's bias is what is added to the sigmoid.
    `largest` is the largest |logit| on the calibration tokens.
    """
    size = EXACT_ROUTER_SIZE / max(largest, 1e-30)
    return order_by_softmax(rows, n_shared, largest), torch.cat([torch.zeros(n_shared), bias * (size / 4)])


def order_by_softmax(rows: Tensor, n_shared: int, largest: float) -> Tensor:
    """Return router rows (n_shared + n, d_model) for a softmax over the routed experts alone, which only order."""
    return torch.cat([torch.zeros(n_shared, rows.shape[1]), rows * (EXACT_ROUTER_SIZE / max(largest, 1e-30))])


def center_rows(rows: Tensor) -> Tensor:
    """Return the rows (n, d_model) less their mean."""
    return rows - rows.mean(0) if len(rows) else rows


def assemble_router(rows: Tensor, v: Tensor, n_shared: int, largest: float, amplify: str) -> Tensor:
    """Return the router (n_shared + n, d_model) of centered `rows` (n, d_model), for a mode of `--amplify`.

    `largest` is the largest |logit| of the rows on the calibration tokens.
    """
    if amplify == "any" and n_shared and len(rows):
        return concentrate(rows, v, n_shared, ROUTED_MASS, largest)
    return order_only(rows, v, n_shared, largest, EXACT_ROUTER_SIZE if amplify == "exact" else ROUTER_SIZE)


def order_only(rows: Tensor, v: Tensor, n_shared: int, largest: float, size: float = ROUTER_SIZE) -> Tensor:
    """Put shared rows B * v above every routed logit, and make all so small that the softmax is uniform.

    The shared rows descend a little, so that their order is no tie.
    """
    # B is three times the largest routed logit, so that v . x may fall to about a third before the order breaks.
    top = 3.0 * largest if len(rows) and largest > 0 else 1.0
    steps = 1 + 0.05 * torch.arange(n_shared, 0, -1) / max(n_shared, 1)
    return torch.cat([(top * steps)[:, None] * v, rows]) * (size / (1.1 * top))


def concentrate(rows: Tensor, v: Tensor, n_shared: int, routed_mass: float, largest: float) -> Tensor:
    """Return the router of the `any` mode, in which the shared experts hold most of the softmax.

    With all experts used they hold 1 - routed_mass of it, evenly, and each routed expert an equal part of the rest, up
    to its ordering term. Leaving light experts out then rescales the others by at most 1 / (1 - routed_mass).
    """
    shared_weight, routed_weight = (1 - routed_mass) / n_shared, routed_mass / len(rows)
    gap = float(torch.log(torch.tensor(shared_weight / routed_weight)))
    return torch.cat([(gap * v).expand(n_shared, -1), rows * (ROUTER_SIZE / max(largest, 1e-30))])
