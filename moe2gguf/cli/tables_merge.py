"""What a person sees of a merge: one line per layer, how well its router knows whose prompt a token is from."""

from __future__ import annotations

from moe2gguf.cli import tables as display
from moe2gguf.recipes.merge_options import Merge


def print_merge(done: Merge) -> None:
    """The table, and the mean."""
    n, k = len(done.experts), done.options.used
    display.out().print(f"wrote {done.path}: {n} experts, {k} used per token", markup=False)
    if not done.layers:
        return
    table = display.make_table("layer", "accuracy", *(f"expert {e}" for e in range(n)), numbers=slice(None))
    for one in done.layers:
        shares = ["" if first is None else f"{first:.0%}" for first in one.first]
        if k < n:
            shares = [f"{share} ({runs:.0%})" if share else "" for share, runs in zip(shares, one.runs, strict=True)]
        table.add_row(str(one.layer), f"{one.accuracy:.1%}", *shares)
    display.print_table(table)
    console = display.out()
    for e, name in enumerate(done.experts):
        console.print(f"expert {e}: {name}", markup=False)
    more = " (in brackets: that run it at all)" if k < n else ""
    console.print(
        f"Of tokens that no router has seen {done.accuracy:.1%} choose the expert first whose prompt they are from, "
        f"over all layers; by guessing it were {1 / n:.1%}. By expert: its own tokens that choose it first{more}.",
        markup=False,
    )
