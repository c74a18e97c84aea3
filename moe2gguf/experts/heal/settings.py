"""What is trained, on what, how long: settings, the windows of text, and what each step sees.

Everything random is a function of the seed and the step's number, so a run that is continued sees what it would have
seen, with no state to keep.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Windows = NDArray[np.int64]
"""Token ids (n_window, n_context)."""


@dataclass(frozen=True)
class HealSettings:
    """Every default is the command line's.

    train        names of `moe2gguf.experts.methods.TRAINED`
    used_range   (least, most) experts per token; each step draws one count, all equally likely
    evaluate_at  counts at which the held-out text is scored
    layerwise    passes over the text in the layer-wise stage; 0 leaves it out
    steps        end-to-end steps; 0 leaves them out
    batch        windows per step; accumulate  parts that a step is computed in
    layer_lr, lr, router_lr   rates of the layer-wise stage, of the steps, of the routers
    weight_decay, warmup (share of the steps), clip (largest norm of the gradient)
    top          compare the teacher's N likeliest tokens (0: all)
    next_token   weight of the cross-entropy of the text itself; the divergence has weight 1
    """

    train: tuple[str, ...] = ("router", "experts")
    used_range: tuple[int, int] = (1, 1)
    evaluate_at: tuple[int, ...] = (1,)
    layerwise: int = 1
    steps: int = 200
    batch: int = 4
    accumulate: int = 1
    layer_lr: float = 1e-3
    lr: float = 2e-4
    router_lr: float = 5e-5
    weight_decay: float = 0.0
    warmup: float = 0.05
    clip: float = 1.0
    top: int = 0
    next_token: float = 0.0
    lora_rank: int = 16
    evaluate_every: int = 50
    save_every: int = 50
    checkpointing: bool = False
    precision: str = "no"
    device: str | None = None
    seed: int = 0


def used_at(settings: HealSettings, step: int) -> int:
    """The number of experts per token of one step, or of one window in the layer-wise stage."""
    low, high = settings.used_range
    return int(np.random.default_rng((settings.seed, 1, step)).integers(low, high + 1))


def batch_at(settings: HealSettings, n_window: int, step: int) -> NDArray[np.int64]:
    """The windows of one step, (batch,): every pass takes each window once, in a new order."""
    places = np.arange(step * settings.batch, (step + 1) * settings.batch)
    return np.array([_order(settings.seed, n_window, int(p) // n_window)[p % n_window] for p in places])


def _order(seed: int, n_window: int, number: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, 2, number)).permutation(n_window)
