"""What each tensor of a file to come is made of, as values; the second pass makes arrays of it with real experts.

Nothing here reads a weight. `moe2gguf.recipes.tensors_hf` and `moe2gguf.recipes.tensors_gguf` plan the tensors of the
two kinds of source, and make their arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe2gguf.experts.layer import LayerExperts, LayerReport
from moe2gguf.gguf.layout import Entry
from moe2gguf.gguf.rotary import halves_to_pairs
from moe2gguf.spec import Model, Slicing


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
class Stack:
    """Equally shaped sources, one behind the other: (n_source, *shape)."""


@dataclass(frozen=True)
class Half:
    """The first (0) or second (1) half of the rows of each expert in (n_expert, 2 * d_ff, d_model)."""

    which: int


@dataclass(frozen=True)
class ExpertRows:
    """A gate or up projection (d_ff, d_model) cut between its rows into the experts of a layer."""

    layer: int


@dataclass(frozen=True)
class ExpertColumns:
    """A down projection (d_model, d_ff) cut between its columns into the experts of a layer.

    amplified  the scale of each expert is multiplied into its weights
    """

    layer: int
    amplified: bool = True


@dataclass(frozen=True)
class Router:
    """The router of a layer; it has no source."""

    layer: int


@dataclass(frozen=True)
class Scales:
    """The scale of each expert of a layer; it has no source."""

    layer: int


@dataclass(frozen=True)
class RopeDivisors:
    """LLaMA 3's divisors of the rotary frequencies, from the hyper-parameters; they have no source."""


Operation: TypeAlias = Copy | RotaryPairs | Stack | Half | ExpertRows | ExpertColumns | Router | Scales | RopeDivisors


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
    """

    layer: Callable[[int], LayerExperts]
    reports: tuple[LayerReport, ...] = ()
    files: tuple[Path, ...] = ()


def plain_experts(model: Model, slicing: Slicing | None) -> ExpertSource:
    """The experts of a method that needs no calibration, the same in every layer; none where nothing is sliced."""
    if slicing is None:
        return ExpertSource(_no_experts)
    factor = slicing.n_expert if slicing.method.amplify == "exact" else slicing.n_expert_used
    layer = LayerExperts.plain(model.d_ff, model.d_model, slicing.n_expert, slicing.align, factor, slicing.grain)
    return ExpertSource(lambda _: layer)


def loaded_experts(
    load: Callable[[int], LayerExperts], reports: tuple[LayerReport, ...], files: tuple[Path, ...]
) -> ExpertSource:
    """Experts that `load` reads from `files`; the last two layers are kept, for their four tensors ask one by one."""
    return ExpertSource(functools.lru_cache(maxsize=2)(load), reports, files)


def _no_experts(i: int) -> LayerExperts:
    raise LookupError(f"layer {i} has no experts: the plan slices nothing")
