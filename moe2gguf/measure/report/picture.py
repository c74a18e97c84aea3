"""The picture for a README: quality against generation speed, or against the experts used where nothing was timed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2gguf.errors import HarnessError
from moe2gguf.gguf.outputs import write_whole
from moe2gguf.measure.report.compare import Point, group_by_file, list_front, list_points
from moe2gguf.measure.report.page import shorten_name
from moe2gguf.measure.results import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".svg", ".png")
_SIZE, _ROW = (8.0, 5.0), 0.2  # inches, without the legend's rows
_COLUMNS = 2  # of the legend
_DPI = 150


def require_picture(target: Path) -> None:
    """Raise HarnessError if the picture cannot be made: call it before the measurements, not after them."""
    if target.suffix.lower() not in FORMATS:
        raise HarnessError(f"{target}: a picture is {' or '.join(FORMATS)}; name the file so")
    _matplotlib()


def write_picture(found: Comparison, target: Path) -> None:
    """Draw the picture as SVG or PNG, by the name of `target`; equal results give equal bytes.

    Raises HarnessError without matplotlib or without a row to draw, OutputError if `target` cannot be written.
    """
    points = list_points(found)
    if not points:
        raise HarnessError(f"{target}: no row ran, there is nothing to draw")
    matplotlib = _matplotlib()
    with matplotlib.rc_context({"svg.hashsalt": "moe2gguf", "text.parse_math": False, "font.size": 10}):
        figure = matplotlib.figure.Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        if found.recommendation:
            _draw_over_speed(axes, found, points)
        else:
            _draw_over_count(axes, points)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_formatter("{x:g}")  # the usual ones write powers in mathematics, which names must not be
        axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else matplotlib.ticker.NullFormatter())
        axes.set_ylabel("mean KL divergence from the dense model, nats per token")
        axes.grid(alpha=0.3)
        legend = figure.legend(loc="outside lower center", ncols=_COLUMNS, fontsize=8)
        figure.set_figheight(_SIZE[1] + _ROW * math.ceil(len(legend.get_texts()) / _COLUMNS))
        kind = target.suffix.lower().removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else {}
        with write_whole(target) as partial:
            figure.savefig(partial, format=kind, dpi=_DPI, metadata=metadata)


def _draw_over_speed(axes: Axes, found: Comparison, points: list[Point]) -> None:
    """Draw runs as points, the Pareto front dotted, the dense model's speed dashed, the recommended run ringed."""
    for name, group in group_by_file(point for point in points if point.speed).items():
        axes.scatter(*zip(*(point.place for point in group), strict=True), label=_legend(name), zorder=3)
        for point in group:
            words = f"k={point.words}" if point.config.n_expert else point.words
            axes.annotate(words, point.place, xytext=(5, 5), textcoords="offset points", fontsize=8)
    front = list_front(found, points)
    axes.plot(*zip(*(point.place for point in front), strict=True), ":", color="gray", label="Pareto front")
    for point in front:
        if found.recommendation and point.config.label == found.recommendation.label:
            x, y = point.place
            axes.scatter([x], [y], s=220, facecolors="none", edgecolors="black", label="recommended")
    if found.reference_speed:
        axes.axvline(found.reference_speed.generation.median, linestyle="--", color="gray", label="the dense model")
    axes.set_xlabel("generation, tokens per second")


def _draw_over_count(axes: Axes, points: list[Point]) -> None:
    """Draw sliced files as lines over their counts, and dense ones as dashed lines across."""
    for i, (name, group) in enumerate(group_by_file(points).items()):
        label, color = _legend(name), f"C{i}"
        if not group[0].config.n_expert:
            axes.axhline(group[0].kl, linestyle="--", label=label, color=color)
            continue
        ordered = sorted(group, key=lambda point: point.config.n_expert_used)
        x = [point.config.n_expert_used for point in ordered]
        axes.plot(x, [point.kl for point in ordered], "o-", label=label, color=color)
    counts = {point.config.n_expert_used for point in points if point.config.n_expert}
    axes.set_xticks(sorted(counts))
    axes.set_xlabel("experts used per token" if counts else "")


def _legend(name: str) -> str:
    """A name as a legend has room for and matplotlib shows it: one with an underscore in front would be left out."""
    short = shorten_name(name, most=42)
    return f" {short}" if short.startswith("_") else short


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ModuleNotFoundError as error:
        raise HarnessError("the picture needs matplotlib: pip install matplotlib") from error
    return matplotlib
