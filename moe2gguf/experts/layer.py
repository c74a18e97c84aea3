"""What is decided about one layer's experts, and its file: the hand-over from calibration to writing."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    report         figures for the user, see `moe2gguf.experts.slice_layer.carve`
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
        """The preset `exact`: contiguous slices of whole `grain`s, a zero router, one amplification for all."""
        order = contiguous_order(d_ff, n_expert, align, grain)
        return cls(order, zero_router(n_expert, d_model), np.full(n_expert, amplification, np.float32))

    def arrays(self) -> dict[str, Any]:
        """All but the report, by name; what is None is left out."""
        found: dict[str, Any] = {"order": self.order, "router": self.router, "amplification": self.amplification}
        if self.down is not None:
            found["down"] = self.down
        return found

    @classmethod
    def of(cls, arrays: Mapping[str, Any], report: dict[str, Any]) -> LayerExperts:
        """What has these `arrays`."""
        return cls(arrays["order"], arrays["router"], arrays["amplification"], arrays.get("down"), report)

    def save(self, folder: Path, i: int) -> None:
        """Write `layer-I.npz`, by rename."""
        unfinished = folder / f"layer-{i}.tmp.npz"
        np.savez(unfinished, report=np.array(json.dumps(self.report)), **self.arrays())
        unfinished.replace(folder / f"layer-{i}.npz")

    @classmethod
    def load(cls, folder: Path, i: int) -> LayerExperts:
        """Read what `save` wrote; nothing is unpickled."""
        with np.load(folder / f"layer-{i}.npz", allow_pickle=False) as file:
            return cls.of(file, json.loads(str(file["report"])))
