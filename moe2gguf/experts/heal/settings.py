"""What is trained, how, and for how long; and what each step sees.

Everything random is a function of the seed and the step's number, so a continued run sees what it would have seen, with
no state to keep.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Windows = NDArray[np.int64]
"""Token ids (n_window, n_context)."""


@dataclass(frozen=True)
class Training:
    """What is trained, and for how long.

    parts       names of `moe2gguf.experts.methods.TRAINED`; all other weights stay as they are
    used_range  (least, most) experts used; each step draws one count, all equally likely
    layerwise   passes over the text that train layer by layer; 0 leaves them out
    steps       steps that train the whole model after them; 0 leaves them out
    batch       windows per step; accumulate  parts that a step is computed in
    """

    parts: tuple[str, ...] = ("router", "experts")
    used_range: tuple[int, int] = (1, 1)
    layerwise: int = 1
    steps: int = 200
    batch: int = 4
    accumulate: int = 1
    lora_rank: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Loss:
    """The loss of the whole-model steps; the KL divergence from the teacher has weight 1.

    top         compare the teacher's N likeliest tokens (0: all)
    next_token  weight of the cross-entropy of the text itself
    """

    top: int = 0
    next_token: float = 0.0


@dataclass(frozen=True)
class Optimizer:
    """Learning rates of the layer-wise passes, of the steps and of the routers in both, and the rest of AdamW.

    warmup  share of the steps; clip  largest norm of the gradient
    """

    layer_lr: float = 1e-3
    lr: float = 2e-4
    router_lr: float = 5e-5
    weight_decay: float = 0.0
    warmup: float = 0.05
    clip: float = 1.0


@dataclass(frozen=True)
class Evaluation:
    """The held-out text is scored at the counts `used`, `every` so many steps; each time a checkpoint is saved."""

    used: tuple[int, ...] = (1,)
    every: int = 50


@dataclass(frozen=True)
class Compute:
    """Where and how it is computed: `device` of the layer-wise passes in torch (None: the best that is there)."""

    device: str | None = None
    precision: str = "no"
    checkpointing: bool = False


@dataclass(frozen=True)
class HealSettings:
    """All choices of a healing run but the text; every default is the command line's."""

    training: Training = field(default_factory=Training)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    evaluation: Evaluation = field(default_factory=Evaluation)
    compute: Compute = field(default_factory=Compute)


def draw_used(training: Training, step: int) -> int:
    """The number of experts used in one step, or in one window of the layer-wise passes."""
    low, high = training.used_range
    return int(np.random.default_rng((training.seed, 1, step)).integers(low, high + 1))


def draw_batch(training: Training, n_window: int, step: int) -> NDArray[np.int64]:
    """The windows of one step, (batch,): every pass takes each window once, in a new order."""
    places = np.arange(step * training.batch, (step + 1) * training.batch)
    return np.array([_order(training.seed, n_window, int(p) // n_window)[p % n_window] for p in places])


def _order(seed: int, n_window: int, number: int) -> NDArray[np.int64]:
    """The order of the windows (n_window,) in pass `number`."""
    return np.random.default_rng((seed, 2, number)).permutation(n_window)
