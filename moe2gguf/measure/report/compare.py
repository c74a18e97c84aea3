"""A comparison as one HTML page: words first, then figures, every number in a table, and how it was measured."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from moe2gguf.errors import list_names
from moe2gguf.measure.grid import RunConfig
from moe2gguf.measure.pareto import TOLERANCE, judge_quality
from moe2gguf.measure.report.expert_usage import draw_load
from moe2gguf.measure.report.page import (
    COLORS,
    DASHES,
    Figure,
    Page,
    Table,
    draw_line,
    label_axes,
    mark_value,
    plain_table,
)
from moe2gguf.measure.results import Comparison, Quality, describe_drafts
from moe2gguf.measure.speed import Spread
from moe2gguf.measure.tasks import describe_share

_KL = "KL divergence, nats (lower is better)"
_LOSS = "loss, nats (lower is better)"
_COLUMNS = (
    ("file", "file"),
    ("type", "type"),
    ("k", "n_expert_used"),
    ("of", "n_expert"),
    ("device", "device"),
    ("status", "status"),
    ("perplexity", "perplexity"),
    ("±", "perplexity_error"),
    ("x reference", "ratio"),
    ("±", "ratio_error"),
    ("KL mean", "kl_mean"),
    ("±", "kl_error"),
    ("KL slack", "kl_slack"),
    ("KL 50 %", "kl_50%"),
    ("KL 99 %", "kl_99%"),
    ("KL max", "kl_max"),
    ("top-1 (greedy drafts accepted)", "top1"),
    ("sampled drafts accepted", "acceptance"),
    ("acceptance slack", "acceptance_slack"),
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
    ("speed-up as greedy draft", "draft_greedy_speed_up"),
    ("greedy tokens drafted", "draft_greedy_length"),
    ("speed-up as sampled draft", "draft_sampled_speed_up"),
    ("sampled tokens drafted", "draft_sampled_length"),
    ("size, bytes", "file_size"),
    ("bits per weight", "bits_per_weight"),
    ("worker", "worker"),
    ("reason", "reason"),
)


@dataclass(frozen=True)
class Point:
    """A run that was scored, as the figures show it; `speed`, tokens per second of generation, if it was timed.

    file   name, type and device, the same for every count
    kl     not below a tenth of what is noise, where there is nothing to see on a logarithmic axis
    """

    config: RunConfig
    quality: Quality
    kl: float
    speed: Spread | None

    @property
    def file(self) -> str:
        """The file's name and type, and the device unless it is the CPU."""
        device = "" if self.config.device == "cpu" else f" {self.config.device}"
        return f"{_file_name(self.config)} ({self.config.type}){device}"

    @property
    def label(self) -> str:
        """The file and the number of experts used."""
        return f"{self.file} k={self.words}" if self.config.n_expert else self.file

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


def list_looks(points: Iterable[Point]) -> dict[str, dict[str, Any]]:
    """By a point's label, how its line looks: one color for every file, another dash for every count of it."""
    return {
        point.label: {"color": COLORS[i % len(COLORS)], "dash": DASHES[j % len(DASHES)]}
        for i, group in enumerate(group_by_file(points).values())
        for j, point in enumerate(group)
    }


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
    """Return the result in sentences of HTML, the verdict first."""
    sound = [row for row in found.rows if row.status == "ok"]
    lines = []
    if best := found.recommendation or judge_quality(found.rows):
        lines.append(f"<b>Take {_name(best.label)}</b>: {escape(best.reason)}.")
        what = "speed" if found.recommendation else "weights read"
        lines.append(f"Beaten by no other in both quality and {what}: {_names(best.front)}.")
    lines.append(f"{len(sound)} of {len(found.rows)} runs completed.")
    if found.base:
        perplexity = f"{found.base.perplexity_base:.4g} ± {found.base.perplexity_base_error:.2g}"
        reference = _name(found.reference.label)
        lines[-1] += f" The reference, {reference}, has a perplexity of {perplexity} on {found.base.n_token:,} tokens."
    same = [row.config.label for row in sound if row.above_noise is False]
    if same:
        lines.append(f"As far as the noise floor can tell, the same model as the reference: {_names(same)}.")
    equal = [f"{_name(name)} from {_names(others)}" for name, others in found.not_told_apart.items()]
    if equal:
        lines.append(f"Not told apart by this text: {'; '.join(equal)}.")
    lines += _describe_agreements(found)
    lines += [escape(note[0].upper() + note[1:]) + "." for note in found.notes]
    lines += _describe_rows(found)
    for label, solved in found.tasks.items():
        words = f"{_name(label)} solves {describe_share(solved.shares['all'])} of the tasks"
        lines.append(f"{words}, and repeats {solved.repeated:.0%} of the 4-grams of its open answers.")
    return lines


def _describe_rows(found: Comparison) -> Iterator[str]:
    """Yield what rows give as a draft of the reference, and why others did not run."""
    for label, words in describe_drafts(found.rows).items():
        yield f"{_name(label)} as a draft of the reference: {words}."
    for row in found.rows:
        if row.reason:
            yield f"{_name(row.config.label)} {row.status}: {escape(row.reason)}"


def _describe_agreements(found: Comparison) -> Iterator[str]:
    """Yield a sentence on every pair of devices or workers whose logits were compared."""
    for pair in found.agreements:
        if pair.quality:
            s = pair.quality.summary
            yield (
                f"{_name(pair.second)} against {_name(pair.first)}, over the first window: mean KL divergence "
                f"{s.kl_mean:.3g}, same top token {s.top1:.2%}, largest logit difference {s.max_difference:.3g}."
            )


