"""What each tensor of a file to come is made of, as values; the second pass makes arrays of it with real experts.

Nothing here reads a weight. `moe2gguf.recipes.tensors_hf` and `moe2gguf.recipes.tensors_gguf` plan the tensors of the
two kinds of source, and make their arrays.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from numpy.typing import NDArray

from moe2gguf.experts.layer import LayerExperts, LayerReport
from moe2gguf.experts.slicing import Order
from moe2gguf.gguf.layout import Entry
from moe2gguf.gguf.rotary import halves_to_pairs
from moe2gguf.graphs import GRAPHS
from moe2gguf.spec import Model, Slicing

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Copy:
    """The source as it is, in pieces of rows."""


@dataclass(frozen=True)
class RotaryPairs:
    """The source with its rows in another order: from rotary halves to rotary pairs.

    heads    how many heads each part has, where the source holds several parts one behind the other (q, k)
    n_other  rows behind these parts that stay where they are (v)
    """

    heads: tuple[int, ...]
    n_other: int = 0

    def order(self, d_head: int) -> NDArray[np.int64]:
        """Which row of the source stands in each row."""
        parts, start = [], 0
        for n_head in self.heads:
            parts.append(halves_to_pairs(n_head, d_head) + start)
            start += n_head * d_head
        return np.concatenate([*parts, np.arange(self.n_other) + start])


@dataclass(frozen=True)
class RotaryHalves(RotaryPairs):
    """The same the other way round: from rotary pairs to rotary halves."""

    def order(self, d_head: int) -> NDArray[np.int64]:
        """Which row of the source stands in each row."""
        return np.argsort(super().order(d_head))


@dataclass(frozen=True)
class Stack:
    """Equally shaped sources, one behind the other: (n_source, *shape)."""


@dataclass(frozen=True)
class Half:
    """The first (0) or second (1) half of the rows of each expert in (n_expert, 2 * d_ff, d_model)."""

    which: int


@dataclass(frozen=True)
class Part:
    """Some of a layer's experts, from `start` on and before `stop` (None: all); `joined` they are one wide expert."""

    start: int = 0
    stop: int | None = None
    joined: bool = False

    def select(self, order: Order) -> Order:
        """The places (n_expert, d_expert) of these experts; (1, n_expert * d_expert) where they are joined."""
        chosen = order[self.start : self.stop]
        return chosen.reshape(1, -1) if self.joined else chosen

    def select_scale(self, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scale of each of them; the joined ones have one in common."""
        chosen = scale[self.start : self.stop]
        return chosen[:1] if self.joined else chosen


@dataclass(frozen=True)
class ExpertRows:
    """A gate or up projection (d_ff, d_model) cut between its rows into experts of a layer."""

    layer: int
    part: Part


@dataclass(frozen=True)
class ExpertColumns:
    """A down projection (d_model, d_ff) cut between its columns into experts of a layer.

    amplified  the scale of each expert is multiplied into its weights
    """

    layer: int
    part: Part
    amplified: bool = True

    def choose_factors(self, experts: LayerExperts) -> NDArray[np.float32]:
        """What each expert is multiplied by."""
        scale = self.part.select_scale(experts.scale)
        return scale if self.amplified else np.ones_like(scale)


@dataclass(frozen=True)
class Router:
    """The router's rows for experts of a layer; it has no source."""

    layer: int
    part: Part


@dataclass(frozen=True)
class SelectionBias:
    """What is added to the router's probabilities when it chooses experts of a layer; it has no source."""

    layer: int
    part: Part


@dataclass(frozen=True)
class Scales:
    """The scale of each expert of a layer; it has no source."""

    layer: int


Unsourced: TypeAlias = Router | SelectionBias | Scales
"""What is made without a source."""


@dataclass(frozen=True)
class RopeDivisors:
    """LLaMA 3's divisors of the rotary frequencies, from the hyper-parameters; they have no source."""


Operation: TypeAlias = (
    Copy | RotaryPairs | RotaryHalves | Stack | Half | ExpertRows | ExpertColumns | Unsourced | RopeDivisors
)


@dataclass(frozen=True)
class PlannedTensor(Entry):
    """A tensor of the file to come: the names of its `sources`, and the `operation` that makes it of them.

    copied  its blocks are copied from the source, so that nothing is quantized
    guided  an importance matrix weighs the errors of its columns while it is quantized
    """

    operation: Operation = field(default_factory=Copy)
    sources: tuple[str, ...] = ()
    copied: bool = False
    guided: bool = False


@dataclass(frozen=True)
class ExpertSource:
    """Where the second pass finds the experts of each layer.

    layer    gives the experts of a layer
    reports  what the calibration found about each layer, if there was one
    files    the files that `layer` reads, which are part of what decides the bytes of the result
    finish   is called when the result is written: it keeps a new calibration where that is wanted, and removes `files`
    """

    layer: Callable[[int], LayerExperts]
    reports: tuple[LayerReport, ...] = ()
    files: tuple[Path, ...] = ()
    finish: Callable[[], None] = lambda: None


def plain_experts(model: Model, slicing: Slicing | None) -> ExpertSource:
    """The experts of a method that needs no calibration, the same in every layer; none where nothing is sliced."""
    if slicing is None:
        return ExpertSource(_no_experts)
    layer = LayerExperts.plain(model.d_ff, model.d_model, slicing)
    return ExpertSource(lambda _: layer)


def plan_router(slicing: Slicing, d_model: int, i: int) -> list[PlannedTensor]:
    """What decides which experts of layer `i` run, and how loud they are; all F32, and made without a source."""
    n, routed = slicing.n_routed, Part(slicing.in_shared)
    tensors = [PlannedTensor(f"blk.{i}.ffn_gate_inp.weight", (n, d_model), GGMLType.F32, Router(i, routed))]
    if GRAPHS[slicing.target].has_selection_bias:
        tensors.append(PlannedTensor(f"blk.{i}.exp_probs_b.bias", (n,), GGMLType.F32, SelectionBias(i, routed)))
    if slicing.scale_tensor:
        tensors.append(PlannedTensor(f"blk.{i}.ffn_down_exps.scale", (n,), GGMLType.F32, Scales(i)))
    return tensors


def plan_projection(slicing: Slicing, d_model: int, role: str, i: int) -> list[tuple[str, Shape, Operation]]:
    """Name, shape and operation of what becomes of one projection of layer `i`'s MLP when it is cut."""
    name, n, d_expert = f"blk.{i}.ffn_{role}", slicing.n_routed, slicing.d_expert
    routed, shared = Part(slicing.in_shared), Part(0, slicing.in_shared, joined=True)
    d_shared, amplified = slicing.in_shared * d_expert, not slicing.scale_tensor
    if role == "down":
        tensors: list[tuple[str, Shape, Operation]] = [
            (f"{name}_exps.weight", (n, d_model, d_expert), ExpertColumns(i, routed, amplified)),
            (f"{name}_shexp.weight", (d_model, d_shared), ExpertColumns(i, shared, amplified)),
        ]
    else:
        tensors = [
            (f"{name}_exps.weight", (n, d_expert, d_model), ExpertRows(i, routed)),
            (f"{name}_shexp.weight", (d_shared, d_model), ExpertRows(i, shared)),
        ]
    return tensors if slicing.in_shared else tensors[:1]


def loaded_experts(
    load: Callable[[int], LayerExperts],
    reports: tuple[LayerReport, ...],
    files: tuple[Path, ...],
    finish: Callable[[], None] = lambda: None,
) -> ExpertSource:
    """Experts that `load` reads from `files`; the last two layers are kept, for their four tensors ask one by one."""
    return ExpertSource(functools.lru_cache(maxsize=2)(load), reports, files, finish)


def make_unsourced(made: Unsourced, experts: ExpertSource) -> NDArray[np.float32]:
    """The array of a tensor that has no source."""
    layer = experts.layer(made.layer)
    match made:
        case Router(_, part):
            return layer.router[part.start : part.stop]
        case SelectionBias(_, part):
            return layer.bias[part.start : part.stop]
        case Scales():
            return layer.scale


def _no_experts(i: int) -> LayerExperts:
    raise LookupError(f"layer {i} has no experts: the plan slices nothing")
