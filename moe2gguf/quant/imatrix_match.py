"""The importance matrix given to `convert` and `quantize`, matched with the tensors of the file to come.

A tensor's importance is one vector of mean squared inputs per matrix: one, or one per expert. A matrix collected from
the dense model serves experts as well. Every expert's gate and up projection sees what the dense one sees, and the
columns of a down projection are neurons, which are picked in the order in which the experts hold them.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import list_names
from moe2gguf.experts.slicing import contiguous_order
from moe2gguf.gguf import types
from moe2gguf.gguf.counts import read_counts
from moe2gguf.gguf.file import GGUFFile
from moe2gguf.gguf.layout import Entry
from moe2gguf.gguf.writer import Importance
from moe2gguf.quant.assign import Assignment, may_quantize
from moe2gguf.quant.imatrix import Activity, ImportanceMatrix, Numbers, identify_model, label
from moe2gguf.quant.rules import VOCABULARY, TypeOptions
from moe2gguf.spec import MetadataValue

KEYS = "quantize.imatrix."
"""What llama.cpp's tool writes: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/tools/quantize/quantize.cpp#L77"""

REPAIR = "moe2gguf.quantize.imatrix_repair"

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
    """What an importance matrix has for the tensors of a file.

    importance  of each tensor all of whose matrices have one, by name
    problems    of the tensors that lack some or all of it, by name
    few         the fewest tokens that an expert of the tensor saw, where that is fewer than FEW
    """

    importance: Mapping[str, Importance] = field(default_factory=dict)
    problems: Mapping[str, Problem] = field(default_factory=dict)
    few: Mapping[str, int] = field(default_factory=dict)

    def refusals(self, stored: Sequence[Entry], assigned: Assignment) -> list[str]:
        """Return a sentence per kind of problem with the tensors that are to be quantized."""
        groups: dict[str, list[str]] = {}
        for tensor in stored:
            kind, problem = assigned.types[tensor.name], self.problems.get(tensor.name)
            if problem and kind in types.BLOCKS and kind != tensor.type:
                groups.setdefault(problem.why, []).append(tensor.name + problem.detail)
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
    matrix: ImportanceMatrix | None, tensors: Sequence[Entry], neurons: Neurons | None = None, repair: str = "none"
) -> Guidance:
    """Look up every tensor that may be quantized; without a matrix nothing is found.

    `neurons` tells how a dense matrix maps to the experts, if that is known; `repair` is as in `TypeOptions`.
    """
    importance, problems, few = dict[str, Importance](), dict[str, Problem](), dict[str, int]()
    for tensor in tensors if matrix else ():
        if not matrix or not may_quantize(tensor.name, tensor.shape):
            continue
        try:
            found = _find_means(matrix, tensor, neurons)
        except _UnfitError as error:
            problems[tensor.name] = Problem(*error.args)
            continue
        if found is None:  # the vocabulary: llama.cpp's tool leaves it out
            continue
        if found.empty and repair == "none":
            problems[tensor.name] = _describe_lack(found, tensor)
            continue
        importance[tensor.name] = functools.partial(_fill_with_ones, found)
        if found.fewest < FEW:
            few[tensor.name] = found.fewest
    return Guidance(importance, problems, few)


def note_other_model(matrix: ImportanceMatrix | None, tensors: Mapping[str, Numbers]) -> list[str]:
    """Return a warning where the matrix says that it is of a model with other norms than these tensors'."""
    if matrix is None or not matrix.model or matrix.model == identify_model(tensors):
        return []
    return ["--imatrix: was collected from a model with other norms, so from another one, or before it was trained"]


def record_imatrix(matrix: ImportanceMatrix | None, options: TypeOptions) -> dict[str, MetadataValue]:
    """Return the keys that tell which importance matrix a file was quantized with; none without one."""
    if matrix is None:
        return {}
    metadata: dict[str, MetadataValue] = {KEYS + "file": label(str(options.imatrix))}
    if matrix.datasets:
        metadata[KEYS + "dataset"] = matrix.datasets[0]
    metadata[KEYS + "entries_count"] = len(matrix.entries)
    if matrix.chunk_count:
        metadata[KEYS + "chunks_count"] = matrix.chunk_count
    if options.imatrix_repair != "none":
        metadata[REPAIR] = options.imatrix_repair
    return metadata


