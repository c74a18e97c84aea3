"""Quality against speed: which runs nothing beats in both, and which one is recommended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe2gguf.measure.results import Recommendation, ResultRow

TOLERANCE = 0.05
"""Mean KL divergence, nats per token, that a recommended file may have: about 5 % of perplexity, and a limit on every
other change too, which a perplexity that happens to be equal is not."""

Point = tuple[str, float, float]
"""A label, a KL divergence in nats per token, and tokens per second or another number of which more is better."""


def find_pareto_front(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other point beats or equals in both, fastest first.

    Of points equal in both the first one stays.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (-p[2], p[1])):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def recommend(rows: Sequence[ResultRow]) -> Recommendation | None:
    """Return the front and the recommended row; None unless a row has both sound quality and speed.

    Recommended is the fastest row whose KL divergence is at most TOLERANCE. Where none is, it is the row closest to the
    reference, and the reason tells so.
    """
    sound = {row.config.label: row for row in rows if row.status == "ok" and row.quality and row.speed}
    points = [
        (label, row.quality.summary.kl_mean, row.speed.generation.median)
        for label, row in sound.items()
        if row.quality and row.speed
    ]
    if not points:
        return None
    front = find_pareto_front(points)
    label = next((label for label, kl, _ in front if kl <= TOLERANCE), front[-1][0])
    return Recommendation(tuple(point[0] for point in front), label, _explain(sound[label], len(sound)))


def judge_quality(rows: Sequence[ResultRow]) -> Recommendation | None:
    """Return the row to take where nothing was timed; None without a sound row.

    It is the one that reads the fewest bytes per token of those whose KL divergence is at most TOLERANCE, and where
    there is none, the closest to the reference.
    """
    sound = {row.config.label: row for row in rows if row.status == "ok" and row.quality}
    points = [
        (label, row.quality.summary.kl_mean, -float(row.config.active_bytes))
        for label, row in sound.items()
        if row.quality
    ]
    if not points:
        return None
    front = find_pareto_front(points)
    label = next((label for label, kl, _ in front if kl <= TOLERANCE), front[-1][0])
    return Recommendation(tuple(point[0] for point in front), label, _explain(sound[label], len(sound)))


def _explain(row: ResultRow, n: int) -> str:
    if not row.quality:
        return ""
    best, gain = "smallest", f"{row.config.active_bytes / 1e6:,.0f} MB of weights per token"
    if row.speed:
        best, gain = "fastest", f"{row.speed.generation.median:.1f} tokens/s"
    if row.speed and row.speed.ratio is not None:
        gain += f" ({row.speed.ratio:.2f} x the reference)"
    summary = row.quality.summary
    cost = summary.perplexity / summary.perplexity_base - 1
    quality = f"KL divergence {summary.kl_mean:.2g}, perplexity {cost:+.1%}"
    if summary.kl_mean <= TOLERANCE:
        return f"the {best} of {n} within {TOLERANCE:g} nats per token of the reference: {quality}, {gain}"
    return (
        f"the closest of {n} to the reference: {quality}, {gain}; none is within {TOLERANCE:g} nats per token, "
        "so for quality the reference itself is the better choice"
    )
