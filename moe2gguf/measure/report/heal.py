"""The curves of a healing run as one HTML file: loss by step, held-out divergence by step and count, error by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe2gguf.measure.report import page

Line = Mapping[str, Any]


def write_curves(log: Sequence[Line], target: Path) -> None:
    """Write the page. Raises HarnessError without plotly, OutputError if `target` cannot be written."""
    page.write_page(render(log, page.plotly_script()), target)


def render(log: Sequence[Line], plotly: str) -> str:
    """The page; `plotly` is the text of plotly.js."""
    figures = [figure for figure in (_layers(log), _steps(log), _held_out(log)) if figure["data"]]
    heads = [page.figure(i, figure.pop("title")) for i, figure in enumerate(figures)]
    return page.document("moe2gguf heal", ["<h1>Healing</h1>", *heads, _table(log)], figures, plotly)


def _of(log: Sequence[Line], stage: str) -> list[Line]:
    return [line for line in log if line["stage"] == stage]


def _curve(name: str, x: list[Any], y: list[Any], mode: str = "lines+markers") -> dict[str, Any]:
    return {"type": "scatter", "mode": mode, "name": name, "x": x, "y": y}


def _figure(title: str, x: str, y: str, curves: list[dict[str, Any]], **axis: Any) -> dict[str, Any]:
    return {
        "title": title,
        "data": curves,
        "layout": {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}, **axis}},
    }


def _layers(log: Sequence[Line]) -> dict[str, Any]:
    lines = _of(log, "layerwise")
    x = [line["layer"] for line in lines]
    names = {"error_before": "before", "error_refit": "closed form", "error_after": "after training"}
    curves = [_curve(name, x, [line[key] for line in lines]) for key, name in names.items()] if lines else []
    return _figure("Held-out error of each layer", "layer", "share of the target's energy", curves)


def _steps(log: Sequence[Line]) -> dict[str, Any]:
    lines = _of(log, "steps")
    curves = [_curve("loss", [s["step"] for s in lines], [s["loss"] for s in lines], "markers")] if lines else []
    return _figure("Training loss, each step at its own count", "step", "nats per token", curves)


def _held_out(log: Sequence[Line]) -> dict[str, Any]:
    lines = _of(log, "evaluation")
    x = [line["step"] for line in lines]
    curves = [_curve(f"k = {k}", x, [s["kl"][k] for s in lines]) for k in lines[0]["kl"]] if lines else []
    return _figure("Held-out KL divergence from the dense model", "step", "nats per token", curves, type="log")


def _table(log: Sequence[Line]) -> str:
    """Every evaluation in numbers."""
    lines = _of(log, "evaluation")
    counts = list(lines[0]["kl"]) if lines else []
    rows = [[line["step"], *(line["kl"][k] for k in counts)] for line in lines]
    return page.table(["step", *(f"KL, k = {k}" for k in counts)], rows, "rows")
