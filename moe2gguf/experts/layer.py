"""What is decided about one layer's experts, and its file: the hand-over from calibration to writing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe2gguf.experts.slicing import Order, contiguous_order, zero_router


@dataclass(frozen=True)
class LayerExperts:
    """One layer's experts.

    order          (n_expert, d_expert): neuron numbers, see `moe2gguf.experts.slicing`
    router         (n_expert, d_model) float32
    amplification  (n_expert,) float32, multiplies each expert's down projection
    down           (d_model, d_ff) float32 in place of the checkpoint's down projection, or None
    report         figures for the user, see `moe2gguf.experts.carve.carve`
    """

    order: Order
    router: NDArray[np.float32]
    amplification: NDArray[np.float32]
    down: NDArray[np.float32] | None = None
    report: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def plain(
        cls, d_ff: int, d_model: int, n_expert: int, align: int, amplification: float, grain: int = 1
    ) -> LayerExperts:
        """The seed recipe: contiguous slices of whole `grain`s, a zero router, one amplification for all."""
        order = contiguous_order(d_ff, n_expert, align, grain)
        return cls(order, zero_router(n_expert, d_model), np.full(n_expert, amplification, np.float32))

    def save(self, folder: Path, i: int) -> None:
        """Write `layer-I.npz`, by rename."""
        unfinished = folder / f"layer-{i}.tmp.npz"
        np.savez(
            unfinished,
            order=self.order,
            router=self.router,
            amplification=self.amplification,
            down=np.zeros(0, np.float32) if self.down is None else self.down,
            report=np.array(json.dumps(self.report)),
        )
        unfinished.replace(folder / f"layer-{i}.npz")

    @classmethod
    def load(cls, folder: Path, i: int) -> LayerExperts:
        """Read what `save` wrote; nothing is unpickled."""
        with np.load(folder / f"layer-{i}.npz", allow_pickle=False) as file:
            down = file["down"] if file["down"].size else None
            report = json.loads(str(file["report"]))
            return cls(file["order"], file["router"], file["amplification"], down, report)
