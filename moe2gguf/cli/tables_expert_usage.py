"""What a person sees of experts at work: one line per layer, then the words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from moe2gguf.cli import tables as display

if TYPE_CHECKING:
    from moe2gguf.measure.expert_usage import ExpertUse, LayerUse

_COLUMNS = ("layer", "effective", "router entropy", "lowest", "highest", "always on", "dead", "overloaded")
_SHOWN = 6


def print_experts(found: ExpertUse) -> None:
    """One line per layer: how evenly its experts are used, which stand out, and which come together."""
    from moe2gguf.measure.report.expert_usage import summarize

    moved = any(one.moved is not None for one in found.layers)
    table = display.make_table(*_COLUMNS, "together", numbers=slice(5))
    if moved:
        table.add_column("moved", justify="right")
    for one in found.layers:
        table.add_row(*_format_layer(one), *([f"{one.moved:.1%}"] if one.moved is not None else []))
    display.print_table(table)
    console = display.out()
    console.print()
    for line in summarize(found):
        console.print(escape(line))


def _format_layer(one: LayerUse) -> tuple[str, ...]:
    pair = f"{one.pair[0]} {one.pair[1]} ({one.correlation:.2f})" if one.pair else ""
    return (
        str(one.layer),
        f"{one.effective:.1f}",
        f"{one.router_entropy:.3f}",
        f"{min(one.load):.1%}",
        f"{max(one.load):.1%}",
        *(_format_numbers(kind) for kind in (one.always_on, one.dead, one.overloaded)),
        pair,
    )


def _format_numbers(numbers: tuple[int, ...]) -> str:
    more = f" +{len(numbers) - _SHOWN}" if len(numbers) > _SHOWN else ""
    return " ".join(map(str, numbers[:_SHOWN])) + more
