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
    columns = [f"{i} {name}" for i, name in enumerate(done.experts)]
    table = display.make_table("layer", "accuracy", *columns, numbers=slice(None))
    for one in done.layers:
        shares = [
            "" if first is None else f"{first:.0%} ({runs:.0%})"
            for first, runs in zip(one.first, one.runs, strict=True)
        ]
        table.add_row(str(one.layer), f"{one.accuracy:.1%}", *shares)
    display.print_table(table)
    display.out().print(
        f"\nThe first expert of a held-out token is the one whose prompt it is from for {done.accuracy:.1%} of tokens, "
        f"over all layers (guessing: {1 / n:.1%}). By expert: its own tokens that choose it first (that run it)."
    )