def find_neurons(file: GGUFFile) -> Neurons | None:
    """Return which neurons the experts of a finished file hold: known only where we cut them one after the other."""
    n, d_ff, align = (
        file.metadata.get(f"moe2gguf.slicing.{key}") for key in ("expert_count", "dense_feed_forward_length", "align")
    )
    if file.metadata.get("moe2gguf.slicing.group") != "contiguous":
        return None
    stacks = {tensor.shape for tensor in file.tensors.values() if tensor.name.endswith(".ffn_down_exps.weight")}
    shape = stacks.pop() if len(stacks) == 1 else ()
    if not (isinstance(n, int) and isinstance(d_ff, int) and isinstance(align, int) and len(shape) == 3):
        return None
    if not (shape[0] == n - read_counts(file).n_shared > 0 and 0 < d_ff <= n * shape[2] and 0 < align <= shape[2]):
        return None
    order = contiguous_order(d_ff, n, align)
    return Neurons(d_ff, lambda _: order) if order.shape[1] == shape[2] else None


EXPERTS = r"_(exps|shexp)\."
"""What the name of a tensor has where a dense model's has a dot."""


class _UnfitError(Exception):
    """The arguments are those of `Problem`."""


def _find_means(matrix: ImportanceMatrix, tensor: Entry, neurons: Neurons | None) -> _Found | None:
    """Return what the matrix has for a tensor: its own entry, or that of the dense tensor. None where none is needed.

    Raises _UnfitError for an entry that belongs to another model.
    """
    name, n_mat, width = tensor.name, math.prod(tensor.shape[:-2]), tensor.shape[-1]
    if entry := matrix.entries.get(name):
        return _from_own_entry(entry, n_mat, width, legacy=matrix.legacy)
    dense = matrix.entries.get(re.sub(EXPERTS, ".", name))
    if re.search(EXPERTS, name) and dense:
        return _from_dense_entry(dense, tensor, neurons)
    if re.fullmatch(VOCABULARY, name):
        return None
    return _lack_all(n_mat, width, "has no entry for tensors of this file")


def _from_dense_entry(dense: Activity, tensor: Entry, neurons: Neurons | None) -> _Found:
    """From the entry of the dense tensor whose rows or columns the experts hold."""
    name, n_mat, width = tensor.name, math.prod(tensor.shape[:-2]), tensor.shape[-1]
    is_down = "ffn_down" in name
    n_column = width if not is_down else dense.sums.size if neurons is None else neurons.d_ff
    if len(dense.counts) != 1 or dense.sums.size != n_column:
        raise _UnfitError(
            "is of another model", f" ({dense.sums.size} columns of the dense matrix, expected {n_column})"
        )
    means = dense.means()[0]
    if np.isnan(means).any():
        return _lack_all(n_mat, width, "no token was seen by tensors of this file")
    if not is_down:
        return _Found(lambda: np.broadcast_to(means, (n_mat, width)))
    layer = re.match(r"blk\.(\d{1,9})\.", name)
    if neurons is None or layer is None:
        return _lack_all(n_mat, width, "is of the dense model, and which neurons the experts hold is not known")
    n_routed = 0 if "_shexp." in name else n_mat
    return _Found(functools.partial(_pick_neurons, means, neurons, int(layer[1]), n_routed, width))


def _from_own_entry(entry: Activity, n_mat: int, width: int, *, legacy: bool) -> _Found:
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


def _pick_neurons(means: NDArray[np.float32], neurons: Neurons, layer: int, n_routed: int, width: int) -> Means:
    """Pick columns of the dense down projection in the order in which the experts hold them; zero neurons get 0.

    The last `n_routed` experts are those of a stack; for 0 the first ones are meant, joined, `width` neurons of them.
    """
    order = neurons.order(layer)
    order = order[len(order) - n_routed :] if n_routed else order.reshape(1, -1)[:, :width]
    return np.where(order >= 0, means[np.maximum(order, 0)], np.float32(0))


def _lack_all(n_mat: int, width: int, why: str) -> _Found:
    return _Found(lambda: np.full((n_mat, width), np.nan, np.float32), tuple(range(n_mat)), why)


def _fill_with_ones(found: _Found) -> list[NDArray[np.float32]]:
    """Return the importance of every matrix, (width,) each; a matrix without data counts all its columns alike."""
    means = np.array(found.means(), np.float32, order="C")
    means[[*found.empty]] = 1
    return [*means]


def _describe_lack(found: _Found, tensor: Entry) -> Problem:
    """Return which matrices of the tensor have no data, and what to do."""
    n_mat = math.prod(tensor.shape[:-2])
    numbers = ", ".join([*map(str, found.empty[:8]), *(["..."] if len(found.empty) > 8 else [])])
    detail = f" (experts {numbers})" if 0 < len(found.empty) < n_mat else ""
    ways = ["--imatrix-repair ones"]
    if "neurons" in found.why:
        ways.insert(0, "collect one from this file, or give it to `moe2gguf convert --imatrix`")
    elif "experts" in found.why:
        ways.insert(0, "collect it from more text or by `moe2gguf imatrix --used all`")
    return Problem(f"{found.why}; {', or '.join(ways)}", detail)
