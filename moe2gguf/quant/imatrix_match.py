"""Which importance each tensor of a file to come gets, and everything about an importance matrix that does not fit it.

A tensor's importance is one vector of mean squared inputs per matrix: one, or one per expert. A matrix collected from
the dense model serves experts as well. Every expert's gate and up projection sees what the dense one sees, and the
columns of a down projection are neurons, which are picked in the order in which the experts hold them.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import list_names
from moe2gguf.gguf.layout import Entry
from moe2gguf.gguf.writer import Importance
from moe2gguf.quant.assign import may_quantize
from moe2gguf.quant.imatrix import Activity, ImportanceMatrix
from moe2gguf.quant.rules import VOCABULARY

FEW = 64
"""Tokens below which an expert's mean squares are mostly noise: a relative error of sqrt(2 / 64), 18 %, or more."""

Means = NDArray[np.float32]  # (n_mat, width); a row of NaN has no data


@dataclass(frozen=True)
class Neurons:
    """How the experts hold a dense MLP: `d_ff` neurons, and per layer the `order` (n_expert, d_expert), -1 for zero."""

    d_ff: int
    order: Callable[[int], NDArray[np.int64]]


@dataclass(frozen=True)
class Problem:
    """Why a tensor lacks importance, the same words for all tensors alike, and what is particular to this one."""

    why: str
    detail: str = ""


@dataclass(frozen=True)
class Guidance:
    """The importance of tensors by name, and the problems of those that lack some or all of it.

    `complete` are the tensors all of whose matrices have an importance; `few` the fewest tokens of barely seen experts.
    """

    importance: Mapping[str, Importance] = field(default_factory=dict)
    problems: Mapping[str, Problem] = field(default_factory=dict)
    complete: frozenset[str] = frozenset()
    few: Mapping[str, int] = field(default_factory=dict)

    def refusals(self, quantized: Iterable[str]) -> list[str]:
        """A sentence per kind of problem with the tensors `quantized`."""
        groups: dict[str, list[str]] = {}
        for name in quantized:
            if problem := self.problems.get(name):
                groups.setdefault(problem.why, []).append(name + problem.detail)
        return [f"--imatrix: {why}: {list_names(names)}" for why, names in groups.items()]

    @property
    def warnings(self) -> list[str]:
        """A sentence where experts have seen too little for their numbers to mean much."""
        if not self.few:
            return []
        worst = min(self.few, key=lambda name: self.few[name])
        return [
            f"--imatrix: {len(self.few)} tensors have experts that saw fewer than {FEW} tokens ({worst}: "
            f"{self.few[worst]}); their numbers are used as they are. Collect from more text, or by "
            "`moe2gguf imatrix --used all`"
        ]


@dataclass(frozen=True)
class _Found:
    """What a matrix has for one tensor: `means`, the numbers of the matrices without data and `why` they have none."""

    means: Callable[[], Means]
    empty: tuple[int, ...] = ()
    why: str = ""
    fewest: int = FEW


def guide(
    matrix: ImportanceMatrix, tensors: Sequence[Entry], neurons: Neurons | None = None, repair: str = "none"
) -> Guidance:
    """Look up every tensor that may be quantized; `neurons` tells how a dense matrix maps to the experts, if known."""
    importance: dict[str, Importance] = {}
    problems, complete, few = dict[str, Problem](), set[str](), dict[str, int]()
    for tensor in tensors:
        if not may_quantize(tensor.name, tensor.shape):
            continue
        try:
            found = _found(matrix, tensor, neurons)
        except _UnfitError as error:
            problems[tensor.name] = Problem(*error.args)
            continue
        if found is None:  # the vocabulary: llama.cpp's tool leaves it out
            continue
        if found.empty and repair == "none":
            problems[tensor.name] = _describe_lack(found, tensor)
            continue
        importance[tensor.name] = functools.partial(_fill_with_ones, found)
        complete.add(tensor.name)
        if found.fewest < FEW:
            few[tensor.name] = found.fewest
    return Guidance(importance, problems, frozenset(complete), few)


class _UnfitError(Exception):
    """The arguments are those of `Problem`."""


