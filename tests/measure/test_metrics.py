"""The vectorized metrics against a textbook version, one token and one vocabulary entry at a time, in float64."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import numpy as np
import pytest
from textbook import logits, textbook_summary, textbook_token

from moe2gguf.measure import metrics
from moe2gguf.measure.metrics import TokenScores


@pytest.mark.parametrize("tail", [metrics.TAIL, -np.inf])
@pytest.mark.parametrize(("n_vocab", "noise"), [(2, 1.0), (7, 0.5), (300, 0.0), (300, 1e-5), (300, 2.0), (40_000, 1.0)])
def test_scores_equal_the_textbook(n_vocab: int, noise: float, tail: float) -> None:
    """Every score of every token equals the textbook's to 1e-9, with and without the tail."""
    base, other, targets = logits(40 if n_vocab < 1000 else 5, n_vocab, noise)
    scores = metrics.score_block(base, other, targets, tail)
    expected = [textbook_token(*row, tail) for row in zip(base, other, targets, strict=True)]
    for field in fields(TokenScores):
        column = [token[field.name] for token in expected]
        np.testing.assert_allclose(getattr(scores, field.name), column, rtol=1e-9, atol=1e-9, err_msg=field.name)


def test_summary_equals_the_textbook() -> None:
    """Every sum equals the textbook's to 1e-9."""
    base, other, targets = logits(200, 50, 0.7)
    summary = metrics.as_json(metrics.summarize(metrics.score_block(base, other, targets)))
    flat = {k: v for k, v in summary.items() if k != "kl_percentiles"}
    flat |= {f"kl_percentiles.{p}": v for p, v in summary["kl_percentiles"].items()}
    rows = zip(base, other, targets, strict=True)
    assert flat == pytest.approx(
        textbook_summary([textbook_token(*row, metrics.TAIL) for row in rows]), rel=1e-9, abs=1e-9
    )


def test_worked_example() -> None:
    """Two tokens in the vocabulary, probabilities 1/2, 1/2 against 1/4, 3/4: KL = ln(2 / sqrt 3)."""
    base = np.log(np.array([[0.5, 0.5]])).astype(np.float32)
    other = np.log(np.array([[0.25, 0.75]])).astype(np.float32)
    scores = metrics.score_block(base, other, np.array([1], np.int32))
    assert scores.kl[0] == pytest.approx(math.log(2 / math.sqrt(3)), abs=1e-7)
    assert scores.p_change[0] == pytest.approx(0.25, abs=1e-7)
    assert math.exp(scores.nll[0]) == pytest.approx(4 / 3, abs=1e-6)


def test_blocks_join_to_the_whole() -> None:
    """Scoring block by block and joining gives what scoring at once gives, but for the order of sums."""
    base, other, targets = logits(30, 20_000, 0.3)
    whole = metrics.score_block(base, other, targets)
    parts = [metrics.score_block(base[i : i + 7], other[i : i + 7], targets[i : i + 7]) for i in range(0, 30, 7)]
    for field in fields(TokenScores):
        np.testing.assert_allclose(
            getattr(metrics.join_scores(parts), field.name), getattr(whole, field.name), rtol=1e-12
        )


def test_ties_go_to_the_lowest_id() -> None:
    """Of equal logits the first counts as the most likely, as in llama.cpp."""
    base = np.array([[1, 3, 3, 0]], np.float32)
    other = np.array([[1, 3, 2, 0]], np.float32)
    assert metrics.score_block(base, other, np.array([0], np.int32)).same_top.tolist() == [1.0]
    assert metrics.score_block(base, other[:, ::-1], np.array([0], np.int32)).same_top.tolist() == [0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_numbers_are_counted_and_never_averaged_away(bad: float) -> None:
    """One NaN or infinite logit is counted, turns the means into NaN, and becomes null in JSON."""
    base, other, targets = logits(20, 30, 0.1)
    other[3, 4] = bad
    summary = metrics.summarize(metrics.score_block(base, other, targets))
    assert summary.n_bad == 1
    assert math.isnan(summary.top1)
    assert math.isnan(summary.top5)
    assert not math.isfinite(summary.max_difference)
    assert json.loads(json.dumps(metrics.as_json(summary), allow_nan=False))["top1"] is None


def test_one_token_has_no_error_and_none_is_refused() -> None:
    """A standard error needs two tokens; without any there is nothing to summarize."""
    base, other, targets = logits(1, 30, 0.1)
    summary = metrics.summarize(metrics.score_block(base, other, targets))
    assert math.isnan(summary.kl_error)
    assert metrics.as_json(summary)["kl_error"] is None
    with pytest.raises(ValueError, match="no scored token"):
        metrics.summarize(TokenScores(*[np.empty(0)] * 10, np.empty(0, np.int64)))  # type: ignore[arg-type, call-arg]


def test_a_summary_comes_back_from_json() -> None:
    """What `as_json` made is read back to the same numbers, NaN included."""
    base, other, targets = logits(1, 30, 0.1)
    summary = metrics.summarize(metrics.score_block(base, other, targets))
    again = metrics.Summary.from_dict(json.loads(json.dumps(metrics.as_json(summary))))
    assert str(again) == str(summary)
    with pytest.raises(TypeError):
        metrics.Summary.from_dict({**metrics.as_json(summary), "invented": 1})
