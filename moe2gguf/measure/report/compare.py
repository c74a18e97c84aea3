"""A comparison as one HTML page: words first, then figures, every number in a table, and how it was measured."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from moe2gguf.measure.grid import RunConfig
from moe2gguf.measure.report.expert_usage import draw_load
from moe2gguf.measure.report.page import Figure, Page, Table, draw_line, label_axes, mark_value, plain_table
from moe2gguf.measure.results import Comparison, Quality
from moe2gguf.measure.speed import Spread

_KL = "mean KL divergence, nats per token"
_LOSS = "loss, nats per token"
_WINDOW, _POSITION = "window of the text", "position in the window, tokens"
_COLUMNS = (
    ("file", "file"),
    ("type", "type"),
    ("k", "n_expert_used"),
    ("of", "n_expert"),
    ("device", "device"),
    ("status", "status"),
    ("perplexity", "perplexity"),
    ("±", "perplexity_error"),
    ("KL mean", "kl_mean"),
    ("±", "kl_error"),
    ("KL slack", "kl_slack"),
    ("KL 50 %", "kl_50%"),
    ("KL 99 %", "kl_99%"),
    ("KL max", "kl_max"),
    ("top-1", "top1"),
    ("top-5", "top5"),
    ("RMS Δp", "p_change_rms"),
    ("correlation", "correlation"),
    ("max Δlogit", "max_difference"),
    ("NaN", "n_bad"),
    ("above noise", "above_noise"),
    ("prompt t/s", "prompt_speed"),
    ("generation t/s", "generation_speed"),
    ("bound t/s", "speed_bound"),
    ("speed / reference", "speed_ratio"),
    ("size, bytes", "file_size"),
    ("bits per weight", "bits_per_weight"),
    ("worker", "worker"),
    ("reason", "reason"),
)


@dataclass(frozen=True)
class Point:
    """A run that was scored, as the figures show it; `speed`, tokens per second of generation, if it was timed.

    file   name and device, the same for every count
    kl     not below a tenth of what is noise, where there is nothing to see on a logarithmic axis
    """

    config: RunConfig
    quality: Quality
    kl: float
    speed: Spread | None

    @property
    def file(self) -> str:
        """The file's name, and the device unless it is the CPU."""
        device = "" if self.config.device == "cpu" else f" {self.config.device}"
        return f"{_file_name(self.config)}{device}"

    @property
    def words(self) -> str:
        """The number of experts used, or that it is dense."""
        return str(self.config.n_expert_used) if self.config.n_expert else "dense"

    @property
    def place(self) -> tuple[float, float]:
        """Speed and divergence. Raises ValueError for one that was not timed."""
        if self.speed is None:
            raise ValueError(f"{self.config.label} was not timed")
        return self.speed.median, self.kl


def list_points(found: Comparison) -> list[Point]:
    """Return the sound rows of a comparison as points."""
    return [
        Point(
            config=row.config,
            quality=row.quality,
            kl=clip_to_noise(row.quality.summary.kl_mean, found),
            speed=row.speed.generation if row.speed else None,
        )
        for row in found.rows
        if row.status == "ok" and row.quality
    ]


def list_front(found: Comparison, points: Iterable[Point]) -> list[Point]:
    """Return the points of the Pareto front, fastest first."""
    by_label = {point.config.label: point for point in points}
    return [by_label[label] for label in found.recommendation.front] if found.recommendation else []


