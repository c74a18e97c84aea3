"""What to expect of each number of used experts before anything is measured: rough, and honest about where it is from.

Quality is read off one model's measured table (SmolLM2-135M-Instruct, docs/experts.md), speed is the bound that
memory bandwidth sets to this file. Other models, texts and types differ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from moe2gguf.recipes.options import Options
from moe2gguf.spec import Recipe

BASIS = "SmolLM2-135M-Instruct on WikiText-2 (docs/experts.md); other models and texts differ"

Curve = Sequence[tuple[float, float]]
"""(share of the MLP's neurons that run, perplexity as a multiple of the dense model's), largest share first."""

MEASURED: dict[tuple[str, bool], Curve] = {
    ("refit", True): ((1.0, 1.0), (0.75, 1.17), (0.5, 1.53), (0.25, 2.35)),
    ("refit", False): ((1.0, 1.0), (0.75, 1.35), (0.5, 2.22)),
    ("used", True): ((1.0, 1.0), (0.75, 1.28), (0.5, 2.30)),
    ("fitted", True): ((1.0, 1.0), (0.75, 1.28), (0.5, 2.12)),
    ("fitted", False): ((1.0, 1.0), (0.75, 1.35), (0.5, 2.73)),
    ("any", True): ((1.0, 1.01), (0.75, 1.31), (0.5, 2.40)),
}
"""By what makes up for the experts that do not run, and whether the text was of the kind that is scored."""

WORST, LEAST_GAIN = 1.6, 1.1
"""A count is recommended where perplexity is expected to stay below WORST times the dense model's and memory bandwidth
alone would give at least LEAST_GAIN times its speed."""


@dataclass(frozen=True)
class Outlook:
    """One number of used experts: expected perplexity over the dense model's (None: not known), bound on the speed."""

    n_expert_used: int
    perplexity: float | None
    speed: float

    @property
    def recommended(self) -> bool:
        """Worth converting for."""
        return self.perplexity is not None and self.perplexity <= WORST and self.speed >= LEAST_GAIN


def outlook(options: Options, speed_bound: Callable[[int], float], *, own_text: bool) -> list[Outlook]:
    """For each count, 1 to all, the file that these options would make for it; `own_text`: not on the embedded one."""
    n = options.counts()[0]
    rows = []
    for k in range(1, n + 1):
        recipe = dataclasses.replace(options, used=k).chosen_recipe()
        known = curve(recipe, own_text=own_text, all_used=k == n)
        rows.append(Outlook(k, read_off(known, k / n) if known else None, speed_bound(k)))
    return rows


def curve(recipe: Recipe, *, own_text: bool, all_used: bool) -> Curve | None:
    """The measured curve of a recipe; None where there is none."""
    if all_used and not recipe.refit and recipe.amplify in ("exact", "used"):
        return ((1.0, 1.0),)
    if (recipe.group, recipe.router) != ("routed", "least-squares") or (recipe.refit and recipe.amplify == "any"):
        return None
    return MEASURED.get(("refit" if recipe.refit else recipe.amplify, own_text))


def read_off(known: Curve, share: float) -> float | None:
    """The curve at `share`, straight in log perplexity between its points; None below the last one.

    Example: halfway between (1, 1) and (0.5, 4) it is 2.
    """
    for (right, high), (left, low) in pairwise(known):
        if left <= share <= right:
            part = (right - share) / (right - left)
            return math.exp((1 - part) * math.log(high) + part * math.log(low))
    return known[0][1] if share == known[0][0] else None


def recommended(rows: Sequence[Outlook]) -> tuple[int, int] | None:
    """The smallest and the largest recommended count; None where there is none."""
    counts = [row.n_expert_used for row in rows if row.recommended]
    return (counts[0], counts[-1]) if counts else None


def words(rows: Sequence[Outlook]) -> str:
    """The recommendation as a sentence."""
    if (span := recommended(rows)) is None:
        known = any(row.perplexity is not None for row in rows[:-1])
        why = (
            f"no count below all gains {LEAST_GAIN} x at {WORST} x the perplexity or less" if known else "not measured"
        )
        return f"recommended: none ({why}); a smaller type may be the better buy"
    first, last = span
    return f"recommended: {first}" + (f" to {last}" if last > first else "") + f" experts used, judged by {BASIS}"


def to_dict(rows: Sequence[Outlook]) -> dict[str, Any]:
    """JSON-ready values."""
    return {
        "basis": BASIS,
        "recommended": recommended(rows),
        "perplexity_over_dense": {row.n_expert_used: row.perplexity and round(row.perplexity, 3) for row in rows},
    }
