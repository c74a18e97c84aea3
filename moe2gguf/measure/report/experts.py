"""Experts at work as one HTML file: words, heat maps, a table that sorts, and how it was measured."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from moe2gguf.errors import list_names
from moe2gguf.measure.expert_usage import ExpertUse, LayerUse
from moe2gguf.measure.report import page
from moe2gguf.measure.report.page import plotly_script, write_page

_KINDS = {"always_on": "always on", "dead": "dead", "overloaded": "overloaded"}


def write_report(found: ExpertUse, target: Path, arguments: Sequence[str]) -> None:
    """Write the report; `arguments` is the command line, the program first.

    Raises HarnessError without plotly, OutputError if `target` cannot be written.
    """
    write_page(render(found, plotly_script(), arguments), target)


def render(found: ExpertUse, plotly: str, arguments: Sequence[str]) -> str:
    """Return the page; `plotly` is the text of plotly.js."""
    figures = pictures(found)
    sections = [
        f"<h1>Experts at work in <code>{escape(found.config.label)}</code></h1>",
        *(f"<p>{escape(line)}</p>" for line in summary(found)),
        *(page.figure(i, title) for i, (title, _) in enumerate(figures)),
        "<h2>Every expert</h2>",
        "<p>A click on a heading sorts by it. Typical tokens are those that run the expert more often than others do, "
        "by their part of the mutual information; in brackets the share of their occurrences that does.</p>",
        _table(found),
        "<h2>How it was measured</h2>",
        f"<pre>{escape(shlex.join(['moe2gguf', *arguments[1:]]))}</pre>",
        "<p>llama.cpp's own routing tensors (ffn_moe_topk and ffn_moe_probs of every layer), read while it computes "
        "the text in windows; every token counts, the first of a window too.</p>",
        page.facts(found.environment | found.settings | {"tokens": found.n_token}),
    ]
    return page.document("moe2gguf experts", sections, [figure for _, figure in figures], plotly)


def summary(found: ExpertUse) -> list[str]:
    """Return the result in sentences of plain text."""
    one = found.config
    effective = [layer.effective for layer in found.layers]
    lines = [
        f"{found.n_token:,} tokens; {one.n_expert_used} of {one.n_expert} experts per token in {len(found.layers)} "
        f"layers. By load, a layer is used like {min(effective):.1f} to {max(effective):.1f} equally busy experts."
    ]
    for kind, words in _KINDS.items():
        names = found.named(kind)
        shown = list_names(names, 12)
        lines.append(f"{words.capitalize()}: {shown} (layer.expert)." if names else f"No expert is {words}.")
    moved = [layer.moved for layer in found.layers if layer.moved is not None]
    text = found.calibration[0].upper() + found.calibration[1:]
    if moved:
        text += f": {sum(moved) / len(moved):.1%} of the choices fell on other experts, {max(moved):.1%} in one layer"
    return [*lines, text + "."]


def pictures(found: ExpertUse) -> list[tuple[str, dict[str, Any]]]:
    """Return titles and figures, each a dictionary of plotly's `data` and `layout`."""
    used = found.config.n_expert_used < found.config.n_expert
    load = _map([one.load for one in found.layers], found.layers, "share of tokens", (0.0, 1.0))
    figures = [("Load: share of tokens that run each expert", load)]
    probability = _map([one.probability for one in found.layers], found.layers, "mean probability", None)
    figures.append(("The router's mean probability", probability))
    return [*figures, ("Which experts run together", _together(found.layers))] if used else figures


def load_map(found: ExpertUse) -> dict[str, Any]:
    """Return the heat map of the load alone."""
    return pictures(found)[0][1]


def _map(
    rows: Sequence[Sequence[float]], layers: Sequence[LayerUse], name: str, limits: tuple[float, float] | None
) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": [list(row) for row in rows],
        "x": [*range(len(rows[0]))],
        "y": [one.layer for one in layers],
        "colorscale": "Viridis",
        "colorbar": {"thickness": 12},
        "hovertemplate": f"layer %{{y}}, expert %{{x}}: {name} %{{z:.4f}}<extra></extra>",
    }
    if limits:
        trace |= {"zmin": limits[0], "zmax": limits[1]}
    return {"data": [trace], "layout": {"xaxis": _axis("expert"), "yaxis": _axis("layer") | {"autorange": "reversed"}}}


def _axis(title: str) -> dict[str, Any]:
    """Whole numbers only."""
    return {"title": {"text": title}, "type": "category"}


def _together(layers: Sequence[LayerUse]) -> dict[str, Any]:
    """One layer at a time: the share of tokens that run both, chosen from a list."""
    trace = {
        "type": "heatmap",
        "z": [list(row) for row in layers[0].together],
        "x": [*range(len(layers[0].load))],
        "y": [*range(len(layers[0].load))],
        "zmin": 0.0,
        "zmax": 1.0,
        "colorscale": "Viridis",
        "colorbar": {"thickness": 12},
        "hovertemplate": "experts %{y} and %{x}: share of tokens %{z:.4f}<extra></extra>",
    }
    buttons = [
        {"method": "restyle", "label": f"layer {one.layer}", "args": [{"z": [[list(row) for row in one.together]]}]}
        for one in layers
    ]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    return {
        "data": [trace],
        "layout": {
            "xaxis": _axis("expert"),
            "yaxis": _axis("expert") | {"autorange": "reversed"},
            "updatemenus": [menu],
        },
    }


def _table(found: ExpertUse) -> str:
    rows = []
    for one in found.layers:
        kinds = {e: words for kind, words in _KINDS.items() for e in getattr(one, kind)}
        for e, (load, probability) in enumerate(zip(one.load, one.probability, strict=True)):
            words = ", ".join(f"{word.text!r} ({word.share:.0%})" for word in one.words[e])
            rows.append((one.layer, e, load, probability, kinds.get(e, ""), words))
    return page.table(("layer", "expert", "load", "probability", "", "typical tokens"), rows, "rows")