def group_by_file(points: Iterable[Point]) -> dict[str, list[Point]]:
    """Group points by file and device, in the order of their first appearance."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.file, []).append(point)
    return groups


def clip_to_noise(value: float, found: Comparison) -> float:
    """Return a value for a logarithmic axis: not below a tenth of what is noise, where there is nothing to see."""
    return max(value, found.kl_limit / 10)


def make_page(found: Comparison, arguments: Sequence[str]) -> Page:
    """Return the page; `arguments` is the command line that made the comparison, the program first."""
    return Page(
        title="moe2gguf compare",
        heading="Quality and speed against the dense model",
        summary=summarize(found),
        figures=draw_figures(found),
        table=_table_rows(found),
        arguments=arguments,
        method=_describe_method(found),
        facts=found.environment | {key: value for key, value in found.settings.items() if key != "made"},
    )


def summarize(found: Comparison) -> list[str]:
    """Return the result in sentences of HTML."""
    sound = [row for row in found.rows if row.status == "ok"]
    lines = [f"{len(sound)} of {len(found.rows)} runs completed."]
    if found.base:
        perplexity = f"{found.base.perplexity_base:.4g} ± {found.base.perplexity_base_error:.2g}"
        reference = _name(found.reference.label)
        lines[0] += f" The reference, {reference}, has a perplexity of {perplexity} on {found.base.n_token:,} tokens."
    same = [row.config.label for row in sound if row.above_noise is False]
    if same:
        lines.append(f"As far as the noise floor can tell, the same model as the reference: {_names(same)}.")
    if found.recommendation:
        lines.append(f"<b>Take {_name(found.recommendation.label)}</b>: {escape(found.recommendation.reason)}.")
        lines.append(f"Beaten by no other in both quality and speed: {_names(found.recommendation.front)}.")
    equal = [f"{_name(name)} from {_names(others)}" for name, others in found.not_told_apart.items()]
    if equal:
        lines.append(f"Not told apart by this text: {'; '.join(equal)}.")
    for pair in found.agreements:
        if pair.quality:
            s = pair.quality.summary
            lines.append(
                f"{_name(pair.second)} against {_name(pair.first)}, over the first window: mean KL divergence "
                f"{s.kl_mean:.3g}, same top token {s.top1:.2%}, largest logit difference {s.max_difference:.3g}."
            )
    lines += [escape(note[0].upper() + note[1:]) + "." for note in found.notes]
    for row in found.rows:
        if row.reason:
            lines.append(f"{_name(row.config.label)} {row.status}: {escape(row.reason)}")
    return lines


def draw_figures(found: Comparison) -> list[Figure]:
    """Return the figures of what was measured; none without a sound row."""
    points = list_points(found)
    if not points:
        return []
    sliced = [point for point in points if point.config.n_expert]
    return [
        *([_draw_quality_and_speed(found, points)] if found.recommendation else []),
        *([_draw_divergence_by_count(found, sliced)] if sliced else []),
        _draw_windows("KL divergence window by window", found, points, "window_kl"),
        _draw_windows("Loss window by window", found, points, "window_nll"),
        _draw_positions("KL divergence by position in the window", found, points, "position_kl"),
        _draw_positions("Loss by position in the window", found, points, "position_nll"),
        *(draw_load(one, f"Experts of {one.config.label}: load") for one in found.experts),
    ]


def _draw_quality_and_speed(found: Comparison, points: Sequence[Point]) -> Figure:
    """Every timed run a point with its spread, the Pareto front a dotted line, the reference's speed a dashed one."""
    timed = [point for point in points if point.speed]
    lines = [_draw_timed(name, group) for name, group in group_by_file(timed).items()]
    x, y = zip(*(point.place for point in list_front(found, timed)), strict=True)
    lines.append(draw_line("Pareto front", x, y, mode="lines", line={"dash": "dot"}))
    layout = label_axes("generation, tokens per second", _KL, log=True)
    if found.reference_speed:
        speed = found.reference_speed.generation.median
        layout["shapes"] = [mark_value("x", speed)]
        layout["annotations"] = [{"x": speed, "y": 1, "yref": "paper", "text": "reference", "showarrow": False}]
    return Figure("Quality and generation speed", lines, layout)


def _draw_timed(name: str, points: Sequence[Point]) -> dict[str, Any]:
    """Return the points of a file at its counts, each with the lowest and highest speed of its runs."""
    x, y = zip(*(point.place for point in points), strict=True)
    speeds = [point.speed for point in points if point.speed]
    return draw_line(
        name,
        x,
        y,
        mode="markers+text",
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [speed.high - speed.median for speed in speeds],
            "arrayminus": [speed.median - speed.low for speed in speeds],
        },
        text=[point.words for point in points],
        hovertext=[escape(point.config.label) for point in points],
        textposition="top center",
        marker={"size": 12},
    )


