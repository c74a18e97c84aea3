"""A calibration as one HTML page: words, figures of every layer, a table, and what it was made from."""

from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean

from moe2gguf.experts.layer import LayerReport
from moe2gguf.experts.methods import AMPLIFICATIONS, CORRECTIONS, GROUPS, ROUTERS
from moe2gguf.gguf.metadata import CALIBRATION_LOAD
from moe2gguf.measure.report.page import Figure, Page, Table, draw_line, draw_map, label_axes, label_map, mark_value
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


def make_page(done: Conversion, arguments: Sequence[str]) -> Page:
    """Return the page of a conversion that calibrated; `arguments` is the command line, the program first."""
    known = {k: v for k, v in done.plan.metadata.items() if k != CALIBRATION_LOAD}  # which a figure shows
    made = {k.removeprefix("moe2gguf."): v for k, v in known.items() if k.startswith("moe2gguf.")}
    return Page(
        title="moe2gguf calibration",
        heading=f"Calibration of <code>{escape(done.path.name)}</code>",
        summary=[escape(line) for line in summarize(done)],
        figures=draw_figures(done.numbered_layers, done.plan.n_expert_used),
        table=_table_layers(done.numbered_layers),
        arguments=arguments,
        method=[f"<p>{escape(line)}</p>" for line in _describe_method(done.plan)],
        facts=made | {"source.sha256": done.source_digest},
    )


def summarize(done: Conversion) -> list[str]:
    """Return the result in sentences of plain text."""
    plan, layers = done.plan, done.numbered_layers
    n, k = plan.n_expert, plan.n_expert_used
    kept = {i: layer.energy_by_used[k - 1] for i, layer in layers.items()}
    weakest = min(kept, key=kept.__getitem__)
    return [
        f"{k} of {n} experts per token in {len(layers)} layers. On the calibration text they hold "
        f"{fmean(kept.values()):.1%} of all experts' output energy on average, {kept[weakest]:.1%} in layer {weakest}, "
        "the least.",
        "Energy measures the choice of experts, layer by layer; moe2gguf compare measures the whole model.",
    ]


def draw_figures(layers: Mapping[int, LayerReport], n_expert_used: int) -> list[Figure]:
    """Return the load, the energy at every count, the router beside the best choice, and the constant direction."""
    shares = [("hit rate", "hit_rate"), ("energy kept", "energy_kept"), ("best choice", "energy_oracle")]
    has_router = all(layer.hit_rate is not None for layer in layers.values())
    good = "Good is high, and the energy kept near the best choice: the router finds the experts that matter."
    router = [_draw_layers("The router against the best choice", layers, shares, "share", good)] if has_router else []
    constant = "The constant direction on held-out tokens"
    even = "Good is near 1: below 0.5 the experts that are always on can lose to others for some token."
    has_constant = all(layer.constant_min is not None for layer in layers.values())
    lines = [("min", "constant_min")]
    direction = [_draw_layers(constant, layers, lines, "smallest v·x", even)] if has_constant else []
    return [
        _draw_load(layers),
        _draw_energy(layers, n_expert_used),
        *router,
        *direction,
    ]


def _draw_load(layers: Mapping[int, LayerReport]) -> Figure:
    rows, hover = [layer.load for layer in layers.values()], "layer %{y}, expert %{x}: %{z:.3f} of tokens"
    trace = draw_map(rows, hover, [*layers], limits=(0.0, 1.0))
    words = "Good is even: a dark expert learned from few tokens; the bright ones run for every token."
    return Figure("Load: share of tokens that run each expert", [trace], label_map("expert", "layer"), words)


def _draw_energy(layers: Mapping[int, LayerReport], n_expert_used: int) -> Figure:
    """Mean, best and worst layer at every count, in the order that the router prefers."""
    by_used = list(zip(*(layer.energy_by_used for layer in layers.values()), strict=True))
    x = range(1, len(by_used) + 1)
    lines = [
        draw_line(name, x, [of(values) for values in by_used], line={"dash": dash})
        for name, of, dash in (("best layer", max, "dot"), ("mean", fmean, "solid"), ("worst layer", min, "dot"))
    ]
    layout = label_axes("experts used", "share of the energy (higher is better)", counts=x)
    words = "Good is high at the dashed line, the experts that are used, with the worst layer near the mean."
    return Figure(
        "Energy kept against experts used", lines, layout | {"shapes": [mark_value("x", n_expert_used)]}, words
    )


def _draw_layers(
    title: str, layers: Mapping[int, LayerReport], names: Sequence[tuple[str, str]], axis: str, words: str
) -> Figure:
    x = [*layers]
    lines = [draw_line(label, x, [getattr(layer, name) for layer in layers.values()]) for label, name in names]
    return Figure(title, lines, label_axes("layer", f"{axis} (higher is better)", counts=x), words)


def _table_layers(layers: Mapping[int, LayerReport]) -> Table:
    reports = [*layers.values()]
    columns = [(title, name) for title, name in _COLUMNS if any(getattr(one, name) is not None for one in reports)]
    return Table(
        title="Every layer",
        words="Energy kept: share of the routed experts' output energy that the chosen ones hold; best choice: if "
        "always the largest were chosen; hit rate: share of choices that are among those; constant: the smallest value "
        "of the direction that keeps experts always on, 1 for every token if it were perfect, on tokens held out; "
        "after refit: share of the held-out error that is left.",
        columns=["layer", *(title for title, _ in columns)],
        rows=[[i, *(getattr(layer, name) for _, name in columns)] for i, layer in layers.items()],
        name="layers",
    )


def _describe_method(plan: Plan) -> list[str]:
    """Return what the method's parts do, and where they are from."""
    if plan.slicing is None:
        return []
    method = plan.slicing.method
    tables = (("group", GROUPS), ("router", ROUTERS), ("amplify", AMPLIFICATIONS))
    lines = [f"--{name} {(value := getattr(method, name))}: {table[value]}" for name, table in tables]
    return lines + ([f"--refit: {CORRECTIONS['refit']}"] if method.refit else [])
