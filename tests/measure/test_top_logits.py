"""The compact reference against the full one: the same where everything is kept, bounded where it is not."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
from textbook import logits

from moe2gguf.errors import HarnessError
from moe2gguf.measure import metrics
from moe2gguf.measure import top_logits as compact
from moe2gguf.measure.metrics import TokenScores


@pytest.mark.parametrize("tail", [metrics.TAIL, -np.inf])
def test_keeping_everything_loses_nothing(tail: float) -> None:
    """With all entries kept every score is the full reference's to 1e-9, and the slack is zero."""
    base, other, targets = logits(40, 300, 0.7)
    found = compact.score_block(compact.keep_top(base, targets, 300, tail), other, targets, tail)
    expected = metrics.score_block(base, other, targets, tail)
    for field in fields(TokenScores):
        np.testing.assert_allclose(
            getattr(found, field.name), getattr(expected, field.name), rtol=1e-9, atol=1e-9, err_msg=field.name
        )


def test_keeping_everything_above_the_tail_loses_no_divergence() -> None:
    """Where the rest is below the tail the KL divergence is exact, though most entries are gone."""
    base, other, targets = logits(40, 300, 0.7)
    base *= 4
    n_above = int(max(np.sum(row - np.logaddexp.reduce(row) > metrics.TAIL) for row in base.astype(np.float64)))
    assert n_above < 300
    found = compact.score_block(compact.keep_top(base, targets, n_above), other, targets)
    np.testing.assert_allclose(found.kl, metrics.score_block(base, other, targets).kl, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.kl_slack, 0, atol=1e-12)


@pytest.mark.parametrize("n_kept", [1, 5, 64, 299])
@pytest.mark.parametrize("noise", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("tail", [metrics.TAIL, -np.inf])
def test_the_true_divergence_is_within_the_bounds(n_kept: int, noise: float, tail: float) -> None:
    """The true KL and overlap are within their slack for every token; the likelihoods are exact whatever is kept."""
    base, other, targets = logits(60, 300, noise, seed=n_kept)
    base[::2] /= 5  # flat distributions, where much is not kept
    found = compact.score_block(compact.keep_top(base, targets, n_kept, tail), other, targets, tail)
    expected = metrics.score_block(base, other, targets, tail)
    assert np.all(found.kl <= expected.kl + 1e-9)
    assert np.all(expected.kl <= found.kl + found.kl_slack + 1e-9)
    assert np.all(found.overlap <= expected.overlap + 1e-9)
    assert np.all(expected.overlap <= found.overlap + found.overlap_slack + 1e-9)
    for name in ("nll", "nll_base", "p_change", "same_top"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-9)


def test_a_worked_example() -> None:
    """Three tokens, one kept: the bounds written out by hand."""
    base = np.log(np.array([[0.5, 0.3, 0.2]])).astype(np.float32)
    other = np.log(np.array([[0.4, 0.5, 0.1]])).astype(np.float32)
    targets = np.array([0], np.int32)
    found = compact.score_block(compact.keep_top(base, targets, 1), other, targets)
    kept = 0.5 * math.log(0.5 / 0.4)
    low = 0.5 * math.log(0.5 / 0.6)
    high = 0.3 * math.log(0.3) + 0.2 * math.log(0.2) - 0.5 * math.log(0.1)
    assert (kept + low, high - low) == pytest.approx((found.kl[0], found.kl_slack[0]), abs=1e-6)


def test_ties_at_the_top_go_to_the_lowest_id() -> None:
    """The kept entries are in the order the full comparison uses."""
    base = np.array([[1, 3, 3, 0, 2]], np.float32)
    rows = compact.keep_top(base, np.array([0], np.int32), 4)
    assert [1, 2, 4, 0] == rows["ids"][0].tolist()


@pytest.mark.parametrize("spoil", ["base", "other"])
def test_bad_numbers_are_counted(spoil: str) -> None:
    """A NaN on either side is counted and no order is claimed."""
    base, other, targets = logits(10, 30, 0.1)
    (base if spoil == "base" else other)[3, 4] = np.nan
    found = compact.score_block(compact.keep_top(base, targets, 10), other, targets)
    assert [0, 0, 0, 1, 0, 0, 0, 0, 0, 0] == found.n_bad.tolist()
    assert math.isnan(found.same_top[3])


def test_the_room_decides_how_much_is_kept() -> None:
    """All as float32 where that fits, else as many records as fit to the byte, else a refusal that says so."""
    assert compact.count_entries_to_keep(100, 1000, 400_000) is None
    n = compact.count_entries_to_keep(100, 1000, 399_999)
    assert n is not None
    assert 100 * compact.row_type(n).itemsize <= 399_999 < 100 * compact.row_type(n + 1).itemsize
    assert (1040, 1000) == (compact.row_type(125).itemsize, compact.row_type(120).itemsize)
    with pytest.raises(HarnessError, match="not even the 64 largest"):
        compact.count_entries_to_keep(100, 1000, 40_000)