def _draw_divergence_by_count(found: Comparison, points: Sequence[Point]) -> Figure:
    """A line per file over its counts, with confidence intervals, and the noise limit."""
    lines = []
    for name, group in group_by_file(points).items():
        ordered = sorted(group, key=lambda point: point.config.n_expert_used)
        intervals = [point.quality.kl_interval for point in ordered]
        lines.append(
            draw_line(
                name,
                [point.config.n_expert_used for point in ordered],
                [clip_to_noise(i.mean, found) for i in intervals],
                error_y={"type": "data", "array": [_finite_or_none(i.high - i.mean) for i in intervals]},
                hovertext=[escape(point.config.label) for point in ordered],
            )
        )
    layout = label_axes("experts used per token", _KL, log=True)
    layout["shapes"] = [mark_value("y", found.kl_limit)]
    layout["annotations"] = [
        {"x": 0, "xref": "paper", "xanchor": "left", "yanchor": "bottom", "text": "noise", "showarrow": False}
        | {"y": math.log10(found.kl_limit)}
    ]
    return Figure("KL divergence and experts used", lines, layout)


def _draw_windows(title: str, found: Comparison, points: Sequence[Point], name: str) -> Figure:
    """A line per run of one of the series of `Quality` by window."""
    lines = [
        draw_line(label, range(1, len(values) + 1), values, **look)
        for label, values, look in _list_series(found, points, name)
    ]
    return Figure(title, lines, _label_series(_WINDOW, name))


def _draw_positions(title: str, found: Comparison, points: Sequence[Point], name: str) -> Figure:
    """The same by position in the window: x is the middle of each span, in tokens from the window's start."""
    n_context = int(found.settings["context"])
    first = n_context // 2
    n_span = len(getattr(points[0].quality, name))
    width = (n_context - 1 - first) / max(n_span, 1)
    x = [first + (i + 0.5) * width for i in range(n_span)]
    lines = [
        draw_line(label, x, values, mode="lines", **look) for label, values, look in _list_series(found, points, name)
    ]
    return Figure(title, lines, _label_series(_POSITION, name))


def _list_series(
    found: Comparison, points: Sequence[Point], name: str
) -> list[tuple[str, list[float], dict[str, Any]]]:
    """Return label, values and look of every run's series; of losses the reference's before them, gray and dotted."""
    if not name.endswith("nll"):
        return [
            (point.config.label, [clip_to_noise(value, found) for value in getattr(point.quality, name)], {})
            for point in points
        ]
    gray = {"line": {"dash": "dot", "color": "gray"}}
    reference = ("reference", list(getattr(points[0].quality, f"{name}_base")), gray)
    return [reference, *((point.config.label, list(getattr(point.quality, name)), {}) for point in points)]


def _label_series(axis: str, name: str) -> dict[str, Any]:
    is_loss = name.endswith("nll")
    return label_axes(axis, _LOSS if is_loss else _KL, log=not is_loss)


def _finite_or_none(width: float) -> float | None:
    return width if math.isfinite(width) else None


def _table_rows(found: Comparison) -> Table:
    lines = [row.flat() | {"file": _file_name(row.config)} for row in found.rows]
    columns = [(title, name) for title, name in _COLUMNS if any(line.get(name) not in (None, "") for line in lines)]
    return Table(
        title="Every number",
        words="The figures show no divergence below a tenth of the noise limit.",
        columns=[title for title, _ in columns],
        rows=[[line.get(name) for _, name in columns] for line in lines],
    )


def _describe_method(found: Comparison) -> list[str]:
    paths = dict.fromkeys([found.reference.path, *(row.config.path for row in found.rows)])
    made = found.settings.get("made", {})
    return [
        "<p>Definitions are those of llama.cpp's perplexity tool: the text in windows, the second half of each scored; "
        "KL divergence of the next-token distributions from the reference, in nats. Confidence intervals (95 %) are "
        f"Student's t over windows, paired where two runs are compared. The noise limit, {found.kl_limit:.2g} nats per "
        "token, is how far the reference differs from itself when it is computed token by token, with a margin. Speeds "
        "are medians of interleaved runs, defined as in llama-bench.</p>",
        plain_table("file", "SHA-256", {path.name: made.get(path.name) or _sha256(path) for path in paths}, code=True),
    ]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    except OSError as error:
        return f"not readable any more: {error.strerror}"
    return digest.hexdigest()


def _file_name(one: RunConfig) -> str:
    return one.name or one.path.name


def _name(label: str) -> str:
    return f"<code>{escape(label)}</code>"


def _names(labels: Iterable[str]) -> str:
    return ", ".join(_name(label) for label in labels)
