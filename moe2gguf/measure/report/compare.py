"""A comparison as one HTML file: words first, then pictures, every number in a table, and how it was measured.

The file needs nothing but itself; see `page`.
"""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moe2gguf.measure.report import page
from moe2gguf.measure.report.experts import load_map
from moe2gguf.measure.report.page import plotly_script, write_page
from moe2gguf.measure.results import Comparison, ResultRow

_KL = "mean KL divergence, nats per token"
_WINDOW, _POSITION = "window of the text", "position in the window, tokens"
_DETAILS = {
    "window_kl": ("KL divergence window by window", _WINDOW),
    "window_nll": ("Loss window by window", _WINDOW),
    "position_kl": ("KL divergence by position in the window", _POSITION),
    "position_nll": ("Loss by position in the window", _POSITION),
}
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


def write_report(found: Comparison, target: Path, arguments: Sequence[str]) -> None:
    """Write the report; `arguments` is the command line that made the comparison, the program first.

    Raises HarnessError without plotly, OutputError if `target` cannot be written.
    """
    write_page(render(found, plotly_script(), arguments), target)


def render(found: Comparison, plotly: str, arguments: Sequence[str]) -> str:
    """Return the page; `plotly` is the text of plotly.js."""
    figures = pictures(found)
    sections = [
        "<h1>Quality and speed against the dense model</h1>",
        *(f"<p>{line}</p>" for line in summary(found)),
        *(page.figure(i, title) for i, (title, _) in enumerate(figures)),
        "<h2>Every number</h2>",
        "<p>A click on a heading sorts by it. The pictures show no divergence below a tenth of the noise limit.</p>",
        _rows_table(found),
        "<h2>How it was measured</h2>",
        *_method(found, arguments),
    ]
    return page.document("moe2gguf compare", sections, [figure for _, figure in figures], plotly)


def summary(found: Comparison) -> list[str]:
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
    for row in found.rows:
        if row.reason:
            lines.append(f"{_name(row.config.label)} {row.status}: {escape(row.reason)}")
    return lines


def pictures(found: Comparison) -> list[tuple[str, dict[str, Any]]]:
    """Return titles and figures, each a dictionary of plotly's `data` and `layout`; none without a sound row."""
    sound = [row for row in found.rows if row.status == "ok" and row.quality]
    if not sound:
        return []
    figures = []
    if found.recommendation:
        figures.append(("Quality and generation speed", _quality_and_speed(found, sound)))
    sliced = [row for row in sound if row.config.n_expert]
    if sliced:
        figures.append(("KL divergence and experts used", _divergence_by_count(found, sliced)))
    for name, (title, axis) in _DETAILS.items():
        figures.append((title, _series(found, sound, name, axis)))
    return [*figures, *((f"Experts of {one.config.label}: load", load_map(one)) for one in found.experts)]


def _quality_and_speed(found: Comparison, sound: Sequence[ResultRow]) -> dict[str, Any]:
    traces = [
        {
            "type": "scatter",
            "mode": "markers+text",
            "name": escape(name),
            "x": [row.speed.generation.median for row in rows if row.speed],
            "y": [clip_to_noise(row.quality.summary.kl_mean, found) for row in rows if row.speed and row.quality],
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [row.speed.generation.high - row.speed.generation.median for row in rows if row.speed],
                "arrayminus": [row.speed.generation.median - row.speed.generation.low for row in rows if row.speed],
            },
            "text": [str(row.config.n_expert_used) if row.config.n_expert else "dense" for row in rows],
            "hovertext": [escape(row.config.label) for row in rows],
            "textposition": "top center",
            "marker": {"size": 12},
        }
        for name, rows in group_by_file([row for row in sound if row.speed]).items()
    ]
    points = {row.config.label: row for row in sound}
    front = [points[label] for label in found.recommendation.front] if found.recommendation else []
    traces.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "front",
            "line": {"dash": "dot"},
            "x": [row.speed.generation.median for row in front if row.speed],
            "y": [clip_to_noise(row.quality.summary.kl_mean, found) for row in front if row.quality],
        }
    )
    layout = _axes("generation, tokens per second", _KL)
    if found.reference_speed:
        layout["shapes"] = [_line("x", found.reference_speed.generation.median)]
        layout["annotations"] = [
            {
                "x": found.reference_speed.generation.median,
                "y": 1,
                "yref": "paper",
                "text": "reference",
                "showarrow": False,
            }
        ]
    return {"data": traces, "layout": layout}