def _found(matrix: ImportanceMatrix, tensor: Entry, neurons: Neurons | None) -> _Found | None:
    """Raises _UnfitError for an entry that belongs to another model."""
    name, width = tensor.name, tensor.shape[-1]
    n_mat = math.prod(tensor.shape[:-2])
    if entry := matrix.entries.get(name):
        return _own(entry, n_mat, width, legacy=matrix.legacy)
    dense = matrix.entries.get(name.replace("_exps.", "."))
    if "_exps." not in name or dense is None:
        if re.fullmatch(VOCABULARY, name):
            return None
        return _Found(lambda: _nothing(n_mat, width), (*range(n_mat),), "has no entry for tensors of this file")
    if "ffn_down" in name:
        return _down(dense, tensor, neurons)
    means = _dense_means(dense, width)
    if np.isnan(means).any():
        return _Found(lambda: _nothing(n_mat, width), (*range(n_mat),), "no token was seen by tensors of this file")
    return _Found(lambda: np.broadcast_to(means, (n_mat, width)))


def _own(entry: Activity, n_mat: int, width: int, *, legacy: bool) -> _Found:
    """From an entry of the tensor's own name."""
    if len(entry.counts) not in (1, n_mat):
        raise _UnfitError("is of another number of experts", f" ({len(entry.counts)}, the tensor has {n_mat})")
    if entry.sums.size != n_mat * width:
        raise _UnfitError(
            "is of another model", f" ({entry.sums.size} columns, the tensor has {n_mat} x {width} = {n_mat * width})"
        )
    means = entry.means().reshape(n_mat, width)
    if legacy and n_mat > 1:  # a .dat says 1.0 where an expert has no data
        means = np.where((means == 1).all(axis=1, keepdims=True), np.float32(np.nan), means)
    empty = tuple(int(i) for i in np.flatnonzero(np.isnan(means).any(axis=1)))
    seen = entry.counts[entry.counts > 0]
    fewest = int(seen.min()) if len(seen) and n_mat > 1 and not legacy else FEW
    return _Found(lambda: means, empty, "no token reached some experts" if empty else "", fewest)


def _dense_means(dense: Activity, width: int) -> NDArray[np.float32]:
    """(width,) from the entry of the dense tensor."""
    if len(dense.counts) != 1 or dense.sums.size != width:
        raise _UnfitError("is of another model", f" ({dense.sums.size} columns of the dense matrix, expected {width})")
    means: NDArray[np.float32] = dense.means()[0]
    return means


def _down(dense: Activity, tensor: Entry, neurons: Neurons | None) -> _Found:
    """Columns of the dense down projection in the order in which the experts hold its neurons; zero neurons get 0."""
    n_mat, width = math.prod(tensor.shape[:-2]), tensor.shape[-1]
    means = _dense_means(dense, dense.sums.size if neurons is None else neurons.d_ff)
    everything = tuple(range(n_mat))
    if np.isnan(means).any():
        return _Found(lambda: _nothing(n_mat, width), everything, "no token was seen by tensors of this file")
    layer = re.match(r"blk\.(\d{1,9})\.", tensor.name)
    if neurons is None or layer is None:
        why = "is of the dense model, and which neurons the experts hold is not known"
        return _Found(lambda: _nothing(n_mat, width), everything, why)

    def sliced() -> Means:
        order = neurons.order(int(layer[1]))
        return np.where(order >= 0, means[np.maximum(order, 0)], np.float32(0))

    return _Found(sliced)


def _nothing(n_mat: int, width: int) -> Means:
    return np.full((n_mat, width), np.nan, np.float32)


def _fill_with_ones(found: _Found) -> list[NDArray[np.float32]]:
    """The importance of every matrix, (width,) each; a matrix without data counts all its columns alike."""
    means = np.ascontiguousarray(found.means(), np.float32)
    means[[*found.empty]] = 1
    return [*means]


def _describe_lack(found: _Found, tensor: Entry) -> Problem:
    """Which matrices of the tensor have no data, and what to do."""
    n_mat = math.prod(tensor.shape[:-2])
    numbers = ", ".join([*map(str, found.empty[:8]), *(["..."] if len(found.empty) > 8 else [])])
    detail = f" (experts {numbers})" if 0 < len(found.empty) < n_mat else ""
    ways = ["--imatrix-repair ones"]
    if "neurons" in found.why:
        ways.insert(0, "collect one from this file, or give it to `moe2gguf convert --imatrix`")
    elif "experts" in found.why:
        ways.insert(0, "collect it from more text or by `moe2gguf imatrix --used all`")
    return Problem(f"{found.why}; {', or '.join(ways)}", detail)
