"""Which experts run, as one HTML page: words, heat maps, and a line for every expert."""

from collections.abc import Sequence
from html import escape
from typing import Any

from moe2gguf.measure.expert_usage import ExpertUse, LayerUse
from moe2gguf.measure.report.page import Figure, Page, Table, draw_map, label_map

_KINDS = {"always_on": "always on", "dead": "dead", "overloaded": "overloaded"}


def make_page(found: ExpertUse, arguments: Sequence[str]) -> Page:
    """Return the page; `arguments` is the command line, the program first."""
    return Page(
        title="moe2gguf expert-usage",
        heading=f"Expert usage of <code>{escape(found.config.label)}</code>",
        summary=[escape(line) for line in summarize(found)],
        figures=draw_figures(found),
        table=_table_experts(found),
        arguments=arguments,
        method=[
            "<p>llama.cpp's own routing tensors (ffn_moe_topk and ffn_moe_probs of every layer), read while it "
            "computes the text in windows; every token counts, the first of a window too.</p>"
        ],
        facts=found.environment | found.settings | {"tokens": found.n_token},
    )


def summarize(found: ExpertUse) -> list[str]:
    """Return the result in sentences of plain text."""
    one = found.config
    effective = [layer.effective for layer in found.layers]
    lines = [
        f"{found.n_token:,} tokens; {one.n_expert_used} of {one.n_expert} experts per token in {len(found.layers)} "
        f"layers. Their load is as even as that of {min(effective):.1f} to {max(effective):.1f} equally busy experts."
    ]
    for kind, words in _KINDS.items():
        names = found.named(kind)
        shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
        lines.append(f"{words.capitalize()}: {shown} (layer.expert)." if names else f"No expert is {words}.")
    moved = [layer.moved for layer in found.layers if layer.moved is not None]
    text = found.calibration[0].upper() + found.calibration[1:]
    if moved:
        text += f": {sum(moved) / len(moved):.1%} of the choices fell on other experts, {max(moved):.1%} in one layer"
    return [*lines, text + "."]


def draw_figures(found: ExpertUse) -> list[Figure]:
    """Return the maps of load and probability, and where experts are left out that of experts that run together."""
    figures = [draw_load(found, "Load: share of tokens that run each expert"), _draw_probability(found)]
    used = found.config.n_expert_used < found.config.n_expert
    return [*figures, _draw_together(found.layers)] if used else figures


def draw_load(found: ExpertUse, title: str) -> Figure:
    """Return the map of the load, layer by expert."""
    hover = "layer %{y}, expert %{x}: share of tokens %{z:.4f}"
    rows, y = [one.load for one in found.layers], [one.layer for one in found.layers]
    words = (
        "Good is even: a row of one color uses all its experts. A dark expert does nothing, and a bright one runs for "
        "every token."
    )
    return Figure(title, [draw_map(rows, hover, y, (0.0, 1.0))], label_map("expert", "layer"), words)


def _draw_probability(found: ExpertUse) -> Figure:
    hover = "layer %{y}, expert %{x}: mean probability %{z:.4f}"
    rows, y = [one.probability for one in found.layers], [one.layer for one in found.layers]
    words = "What the router prefers on average. Good is near the load: an expert that is preferred also runs."
    return Figure("The router's mean probability", [draw_map(rows, hover, y)], label_map("expert", "layer"), words)


def _draw_together(layers: Sequence[LayerUse]) -> Figure:
    """One layer at a time, chosen from a list: the share of tokens that run both."""
    trace = draw_map(layers[0].together, "experts %{y} and %{x}: share of tokens %{z:.4f}", limits=(0.0, 1.0))
    buttons: list[dict[str, Any]] = [
        {"method": "restyle", "label": f"layer {one.layer}", "args": [{"z": [[list(row) for row in one.together]]}]}
        for one in layers
    ]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    words = "On the diagonal is the load. Two experts that always run together could be one."
    layout = label_map("expert", "expert") | {"updatemenus": [menu]}
    return Figure("Which experts run together", [trace], layout, words)


def _table_experts(found: ExpertUse) -> Table:
    rows = []
    for one in found.layers:
        kinds = {e: words for kind, words in _KINDS.items() for e in getattr(one, kind)}
        for e, (load, probability) in enumerate(zip(one.load, one.probability, strict=True)):
            words = ", ".join(f"{word.text!r} ({word.share:.0%})" for word in one.words[e])
            rows.append((one.layer, e, load, probability, kinds.get(e, ""), words))
    return Table(
        title="Every expert",
        words="Typical tokens are those that run the expert more often than others do, by their part of the mutual "
        "information; in brackets the share of their occurrences that does.",
        columns=("layer", "expert", "load", "probability", "kind", "typical tokens"),
        rows=rows,
    )
