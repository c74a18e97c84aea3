"""What a person sees of experts at work: one line per layer, then the words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from moe2gguf.cli import tables as display

if TYPE_CHECKING:
    from moe2gguf.measure.expert_usage import ExpertUse, LayerUse
    from moe2gguf.measure.needed_experts import NeededExperts

_COLUMNS = ("layer", "effective", "router entropy", "lowest", "highest", "always on", "dead", "overloaded")
_SHOWN = 6


def print_experts(found: ExpertUse) -> None:
    """One line per layer: how evenly its experts are used, which stand out, and which come together."""
    from moe2gguf.measure.report.expert_usage import summarize

    moved = any(one.moved is not None for one in found.layers)
    table = display.make_table(*_COLUMNS, "together", numbers=slice(5))
    if moved:
        table.add_column("moved", justify="right", overflow="fold")
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


def print_needed(found: NeededExperts) -> None:
    """One line per count, the oracle in words, and one line per kind of token."""
    console, need = display.out(), found.need
    table = display.make_table("experts", "KL mean", "same top", "accepted", "MLP MB", "need it", numbers=slice(None))
    for one, share in zip(found.fixed, need.shares, strict=True):
        cells = (f"{one.same_top:.1%}", f"{one.acceptance:.1%}", f"{one.mlp_bytes / 1e6:.1f}", f"{share:.1%}")
        table.add_row(str(one.count), f"{one.kl:.3g}", *cells)
    display.print_table(table)
    console.print(
        f"\n{found.n_token:,} tokens need {need.mean:.2f} experts on average to be within {need.limit:g} nats of all "
        f"experts ({need.lasting:.2f} if all larger counts must be, too). An oracle that knew them would have a mean "
        f"KL of {need.kl:.3g}. A fixed count needs {need.same_kl:.2f} for that, which reads {need.mlp_gain:.2f} times "
        f"the MLP bytes and {need.gain:.2f} times all bytes: the speed could gain that much at most.\n"
    )
    table = display.make_table("", "", "tokens", "mean need", numbers=slice(2, None))
    for title, groups in need.groups.items():
        for name, (n_token, mean) in sorted(groups.items(), key=lambda one: one[1][1]):
            table.add_row(title, name, str(n_token), f"{mean:.2f}")
    display.print_table(table)
