"""What is solved in closed form for the experts that do not run: an output scale per expert, new down projections.

The output scale multiplies an expert's down projection. With an ordering-only router every chosen expert weighs 1/k, so
a scale a gives (a / k) * sum of the chosen outputs: `exact` a = n is the dense MLP with all experts used, `used` a = k
the plain sum at that k, `fitted` what comes closest to the dense output at that k, expert by expert. `any` belongs to
the concentrated router: one over the weight that an expert gets with all used.

The refit asks: given which experts run, which down projections reproduce the dense output best? It minimizes the sum
over tokens of w |y - W h|^2 plus a ridge toward the original W, with h the activations times their expert's weight
(zero where it does not run) and y what the layer should have given. One Cholesky factorization per layer, from second
moments only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe2gguf.experts.hidden_states import chunks

SCALE_RIDGE = 1e-3
"""Ridge of fitted scales, relative to the mean diagonal."""

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Ridge strengths of the refit, relative to the mean diagonal; the held-out tokens choose."""

SKETCH = 8
"""The ridge is chosen by so much fewer directions than there are outputs: it is one number for all of them."""

BLOCKS = 8
"""Symmetric sums are computed in so many block rows, each from its diagonal on: nearly half of the work is saved."""


def fit_scale(gram: Tensor, dot: Tensor, energy: float, k: int) -> Tensor:
    """Return the scale k * m * c (n_expert,) of `fitted`, for k experts used.

    c brings the sum of the chosen experts closest to the dense output, m brings it to the dense output's energy.

    gram (n_expert, n_expert), dot (n_expert,) and energy are those of `moe2gguf.experts.stats.expert_agreement`, at the
    scale k for all.
    """
    # c are the least-squares constants, mostly above 1: what does not run points, on average, where what runs does.
    # The ridge is toward 1, so that experts that hardly run keep their scale.
    ridge = SCALE_RIDGE * gram.diagonal().mean().clamp_min(1e-30)
    c = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), dot + ridge)
    # Least squares shrinks what it cannot predict. m gives the sum the energy of the dense output again, which the
    # layers behind it are used to.
    ours = float(c @ gram @ c)
    m = (energy / ours) ** 0.5 if ours > 0 else 1.0
    return (k * m * c).float()


def inverse_weights(weights: Tensor) -> Tensor:
    """Return the scale of `any`: a_e = sum p / sum p^2 brings every expert's weight closest to 1 with all experts used.

    weights p (n_token, n_expert): the router's, all experts used. With fewer, the output of those that run grows by the
    part of the softmax that was left out.
    """
    return weights.sum(0) / weights.square().sum(0).clamp_min(1e-30)


def add_gram(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right, which is symmetric, to `total` (m, m), in place; only on and above the diagonal.

    left, right: (n_token, m). `mirror` fills in the rest when the last tokens are in.
    """
    for rows in _block_rows(len(total)):
        total[rows, rows.start :].addmm_(left[:, rows].T, right[:, rows.start :])


def mirror(total: Tensor) -> Tensor:
    """Fill in what `add_gram` left out of `total` (m, m), in place, from the other side of the diagonal."""
    for rows in _block_rows(len(total)):
        total[rows.stop :, rows] = total[rows, rows.stop :].T
    return total


def _block_rows(m: int) -> Iterator[slice]:
    return chunks(m, -(-m // BLOCKS))


@dataclass
class Normal:
    """Weighted normal equations: hh (m, m) = sum w h h^T, hy (m, d) = sum w h y^T, yy = sum w |y|^2."""

    hh: Tensor
    hy: Tensor
    yy: float = 0.0

    @classmethod
    def empty(cls, m: int, d: int) -> Normal:
        """Return the sums over no tokens."""
        return cls(torch.zeros(m, m), torch.zeros(m, d))

    def add(self, h: Tensor, y: Tensor, w: Tensor) -> None:
        """Count tokens: h (n_token, m), what is still missing y (n_token, d), weights w (n_token,)."""
        wh = w[:, None] * h
        add_gram(self.hh, h, wh)
        self.hy.addmm_(wh.T, y)
        self.yy += float((w[:, None] * y.square()).sum())

    def finished(self) -> Normal:
        """Return the sums with all of hh: call it once, after the last tokens."""
        return Normal(mirror(self.hh), self.hy, self.yy)

    def __add__(self, other: Normal) -> Normal:
        return Normal(self.hh + other.hh, self.hy + other.hy, self.yy + other.yy)

    def error(self, delta: Tensor) -> float:
        """Return the weighted squared error left when delta (m, d) is added to the map, as a share of yy."""
        left = self.yy - 2 * float((delta * self.hy).sum()) + float((delta * (self.hh @ delta)).sum())
        return left / max(self.yy, 1e-30)

    def solve(self, strength: float) -> Tensor:
        """Return delta (m, d): argmin |y - h delta|^2 + strength * mean(diag hh) * |delta|^2."""
        # The ridge is relative to the mean diagonal, so that strengths mean the same for every layer.
        a = self.hh.clone()
        a.diagonal().add_(strength * a.diagonal().mean())
        return torch.cholesky_solve(self.hy, torch.linalg.cholesky(a))

    def seen_along(self, directions: Tensor) -> Normal:
        """Return the sums with y only along `directions` (d, r), whose squares add up to |y|^2 on average."""
        return Normal(self.hh, self.hy @ directions, self.yy)


def choose_ridge(train: Normal, held_out: Normal) -> tuple[float, float]:
    """Choose the ridge whose solution on `train` is best on `held_out`: (strength, share of the held-out error left).

    Strengths are tried from the middle one on, in both directions, for as long as the held-out error falls. It is
    estimated along random directions, one for every `SKETCH` outputs. (inf, 1.0) where no ridge helps.
    """
    directions = sketch(train.hy.shape[1])
    train, held_out = train.seen_along(directions), held_out.seen_along(directions)
    find_error = functools.cache(lambda i: held_out.error(train.solve(STRENGTHS[i])))
    best = len(STRENGTHS) // 2
    for step in (-1, 1):
        while 0 <= best + step < len(STRENGTHS) and find_error(best + step) < find_error(best):
            best += step
    return (STRENGTHS[best], find_error(best)) if find_error(best) < 1 else (float("inf"), 1.0)


def sketch(d: int) -> Tensor:
    """Return random orthogonal directions (d, r), one for every `SKETCH` outputs, but 32 where there are so many.

    Their length makes the sum of squares along them that of all outputs, on average; all directions give it exactly.
    """
    r = max(d // SKETCH, min(d, 32))
    drawn = torch.randn(d, r, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return (torch.linalg.qr(drawn).Q * (d / r) ** 0.5).to(torch.get_default_device())


def refit(train: Normal, held_out: Normal) -> tuple[Tensor, float, float]:
    """Return (delta (m, d), ridge strength, share of the held-out error that is left), solved on all tokens of both.

    Where no ridge helps, delta is zero.
    """
    # The held-out tokens choose the ridge; afterwards they are not held out any more, and count in the solution.
    strength, error = choose_ridge(train, held_out)
    if error >= 1:
        return torch.zeros_like(train.hy), strength, error
    return (train + held_out).solve(strength), strength, error
