"""What a person sees of healing: a line per layer, step and evaluation, then the scores."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.markup import escape

from moe2gguf.cli import tables as display
from moe2gguf.experts.heal.log import LayerLine, LogLine, ScoreLine

if TYPE_CHECKING:
    from moe2gguf.recipes.heal import Healing


def print_heal_line(line: LogLine) -> None:
    """One line of a healing run on stderr: every layer, every evaluation, every tenth step."""
    if isinstance(line, LayerLine):
        text = f"layer {line.layer}: held-out error {line.error_before:.4f} -> {line.error_after:.4f}"
    elif isinstance(line, ScoreLine):
        scores = ", ".join(f"k = {k}: {kl:.4f}" for k, kl in line.kl.items())
        text = f"step {line.step}: held-out KL {scores}{' (best)' if line.best else ''}"
    elif line.step % 10 == 0:
        text = f"step {line.step}: loss {line.loss:.4f} with {line.used} experts"
        text += f", {line.tokens_per_second:.0f} tokens/s"
    else:
        return
    display.err().print(text, markup=False)


def print_healing(done: Healing) -> None:
    """The first and the best scores on held-out text, for each number of experts."""
    console = display.out()
    if scores := done.scores:
        best = min(scores, key=lambda line: line.kl_mean)
        columns = ("experts used", "KL before", "KL after", "perplexity after", "of the dense model")
        table = display.make_table(*columns, numbers=slice(None))
        for k in best.kl:
            values = (scores[0].kl[k], best.kl[k], math.exp(best.nll[k]), math.exp(best.nll_dense))
            table.add_row(k, *(f"{value:.4g}" for value in values))
        console.print(table)
    console.print(f"wrote {escape(str(done.path))}")
