"""Student's t against the printed tables, and intervals against their definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe2gguf.measure.intervals import mean_interval, paired_interval, share_interval, t_probability, t_quantile


@pytest.mark.parametrize(
    ("n_free", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (7, 2.3646), (10, 2.2281), (30, 2.0423), (120, 1.9799)],
)
def test_quantiles_are_those_of_the_tables(n_free: int, expected: float) -> None:
    """The 97.5 % points, four decimals, odd and even degrees of freedom."""
    assert expected == pytest.approx(t_quantile(0.975, n_free), abs=5.1e-5)


@pytest.mark.parametrize("n_free", [1, 2, 5, 8, 41])
def test_the_probability_is_the_integral_of_the_density(n_free: int) -> None:
    """The finite series equals a numerical integral of Student's density."""
    x = np.linspace(0, 1.7, 20_001)
    scale = math.gamma((n_free + 1) / 2) / (math.sqrt(n_free * math.pi) * math.gamma(n_free / 2))
    density = scale * (1 + x**2 / n_free) ** (-(n_free + 1) / 2)
    assert 0.5 + np.trapezoid(density, x) == pytest.approx(t_probability(1.7, n_free), abs=1e-9)


def test_a_worked_interval() -> None:
    """Samples 1, 2, 3: mean 2, standard error 1 / sqrt 3, two degrees of freedom."""
    found = mean_interval([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert (2.0, 2 - half, 2 + half) == pytest.approx((found.mean, found.low, found.high), abs=1e-5)
    assert not found.excludes_zero


def test_pairing_takes_out_what_both_share() -> None:
    """A small constant difference between two noisy series is found, and its sign is first - second."""
    text = [5.0, 1.0, 9.0, 3.0]
    better = [x - 0.1 + wobble for x, wobble in zip(text, [0.01, -0.01, 0.01, -0.01], strict=True)]
    found = paired_interval(better, text)
    assert found.mean == pytest.approx(-0.1)
    assert found.excludes_zero
    assert not mean_interval([a - b for a, b in zip(better, text[::-1], strict=True)]).excludes_zero


def test_coverage() -> None:
    """About 95 of 100 intervals from five normal samples hold the true mean."""
    rng = np.random.default_rng(0)
    held = [mean_interval(list(rng.standard_normal(5))) for _ in range(2000)]
    assert 0.95 == pytest.approx(np.mean([not i.excludes_zero for i in held]), abs=0.015)


def test_too_few_samples() -> None:
    """One sample says nothing about its spread; none, or unequal lengths, are refused."""
    assert (-math.inf, math.inf) == (mean_interval([3.0]).low, mean_interval([3.0]).high)
    with pytest.raises(ValueError, match="no samples"):
        mean_interval([])
    with pytest.raises(ValueError, match="zip"):
        paired_interval([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("n_right", "n"), [(0, 10), (1, 10), (5, 10), (150, 300), (300, 300)])
def test_an_interval_of_a_share_holds_what_its_score_test_does_not_reject(n_right: int, n: int) -> None:
    """At both ends the share lies 1.96 standard errors of that end away; at 0 and 1 it ends there."""
    found = share_interval(n_right, n)
    for end in (found.low, found.high):
        assert (found.mean - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / n, rel=1e-5)
    assert 0 <= found.low < found.high <= 1
    assert (n_right == 0, n_right == n) == (found.low == 0, found.high == 1)