def draw_figures(found: Comparison) -> list[Figure]:
    """Return the figures of what was measured; none without a sound row."""
    points = list_points(found)
    if not points:
        return []
    looks = list_looks(points)
    sliced = [point for point in points if point.config.n_expert]
    return [
        *([_draw_quality_and_speed(found, points, looks)] if found.recommendation else []),
        *([_draw_divergence_by_count(found, sliced, looks)] if sliced else []),
        *(_draw_series(found, points, looks, axis, measure) for measure in ("kl", "nll") for axis in _SERIES),
        *(draw_load(one, f"Experts of {one.config.label}: load") for one in found.experts),
    ]


Looks = Mapping[str, Mapping[str, Any]]


def _draw_quality_and_speed(found: Comparison, points: Sequence[Point], looks: Looks) -> Figure:
    """Every timed run a point with its spread, the Pareto front a dotted line, the reference's speed a dashed one."""
    timed = [point for point in points if point.speed]
    lines = [_draw_timed(name, group, looks) for name, group in group_by_file(timed).items()]
    x, y = zip(*(point.place for point in list_front(found, timed)), strict=True)
    lines.append(draw_line("beaten by no other", x, y, mode="lines", line={"dash": "dot", "color": "gray"}))
    layout = label_axes("tokens per second (higher is better)", _KL, log=True)
    if found.reference_speed:
        speed = found.reference_speed.generation.median
        layout["shapes"] = [mark_value("x", speed)]
        layout["annotations"] = [{"x": speed, "y": 1, "yref": "paper", "text": "reference", "showarrow": False}]
    words = (
        "Good is low and far right: close to the reference and fast. A number is the experts used per token. What lies "
        "left of the dashed line is slower than the reference itself."
    )
    return Figure("Quality and generation speed", lines, layout, words)


def _draw_timed(name: str, points: Sequence[Point], looks: Looks) -> dict[str, Any]:
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
        hovertext=[escape(point.label) for point in points],
        textposition="top center",
        marker={"size": 12, "color": looks[points[0].label]["color"]},
    )


def _draw_divergence_by_count(found: Comparison, points: Sequence[Point], looks: Looks) -> Figure:
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
                hovertext=[escape(point.label) for point in ordered],
                line={"color": looks[group[0].label]["color"]},
            )
        )
    counts = [point.config.n_expert_used for point in points]
    layout = label_axes("experts used per token", _KL, log=True, counts=counts)
    layout["shapes"] = [mark_value("y", found.kl_limit)]
    layout["annotations"] = [
        {"x": 0, "xref": "paper", "xanchor": "left", "yanchor": "bottom", "text": "noise", "showarrow": False}
        | {"y": math.log10(found.kl_limit)}
    ]
    words = (
        f"Good is low: up to {TOLERANCE:g} a file is recommended. Below the dashed line it is the reference itself, as "
        "far as this measurement can tell. A line rises again where a file was made for fewer experts."
    )
    return Figure("KL divergence and experts used", lines, layout, words)


def _draw_series(found: Comparison, points: Sequence[Point], looks: Looks, axis: str, measure: str) -> Figure:
    """A line per run of one of the series of `Quality`, by window or by position; of losses the reference's too.

    By position x is the middle of each span, in tokens from the window's start.
    """
    name = f"{axis}_{measure}"
    title, axis_title, words = _SERIES[axis]
    n = len(getattr(points[0].quality, name))
    x: Sequence[float] = range(1, n + 1)
    if axis == "position":
        n_context = int(found.settings["context"])
        first = n_context // 2
        x = [first + (i + 0.5) * (n_context - 1 - first) / max(n, 1) for i in range(n)]
    mode = "lines" if axis == "position" else "lines+markers"
    values = {point.label: getattr(point.quality, name) for point in points}
    lines = []
    if measure == "nll":
        base = getattr(points[0].quality, f"{name}_base")
        lines = [draw_line("reference", x, base, mode, line={"dash": "dot", "color": "gray"})]
    else:
        values = {label: [clip_to_noise(value, found) for value in series] for label, series in values.items()}
    lines += [draw_line(label, x, series, mode, line=looks[label]) for label, series in values.items()]
    what, unit = ("Loss", _LOSS) if measure == "nll" else ("KL divergence", _KL)
    counts = [] if axis == "position" else range(1, n + 1)
    return Figure(f"{what} {title}", lines, label_axes(axis_title, unit, log=measure == "kl", counts=counts), words)


_SERIES = {
    "window": (
        "window by window",
        "window of the text",
        "Good is low and even: a line that leaves the others in one place has met a text that its file cannot do.",
    ),
    "position": (
        "by position in the window",
        "position in the window, tokens",
        "Good is low, and level or falling: a line that rises to the right loses the thread of longer texts.",
    ),
}


def _finite_or_none(width: float) -> float | None:
    return width if math.isfinite(width) else None


def _table_rows(found: Comparison) -> Table:
    files = [_file_name(one) for one in (*(row.config for row in found.rows), found.reference)]
    lines = [line | {"file": file} for line, file in zip(found.flat(), files, strict=False)]
    solved = [(f"{name.replace('_', ' ')}, share", name) for one in [*found.tasks.values()][:1] for name in one.flat()]
    columns = [
        (title, name) for title, name in (*_COLUMNS, *solved) if any(line.get(name) not in (None, "") for line in lines)
    ]
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
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"not readable any more: {error.strerror}"


def _file_name(one: RunConfig) -> str:
    return one.name or one.path.name


def _name(label: str) -> str:
    return f"<code>{escape(label)}</code>"


def _names(labels: Iterable[str]) -> str:
    return list_names([_name(label) for label in labels], most=12)
