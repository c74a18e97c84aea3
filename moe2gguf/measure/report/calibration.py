"""A calibration as one HTML file: words, pictures of every layer, a table, and what it was made from."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from moe2gguf.experts.layer import LayerReport
from moe2gguf.experts.methods import AMPLIFICATIONS, CORRECTIONS, GROUPS, ROUTERS
from moe2gguf.measure.report import page
from moe2gguf.recipes.convert import Conversion
from moe2gguf.recipes.plan import Plan

_COLUMNS = (
    ("always on", "n_shared"),
    ("for every token", "shared_rate"),
    ("energy kept", "energy_kept"),
    ("best choice", "energy_oracle"),
    ("hit rate", "hit_rate"),
    ("constant, min", "constant_min"),
    ("after refit", "refit_error"),
    ("ridge", "refit_strength"),
)


def write_report(done: Conversion, target: Path, arguments: Sequence[str]) -> None:
    """Write the report of a conversion that calibrated; `arguments` is the command line, the program first.

    Raises HarnessError without plotly, OutputError if `target` cannot be written.
    """
    page.write_page(render(done, page.plotly_script(), arguments), target)


def render(done: Conversion, plotly: str, arguments: Sequence[str]) -> str:
    """Return the page; `plotly` is the text of plotly.js."""
    plan, layers = done.plan, done.layers
    figures = pictures(layers, plan.n_expert_used)
    columns = [(title, name) for title, name in _COLUMNS if any(getattr(layer, name) is not None for layer in layers)]
    rows = [[i, *(getattr(layer, name) for _, name in columns)] for i, layer in enumerate(layers)]
    made = {key.removeprefix("moe2gguf."): value for key, value in plan.metadata.items() if key.startswith("moe2gguf.")}
    sections = [
        f"<h1>Calibration of <code>{escape(done.path.name)}</code></h1>",
        *(f"<p>{escape(line)}</p>" for line in summary(done)),
        *(page.figure(i, title) for i, (title, _) in enumerate(figures)),
        "<h2>Every layer</h2>",
        "<p>A click on a heading sorts by it. Energy kept: share of the routed experts' output energy that the chosen "
        "ones hold; best choice: if always the largest were chosen; hit rate: share of choices that are among those; "
        "constant: the smallest value of the direction that keeps experts always on, 1 for every token if it were "
        "perfect, on tokens held out; after refit: share of the held-out error that is "
        "left.</p>",
        page.table(["layer", *(title for title, _ in columns)], rows, "layers"),
        "<h2>How it was made</h2>",
        f"<pre>{escape(shlex.join(['moe2gguf', *arguments[1:]]))}</pre>",
        page.facts(made | {"source.sha256": done.source_digest}),
        *(f"<p>{escape(line)}</p>" for line in _methods(plan)),
    ]
    return page.document("moe2gguf calibration", sections, [figure for _, figure in figures], plotly)


def _methods(plan: Plan) -> list[str]:
    """What its method does, and where they are from."""
    if plan.slicing is None:
        return []
    method = plan.slicing.method
    tables = (("group", GROUPS), ("router", ROUTERS), ("amplify", AMPLIFICATIONS))
    lines = [f"--{name} {(value := getattr(method, name))}: {table[value]}" for name, table in tables]
    return lines + ([f"--refit: {CORRECTIONS['refit']}"] if method.refit else [])


def summary(done: Conversion) -> list[str]:
    """Return the result in sentences of plain text."""
    plan, layers = done.plan, done.layers
    n, k = plan.n_expert, plan.n_expert_used
    kept = [layer.energy_by_used[k - 1] for layer in layers]
    weakest = kept.index(min(kept))
    return [
        f"{k} of {n} experts per token in {len(layers)} layers. On the calibration text they hold {fmean(kept):.1%} of "
        f"all experts' output energy on average, {kept[weakest]:.1%} in layer {weakest}, the least.",
        "Energy is what the choice of experts can be judged by, layer by layer; what the whole model loses is for "
        "`moe2gguf compare` to say.",
    ]


def pictures(layers: Sequence[LayerReport], n_expert_used: int) -> list[tuple[str, dict[str, Any]]]:
    """Return titles and figures, each a dictionary of plotly's `data` and `layout`."""
    figures = [
        ("Load: share of tokens that run each expert", _load(layers)),
        ("Energy kept against experts used", _energy(layers, n_expert_used)),
    ]
    shares = [("hit rate", "hit_rate"), ("energy kept", "energy_kept"), ("best choice", "energy_oracle")]
    if all(layer.hit_rate is not None for layer in layers):
        figures.append(("The router against the best choice", _by_layer(layers, shares, "share")))
    figures.append(
        ("The constant direction on held-out tokens", _by_layer(layers, [("min", "constant_min")], "smallest v·x"))
    )
    return figures


def _load(layers: Sequence[LayerReport]) -> dict[str, Any]:
    trace = {
        "type": "heatmap",
        "z": [layer.load for layer in layers],
        "zmin": 0.0,
        "zmax": 1.0,
        "colorscale": "Viridis",
        "colorbar": {"thickness": 12},
        "hovertemplate": "layer %{y}, expert %{x}: %{z:.3f} of tokens<extra></extra>",
    }
    layout = {"xaxis": {"title": {"text": "expert"}}, "yaxis": {"title": {"text": "layer"}, "autorange": "reversed"}}
    return {"data": [trace], "layout": layout}


def _energy(layers: Sequence[LayerReport], n_expert_used: int) -> dict[str, Any]:
    """Mean, best and worst layer at every count, in the order that the router prefers."""
    by_used = list(zip(*(layer.energy_by_used for layer in layers), strict=True))
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": list(range(1, len(by_used) + 1)),
            "y": [of(values) for values in by_used],
            "line": {"dash": dash},
        }
        for name, of, dash in (("best layer", max, "dot"), ("mean", fmean, "solid"), ("worst layer", min, "dot"))
    ]
    layout = _axes("experts used", "share of all experts' output energy")
    layout["shapes"] = [
        {"type": "line", "x0": n_expert_used, "x1": n_expert_used, "y0": 0, "y1": 1, "yref": "paper"}
        | {"line": {"dash": "dash", "width": 1, "color": "gray"}}
    ]
    return {"data": traces, "layout": layout}


def _by_layer(layers: Sequence[LayerReport], names: Sequence[tuple[str, str]], axis: str) -> dict[str, Any]:
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": title,
            "x": list(range(len(layers))),
            "y": [getattr(layer, name) for layer in layers],
        }
        for title, name in names
    ]
    return {"data": traces, "layout": _axes("layer", axis)}


def _axes(x: str, y: str) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
