"""What is decided about one layer's experts, as numpy arrays, and its file: what calibration hands over to writing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe2gguf.experts.slicing import Order, contiguous_order, plain_scale
from moe2gguf.spec import Slicing


@dataclass(frozen=True)
class LayerReport:
    """What calibration found about one layer; shares lie between 0 and 1.

    n_shared        number of shared experts, which run for every token
    load            (n_expert,) share of the tokens that each expert runs for
    constant_min    smallest v . x on held-out tokens, with v the constant direction (`moe2gguf.experts.routing`)
    shared_rate     share of the tokens for which all shared experts run
    energy_by_used  (n_expert,) share of all experts' output energy that the router's first 1, 2 ... n choices have
    energy_kept     share of the routed experts' output energy that the chosen ones have
    energy_oracle   the same if the experts with the largest outputs were chosen
    hit_rate        share of the router's choices that are among the oracle's
    refit_error     share of the squared error on held-out tokens that the refit leaves
    refit_strength  ridge of the refit, relative to the mean diagonal; None where no ridge helped

    constant_min is None where the graph has a shared expert of its own, the three behind it where nothing is routed,
    the last two where nothing was refitted.
    """

    n_shared: int
    load: list[float]
    shared_rate: float
    energy_by_used: list[float]
    constant_min: float | None = None
    energy_kept: float | None = None
    energy_oracle: float | None = None
    hit_rate: float | None = None
    refit_error: float | None = None
    refit_strength: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-ready values, without those that are None."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], n_expert: int) -> LayerReport:
        """Make the report of an expert count from what `to_dict` gave; names that are not known are left out.

        Raises:
            TypeError, ValueError: a figure that every layer has is missing, one is not a finite number, or a list has
                another length than the number of experts.
        """
        if not isinstance(values, Mapping):
            raise TypeError("a layer's report is not an object")
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        for name, value in known.items():
            figures = value if isinstance(value, list) else [value]
            if not all(type(figure) in (int, float) and math.isfinite(figure) for figure in figures):
                raise ValueError(f"{name} of a layer is not a finite number")
        report = cls(**known)
        if not len(report.load) == len(report.energy_by_used) == n_expert:
            raise ValueError(f"a layer has figures of {len(report.load)} experts instead of {n_expert}")
        return replace(report, n_shared=int(report.n_shared))


@dataclass(frozen=True)
class LayerExperts:
    """One layer's experts.

    order   (n_expert, d_expert): neuron numbers, see `moe2gguf.experts.slicing`
    router  (n_expert, d_model) float32
    scale   (n_expert,) float32, multiplies each expert's down projection
    bias    (n_expert,) float32, added to the router's probabilities when experts are chosen, in a graph that does that
    down    (d_model, d_ff) float32 in place of the checkpoint's down projection, or None
    report  what calibration found, or None where there was none
    """

    order: Order
    router: NDArray[np.float32]
    scale: NDArray[np.float32]
    down: NDArray[np.float32] | None = None
    report: LayerReport | None = None
    bias: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))

    @classmethod
    def plain(cls, d_ff: int, d_model: int, slicing: Slicing) -> LayerExperts:
        """Make the experts of the preset `exact`: contiguous slices of whole grains, a zero router, one scale.

        Equal logits select well-defined experts only where all are used: which ones llama.cpp picks among them is not
        defined (https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-cpu/ops.cpp#L8707-L8757).
        """
        n = slicing.n_expert
        order = contiguous_order(d_ff, n, slicing.align, slicing.grain)
        return cls(order, np.zeros((n, d_model), np.float32), plain_scale(slicing), bias=np.zeros(n, np.float32))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by the names that files have for them, without those that are left out."""
        found: dict[str, NDArray[Any]] = {"order": self.order, "router": self.router, "amplification": self.scale}
        found |= {"bias": self.bias} if self.bias.size else {}
        return found if self.down is None else found | {"down": self.down}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], report: LayerReport | None) -> LayerExperts:
        """Make the experts with these `arrays`, named as by `arrays()`."""
        bias = {"bias": arrays["bias"]} if "bias" in arrays else {}
        return cls(arrays["order"], arrays["router"], arrays["amplification"], arrays.get("down"), report, **bias)

    def save(self, folder: Path, i: int) -> None:
        """Write `layer-I.npz`, by rename."""
        unfinished = folder / f"layer-{i}.tmp.npz"
        report = self.report.to_dict() if self.report else {}
        np.savez(unfinished, report=np.array(json.dumps(report)), **self.arrays())  # type: ignore[arg-type]
        unfinished.replace(folder / f"layer-{i}.npz")

    @classmethod
    def load(cls, folder: Path, i: int) -> LayerExperts:
        """Read what `save` wrote; nothing is unpickled."""
        with np.load(folder / f"layer-{i}.npz", allow_pickle=False) as file:
            report = json.loads(str(file["report"]))
            return cls.from_arrays(file, LayerReport.from_dict(report, len(file["router"])) if report else None)
