"""Acceptance and speed-up of drafts against speculative sampling, simulated token by token in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from textbook import logits

from moe2gguf.measure import metrics
from moe2gguf.measure.drafts import DraftGain, expect_tokens, find_best_draft

N_ROUND = 40_000


def softmax(x: NDArray[np.float32]) -> NDArray[np.float64]:
    e = np.exp(x.astype(np.float64) - x.max())
    return np.asarray(e / e.sum())


def draw(rng: np.random.Generator, p: NDArray[np.float64]) -> int:
    return int(np.searchsorted(np.cumsum(p), rng.random() * p.sum(), side="right"))


def speculate(p: NDArray[np.float64], q: NDArray[np.float64], g: int, rng: np.random.Generator) -> list[int]:
    """One round: g tokens of the draft q, each kept with probability min(1, p / q), then one of the target's own."""
    kept: list[int] = []
    for _ in range(g):
        token = draw(rng, q)
        if rng.random() >= min(1.0, p[token] / q[token]):
            return [*kept, draw(rng, np.maximum(p - q, 0))]
        kept.append(token)
    return [*kept, draw(rng, p)]


@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_the_simulation_accepts_the_overlap_and_speeds_up_as_said(noise: float) -> None:
    """Tokens are the target's, accepted as often as the overlap says, and take the time that the formula says."""
    base, other, targets = logits(1, 30, noise)
    p, q = softmax(base[0] / 3), softmax(other[0] / 3)
    (acceptance,) = metrics.score_block((base / 3).astype(np.float32), (other / 3).astype(np.float32), targets).overlap
    rng = np.random.default_rng(1)
    g, draft_time, target_time, batch_time = 3, 0.2, 1.0, 1.4
    rounds = [speculate(p, q, g, rng) for _ in range(N_ROUND)]
    first = np.bincount([one[0] for one in rounds], minlength=30) / N_ROUND
    assert np.abs(first - p).max() < 0.01
    assert np.mean([len(one) > 1 for one in rounds]) == pytest.approx(acceptance, abs=0.01)
    n_token = sum(len(one) for one in rounds)
    assert n_token / N_ROUND == pytest.approx(expect_tokens(acceptance, g), rel=0.01)
    simulated = n_token * target_time / (N_ROUND * (g * draft_time + batch_time))
    found = find_best_draft(acceptance, draft_time, target_time, {g: batch_time})
    assert (g, pytest.approx(simulated, rel=0.01)) == (found.n_draft, found.speed_up)


def test_the_closed_form_and_its_ends() -> None:
    """(1 - a^(g+1)) / (1 - a); one token where nothing is accepted, all where everything is."""
    assert expect_tokens(0.7, 4) == pytest.approx((1 - 0.7**5) / 0.3)
    assert (1, 5) == (expect_tokens(0.0, 4), expect_tokens(1.0, 4))


def test_the_best_length_is_chosen_and_a_slow_draft_is_told() -> None:
    """A cheap draft that is always right drafts as long as it may; one as slow as its target never pays."""
    flat = {1: 1.0, 4: 1.0, 8: 1.0}
    assert DraftGain(8, 9.0) == find_best_draft(1.0, 0.0, 1.0, flat)
    assert 1 > find_best_draft(0.9, 1.0, 1.0, flat).speed_up
    assert 1 == find_best_draft(0.3, 0.3, 1.0, flat).n_draft
