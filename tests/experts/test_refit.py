"""moe2gguf.experts.refit: the ridge solution, against a brute-force one."""

from typing import Any

import pytest
import torch

from moe2gguf.experts.refit import STRENGTHS, Normal, choose_ridge, refit

GENERATOR = torch.Generator().manual_seed(0)


def problem(n: Any = 300, m: Any = 7, d: Any = 4) -> Any:
    """(h, y, w): y is linear in h, with noise."""
    h = torch.randn(n, m, generator=GENERATOR)
    y = h @ torch.randn(m, d, generator=GENERATOR) + 0.5 * torch.randn(n, d, generator=GENERATOR)
    return h, y, torch.rand(n, generator=GENERATOR)


def filled(h: Any, y: Any, w: Any, parts: Any = 3) -> Any:
    """Normal equations of all tokens, added in parts."""
    normal = Normal.empty(h.shape[1], y.shape[1])
    for a, b, c in zip(h.chunk(parts), y.chunk(parts), w.chunk(parts), strict=True):
        normal.add(a, b, c)
    return normal.finished()


def test_solve_is_the_weighted_ridge_solution() -> None:
    """The augmented least squares problem, solved directly."""
    h, y, w = problem()
    normal = filled(h, y, w)
    root = w.sqrt()[:, None]
    strength = 0.2
    ridge = (strength * (h.T @ (w[:, None] * h)).diagonal().mean()).sqrt() * torch.eye(7)
    expected = torch.linalg.lstsq(torch.cat([root * h, ridge]), torch.cat([root * y, torch.zeros(7, 4)])).solution

    torch.testing.assert_close(expected, normal.solve(strength), rtol=1e-3, atol=1e-4)


def test_error_is_the_share_that_is_left() -> None:
    """Against the residual itself."""
    h, y, w = problem()
    delta = torch.randn(7, 4, generator=GENERATOR)
    left = (w[:, None] * (y - h @ delta).square()).sum() / (w[:, None] * y.square()).sum()

    assert abs(float(left) - filled(h, y, w).error(delta)) < 1e-4


def test_a_refit_is_never_worse_on_its_own_tokens() -> None:
    """All tokens together: at most the error of no refit; and much better where y is linear in h."""
    h, y, w = problem()
    train, held_out = filled(h[:200], y[:200], w[:200]), filled(h[200:], y[200:], w[200:])

    delta, strength, error = refit(train, held_out)

    assert (train + held_out).error(delta) < 0.5
    assert error < 0.5
    assert strength > 0


def test_noise_is_left_alone() -> None:
    """Where what the first tokens say is wrong for the others, the weights stay what they are."""
    h, _, w = problem()
    noise = 10 * torch.randn(20, 4, generator=GENERATOR)

    delta, _, error = refit(filled(h[:20], noise, w[:20]), filled(h[:20], -noise, w[:20]))

    assert (0.0, 1.0) == (float(delta.abs().max()), error)


def test_few_tokens_are_refitted_with_caution() -> None:
    """Fewer tokens than unknowns and much noise: the strongest ridges are of use where weaker ones do harm."""
    few, true = torch.Generator().manual_seed(1), torch.randn(60, 4, generator=torch.Generator().manual_seed(2))
    h = torch.randn(300, 60, generator=few)
    y = h @ true + 16 * torch.randn(300, 4, generator=few)
    weight = torch.ones(300)
    train, held_out = filled(h[:40], y[:40], weight[:40]), filled(h[40:], y[40:], weight[40:])

    _, strength, error = refit(train, held_out)

    tried = {strength: held_out.error(train.solve(strength)) for strength in STRENGTHS}
    assert strength == min(tried, key=lambda strength: tried[strength])
    assert error == pytest.approx(tried[strength], rel=1e-5)
    assert tried[1.0] > 1 > error


def test_a_sketch_of_the_outputs_chooses_the_ridge() -> None:
    """Of 256 outputs an eighth is looked at: the strength is the best one or its neighbor, the error right to 5 %."""
    GENERATOR.manual_seed(0)  # whatever tests ran before
    h, y, w = problem(n=570, m=60, d=256)
    y = y + 8 * torch.randn(y.shape, generator=GENERATOR)
    train, held_out = filled(h[:70], y[:70], w[:70]), filled(h[70:], y[70:], w[70:])

    strength, error = choose_ridge(train, held_out)

    tried = [held_out.error(train.solve(strength)) for strength in STRENGTHS]
    best = tried.index(min(tried))
    assert abs(STRENGTHS.index(strength) - best) <= 1
    assert error == pytest.approx(min(tried), rel=0.05)
