"""Quality against speed: which runs nothing beats in both, and which one is recommended."""

from collections.abc import Iterable, Sequence

from moe2gguf.measure.metrics import Summary
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
    return _choose((row, row.speed.generation.median) for row in rows if row.speed)


def judge_quality(rows: Sequence[ResultRow]) -> Recommendation | None:
    """Return the row to take where nothing was timed; None without a sound row.

    It is the one that reads the fewest bytes per token of those whose KL divergence is at most TOLERANCE, and where
    there is none, the closest to the reference.
    """
    return _choose((row, -float(row.config.active_bytes)) for row in rows)


def _choose(rows: Iterable[tuple[ResultRow, float]]) -> Recommendation | None:
    """The front of the sound rows, each with a number of which more is better, and the one to take."""
    sound = {
        row.config.label: (row, row.quality.summary, number)
        for row, number in rows
        if row.status == "ok" and row.quality
    }
    if not sound:
        return None
    front = find_pareto_front((label, summary.kl_mean, number) for label, (_, summary, number) in sound.items())
    label = next((label for label, kl, _ in front if kl <= TOLERANCE), front[-1][0])
    row, summary, _ = sound[label]
    return Recommendation(tuple(point[0] for point in front), label, _explain(row, summary, len(sound)))


def _explain(row: ResultRow, summary: Summary, n: int) -> str:
    best, gain = "smallest", f"{row.config.active_bytes / 1e6:,.0f} MB of weights per token"
    if row.speed:
        best, gain = "fastest", f"{row.speed.generation.median:.1f} tokens/s"
    if row.speed and row.speed.ratio is not None:
        gain += f" ({row.speed.ratio:.2f} x the reference)"
    cost = summary.ratio - 1
    quality = f"KL divergence {summary.kl_mean:.2g}, perplexity {cost:+.1%}"
    if summary.kl_mean <= TOLERANCE:
        words = f"of {n} the {best} within {TOLERANCE:g} nats per token of the reference: {quality}, {gain}"
        slow = row.speed and row.speed.ratio is not None and row.speed.ratio <= 1
        return f"{words}; so none that is so close is faster than it" if slow else words
    return (
        f"the closest of {n} to the reference: {quality}, {gain}; none is within {TOLERANCE:g} nats per token, "
        "so for quality the reference itself is the better choice"
    )
