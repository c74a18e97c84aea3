"""The picture for a README: quality against generation speed, or against the experts used where nothing was timed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2gguf.errors import HarnessError
from moe2gguf.measure.report.compare import clip_to_noise, group_by_file
from moe2gguf.measure.report.page import write_whole
from moe2gguf.measure.results import Comparison, ResultRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".svg", ".png")
_SIZE = (8.0, 5.0)  # inches
_DPI = 150


def require_picture(target: Path) -> None:
    """Raise HarnessError if the picture cannot be made: better before the measurements than after them."""
    if target.suffix.lower() not in FORMATS:
        raise HarnessError(f"{target}: a picture is {' or '.join(FORMATS)}; name the file so")
    if not target.parent.is_dir():
        raise HarnessError(f"{target}: there is no folder {target.parent}; make it, or name another file")
    _matplotlib()


def write_picture(found: Comparison, target: Path) -> None:
    """Draw the picture as SVG or PNG, by the name of `target`; equal results give equal bytes.

    Raises HarnessError without matplotlib or without a row to draw, OutputError if `target` cannot be written.
    """
    sound = [row for row in found.rows if row.status == "ok" and row.quality]
    if not sound:
        raise HarnessError(f"{target}: no row ran, there is nothing to draw")
    matplotlib = _matplotlib()
    with matplotlib.rc_context({"svg.hashsalt": "moe2gguf", "text.parse_math": False, "font.size": 10}):
        figure = matplotlib.figure.Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        if found.recommendation:
            _over_speed(axes, found, sound)
        else:
            _over_count(axes, found, sound)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # the usual one writes powers in mathematics, which names must not be
        axes.set_ylabel("mean KL divergence from the dense model, nats per token")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        kind = target.suffix.lower().removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else {}
        with write_whole(target) as partial:
            figure.savefig(partial, format=kind, dpi=_DPI, metadata=metadata)


def _over_speed(axes: Axes, found: Comparison, sound: list[ResultRow]) -> None:
    """Every (file, k) a point, the front a dotted line, the dense model's speed a dashed one, the choice a ring."""
    for name, rows in group_by_file([row for row in sound if row.speed]).items():
        points = [_point(row, found) for row in rows]
        axes.scatter(*zip(*points, strict=True), label=_legend(name), zorder=3)
        for row, point in zip(rows, points, strict=True):
            words = f"k={row.config.n_expert_used}" if row.config.n_expert else "dense"
            axes.annotate(words, point, xytext=(5, 5), textcoords="offset points", fontsize=8)
    points_of = {row.config.label: _point(row, found) for row in sound if row.speed}
    if found.recommendation:
        front = [points_of[label] for label in found.recommendation.front]
        axes.plot(*zip(*front, strict=True), ":", color="gray", label="beaten by no other")
        x, y = points_of[found.recommendation.label]
        axes.scatter([x], [y], s=220, facecolors="none", edgecolors="black", label="take this one")
    if found.reference_speed:
        axes.axvline(found.reference_speed.generation.median, linestyle="--", color="gray", label="the dense model")
    axes.set_xlabel("generation, tokens per second")


def _over_count(axes: Axes, found: Comparison, sound: list[ResultRow]) -> None:
    for name, rows in group_by_file(sound).items():
        ordered = sorted(rows, key=lambda row: row.config.n_expert_used)
        heights = [clip_to_noise(row.quality.summary.kl_mean, found) for row in ordered if row.quality]
        axes.plot([row.config.n_expert_used for row in ordered], heights, "o-", label=_legend(name))
    axes.set_xlabel("experts used per token")


def _point(row: ResultRow, found: Comparison) -> tuple[float, float]:
    if row.speed is None or row.quality is None:
        raise ValueError(f"{row.config.label} was not timed")
    return row.speed.generation.median, clip_to_noise(row.quality.summary.kl_mean, found)


def _legend(name: str) -> str:
    """A name as matplotlib shows it: one with an underscore in front would be left out."""
    return f" {name}" if name.startswith("_") else name


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise HarnessError("the picture needs matplotlib: pip install 'moe2gguf[report]'") from error
    return matplotlib