def _divergence_by_count(found: Comparison, sound: Sequence[ResultRow]) -> dict[str, Any]:
    traces = []
    for name, rows in group_by_file(sound).items():
        ordered = sorted(rows, key=lambda row: row.config.n_expert_used)
        intervals = [row.quality.kl_interval for row in ordered if row.quality]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape(name),
                "x": [row.config.n_expert_used for row in ordered],
                "y": [clip_to_noise(i.mean, found) for i in intervals],
                "error_y": {"type": "data", "array": [_half(i.high - i.mean) for i in intervals]},
                "hovertext": [escape(row.config.label) for row in ordered],
            }
        )
    layout = _axes("experts used per token", _KL)
    layout["shapes"] = [_line("y", found.kl_limit)]
    layout["annotations"] = [
        {"x": 0, "xref": "paper", "xanchor": "left", "yanchor": "bottom", "text": "noise", "showarrow": False}
        | {"y": math.log10(found.kl_limit)}
    ]
    return {"data": traces, "layout": layout}


def _series(found: Comparison, sound: Sequence[ResultRow], name: str, axis: str) -> dict[str, Any]:
    """A line per row of one of the series of `Quality`, by window or by position; losses with the reference's."""
    by_position, is_loss = name.startswith("position"), name.endswith("nll")
    lines = {row.config.label: getattr(row.quality, name) for row in sound}
    if is_loss:
        lines = {"reference": getattr(sound[0].quality, f"{name}_base"), **lines}
    traces = [
        {
            "type": "scatter",
            "mode": "lines" if by_position else "lines+markers",
            "name": escape(label),
            "x": _positions(found, len(values)) if by_position else list(range(1, len(values) + 1)),
            "y": [value if is_loss else clip_to_noise(value, found) for value in values],
            **({"line": {"dash": "dot", "color": "gray"}} if is_loss and label == "reference" else {}),
        }
        for label, values in lines.items()
    ]
    return {"data": traces, "layout": _axes(axis, "loss, nats per token" if is_loss else _KL, log=not is_loss)}


def _positions(found: Comparison, n_span: int) -> list[float]:
    """Return the middles of the spans of positions, counted in tokens from the start of a window."""
    n_context = int(found.settings["context"])
    first = n_context // 2
    width = (n_context - 1 - first) / max(n_span, 1)
    return [first + (i + 0.5) * width for i in range(n_span)]


def _axes(x: str, y: str, *, log: bool = True) -> dict[str, Any]:
    scale = {"type": "log", "exponentformat": "power"} if log else {}
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}, **scale}}


def _line(axis: str, value: float) -> dict[str, Any]:
    other = "y" if axis == "x" else "x"
    ends = {f"{axis}0": value, f"{axis}1": value, f"{other}0": 0, f"{other}1": 1, f"{other}ref": "paper"}
    return {"type": "line", "line": {"dash": "dash", "width": 1, "color": "gray"}, **ends}


def group_by_file(rows: Iterable[ResultRow]) -> dict[str, list[ResultRow]]:
    """Group rows by file and device, in the order of their first appearance."""
    groups: dict[str, list[ResultRow]] = {}
    for row in rows:
        device = "" if row.config.device == "cpu" else f" {row.config.device}"
        groups.setdefault(f"{row.config.name or row.config.path.name}{device}", []).append(row)
    return groups


def clip_to_noise(value: float, found: Comparison) -> float:
    """Return a value for a logarithmic axis: not below a tenth of what is noise, where there is nothing to see."""
    return max(value, found.kl_limit / 10)


def _half(width: float) -> float | None:
    return width if math.isfinite(width) else None


def _rows_table(found: Comparison) -> str:
    lines = [row.flat() | {"file": row.config.name or row.config.path.name} for row in found.rows]
    columns = [(title, name) for title, name in _COLUMNS if any(line.get(name) not in (None, "") for line in lines)]
    return page.table(
        [title for title, _ in columns], [[line.get(name) for _, name in columns] for line in lines], "rows"
    )


def _method(found: Comparison, arguments: Sequence[str]) -> list[str]:
    files = dict.fromkeys([found.reference.path, *(row.config.path for row in found.rows)])
    made = found.settings.get("made", {})
    digests = "".join(
        f"<tr><td>{escape(path.name)}</td><td><code>{escape(made.get(path.name) or _sha256(path))}</code></td></tr>"
        for path in files
    )
    return [
        f"<pre>{escape(shlex.join(['moe2gguf', *arguments[1:]]))}</pre>",
        "<p>Definitions are those of llama.cpp's perplexity tool: the text in windows, the second half of each scored; "
        "KL divergence of the next-token distributions from the reference, in nats. Confidence intervals (95 %) are "
        f"Student's t over windows, paired where two runs are compared. The noise limit, {found.kl_limit:.2g} nats per "
        "token, is what the reference differs from itself when it is computed token by token, with a margin. Speeds "
        "are medians of interleaved runs, defined as in llama-bench.</p>",
        f'<div class="wide"><table><thead><tr><th>file</th><th>SHA-256</th></tr></thead>{digests}</table></div>',
        page.facts(found.environment | {key: value for key, value in found.settings.items() if key != "made"}),
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


def _name(label: str) -> str:
    return f"<code>{escape(label)}</code>"


def _names(labels: Iterable[str]) -> str:
    return ", ".join(_name(label) for label in labels)
