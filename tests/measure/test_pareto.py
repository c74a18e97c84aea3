"""The front of quality against speed, and the choice from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe2gguf.measure import metrics
from moe2gguf.measure.grid import RunConfig
from moe2gguf.measure.pareto import find_pareto_front, recommend
from moe2gguf.measure.results import ResultRow, summarize_quality
from moe2gguf.measure.speed import Run, summarize_runs

SCORES = metrics.score_block(*[np.eye(4, dtype=np.float32)] * 2, np.arange(4, dtype=np.int32))  # type: ignore[arg-type, call-arg]
NUMBERS = st.integers(0, 5).map(float)


def row(name: str, kl: float, speed: float, status: str = "ok") -> ResultRow:
    """A row with a given mean KL divergence and generation speed."""
    measured = summarize_quality([SCORES], 1.0)
    return ResultRow(
        RunConfig(Path(name), 0, 0, "cpu", "F32", 1, 1, ""),
        status,  # type: ignore[arg-type]
        quality=replace(measured, summary=replace(measured.summary, kl_mean=kl)),
        speed=summarize_runs([Run(1.0, speed, 1.0, 1.0, 1)]),
    )


@given(st.lists(st.tuples(st.just(""), NUMBERS, NUMBERS), min_size=1, max_size=8))
def test_the_front_is_what_nothing_beats(points: list[tuple[str, float, float]]) -> None:
    """Against the definition: a point is on it unless another is at least as good in both and better in one."""

    def beaten(a: tuple[str, float, float]) -> bool:
        return any(b[1] <= a[1] and b[2] >= a[2] and b[1:] != a[1:] for b in points)

    expected = sorted({p for p in points if not beaten(p)}, key=lambda p: -p[2])
    assert expected == find_pareto_front(points)


def test_the_fastest_that_is_close_enough_is_recommended() -> None:
    """Within 0.05 nats; faster ones are on the front but too far off, slower ones are not better for it."""
    recommendation = recommend(
        [row("exact", 0.0, 10), row("close", 0.04, 20), row("far", 1.0, 40), row("slow", 0.04, 5)]
    )
    assert recommendation is not None
    assert (("far", "close", "exact"), "close") == (recommendation.front, recommendation.label)
    assert recommendation.reason.startswith(
        "of 4 the fastest within 0.05 nats per token of the reference: KL divergence 0.04"
    )


@pytest.mark.parametrize(("ratio", "said"), [(0.9, True), (1.2, False)])
def test_where_the_close_ones_are_slower_than_the_reference_the_reason_says_so(ratio: float, said: bool) -> None:
    """A person who looks for speed need not take it."""
    close = row("close", 0.04, 20)
    assert close.speed is not None
    recommendation = recommend([replace(close, speed=replace(close.speed, ratio=ratio)), row("far", 1.0, 40)])
    assert recommendation is not None
    assert said is recommendation.reason.endswith("; so none that is so close is faster than it")


def test_where_nothing_is_close_the_closest_is_named_with_a_warning() -> None:
    """And the reference is recommended for quality."""
    recommendation = recommend([row("far", 1.0, 40), row("farther", 2.0, 80)])
    assert recommendation is not None
    assert "far" == recommendation.label
    assert "the reference itself is the better choice" in recommendation.reason


@pytest.mark.parametrize("rows", [[], [replace(row("a", 0, 1), speed=None)], [row("a", 0, 1, "failed")]])
def test_without_sound_and_timed_rows_there_is_no_choice(rows: list[ResultRow]) -> None:
    """A failed row is never recommended."""
    assert recommend(rows) is None
