"""The best types under a size: every tensor's error is measured in every type that fits, then bytes go where they help.

A tensor's error is the share of its outputs' energy that quantization turns into noise, estimated from some rows:
sum m (w - q)^2 / sum m w^2, m being the mean square of the input column (1 without an importance matrix). The change of
a model's loss is close to a weighted sum of such shares (https://arxiv.org/abs/2411.17525, the linearity theorem). The
weights are measured: see `HEAD`.

Per tensor only the lower convex hull of (bytes, error) matters; taking its steps by error saved per byte is optimal but
for the last step.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moe2gguf.gguf import kernels, types
from moe2gguf.gguf.file import TensorType
from moe2gguf.gguf.kernels import NEEDS_IMPORTANCE
from moe2gguf.gguf.layout import Entry
from moe2gguf.gguf.writer import OutputTensor
from moe2gguf.quant.assign import UNGUIDED_GARBAGE
from moe2gguf.quant.rules import VOCABULARY

ROWS = 32
"""Rows of each tensor (spread over all its experts) that are quantized to measure a type."""

SHORTLIST = 0.6
"""Types of fewer bits than this share of the target are not tried, unless the target cannot be reached otherwise."""

YOUNG = ("NVFP4", "Q1_0", "Q2_0")
"""Types that only the newest llama.cpp reads: for those who ask for them by name."""

HEAD = 35.0
GUIDED = {"attn_v": 0.9, "ffn_down": 0.5}
UNGUIDED = {"attn_v": 1.9, "ffn_down": 1.9}
"""How much a tensor's error changes the model's output, against ffn_up's: KL divergence per error with all tensors of a
role in Q4_0, on SmolLM2-135M, 255 tokens of WikiText-2. The roles that are not listed were not measured and count 1.
With an importance the roles differ less, which is what the theory says. `HEAD` is for the matrix that makes logits and
the embedding, measured where they are one; their errors are always measured without an importance."""


@dataclass(frozen=True)
class Option:
    """One type for one tensor: its bytes and what it costs."""

    type: TensorType
    n_bytes: int
    error: float


@dataclass(frozen=True)
class Budgeted:
    """The chosen types by tensor name, and the sum of weighted errors."""

    types: Mapping[str, TensorType]
    error: float


def list_types(tensor: Entry, *, guided: bool) -> list[TensorType]:
    """The types that a tensor may have: blocks that fit its rows, small ones only with an importance; and F16."""
    width = tensor.shape[-1]
    return [
        kind
        for kind in (types.named("f16"), *types.BLOCKS)
        if kind.name not in YOUNG
        and width % types.block_size(kind) == 0
        and (guided or not (kind in NEEDS_IMPORTANCE or kind.name in UNGUIDED_GARBAGE))
    ]


def find_range(tensors: Sequence[Entry], guided: Iterable[str]) -> tuple[int, int]:
    """The fewest and the most bytes that these tensors can take."""
    known = set(guided)
    sizes = [[types.n_bytes(t.shape, kind) for kind in list_types(t, guided=t.name in known)] for t in tensors]
    return sum(map(min, sizes)), sum(map(max, sizes))


def choose_under_budget(
    tensors: Sequence[OutputTensor],
    guided: Iterable[str],
    budget: int,
    *,
    threads: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Budgeted:
    """Types for `tensors` in at most `budget` bytes, which must be reachable; `advance` is told measured elements.

    The same inputs give the same types.

    Raises:
        HarnessError: llama.cpp's kernels are missing.
        CorruptWeightError: a weight is NaN or infinite.
    """
    known = set(guided)
    fitting = {t.name: list_types(t, guided=t.name in known) for t in tensors}
    candidates = _shorten_lists(tensors, fitting, budget)
    kernels.require({kind for kinds in candidates.values() for kind in kinds} & {*types.BLOCKS})
    options = {}
    with ThreadPoolExecutor(threads) as pool:
        for tensor in tensors:
            options[tensor.name] = _measure_types(tensor, candidates[tensor.name], pool)
            advance(math.prod(tensor.shape))
    return spend_budget(options, budget)


def _shorten_lists(
    tensors: Sequence[Entry], candidates: Mapping[str, list[TensorType]], budget: int
) -> Mapping[str, list[TensorType]]:
    """Leave out the types far below the target's bits, which are slow to measure, unless the budget needs them."""
    target_bits = 8 * budget / max(sum(math.prod(tensor.shape) for tensor in tensors), 1)
    short = {
        name: [kind for kind in kinds if types.bits_per_weight(kind) >= SHORTLIST * target_bits]
        for name, kinds in candidates.items()
    }
    smallest = sum(
        min((types.n_bytes(tensor.shape, kind) for kind in short[tensor.name]), default=budget + 1)
        for tensor in tensors
    )
    return short if smallest <= budget else candidates


def spend_budget(options: Mapping[str, Sequence[Option]], budget: int) -> Budgeted:
    """One option per tensor, at most `budget` bytes together, with the smallest sum of errors but for the last step."""
    # Start every tensor at its smallest option.
    hulls = {name: lower_hull(choices) for name, choices in options.items()}
    at = dict.fromkeys(hulls, 0)
    room = budget - sum(points[0].n_bytes for points in hulls.values())
    # List every step from one option to the next larger one: change of error per byte, below zero.
    steps = [
        (_slope(a, b), order, i, name)
        for order, (name, points) in enumerate(hulls.items())
        for i, (a, b) in enumerate(pairwise(points))
    ]
    # Take the steps that save the most error per byte first. On a hull the steps of one tensor come in their order; a
    # step that has no room is skipped, and so are those of its tensor behind it.
    for _, _, i, name in sorted(steps):
        cost = hulls[name][i + 1].n_bytes - hulls[name][i].n_bytes
        if at[name] == i and cost <= room:
            at[name], room = i + 1, room - cost
    chosen = {name: points[at[name]] for name, points in hulls.items()}
    return Budgeted({name: one.type for name, one in chosen.items()}, sum(one.error for one in chosen.values()))


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options that are best for some price of a byte: more bytes, less error, each step gaining less."""
    points: list[Option] = []
    # From the smallest to the largest: leave out what costs more bytes for no less error, and take back the last point
    # while the line past it falls more steeply than the line to it.
    for one in sorted(options, key=lambda option: (option.n_bytes, option.error)):
        if points and one.error >= points[-1].error:
            continue
        while len(points) > 1 and _slope(points[-2], one) <= _slope(points[-2], points[-1]):
            points.pop()
        points.append(one)
    return points


def _slope(a: Option, b: Option) -> float:
    return (b.error - a.error) / (b.n_bytes - a.n_bytes)


def _measure_types(tensor: OutputTensor, kinds: Sequence[TensorType], pool: ThreadPoolExecutor) -> list[Option]:
    """The bytes and the weighted error of the tensor in each type, from some of its rows."""
    head = re.fullmatch(VOCABULARY, tensor.name) is not None
    samples = _sample_rows(dataclasses.replace(tensor, importance=None) if head else tensor)
    weight = HEAD if head else sensitivity(tensor.name, guided=tensor.importance is not None)

    def measure(kind: TensorType) -> Option:
        noise = energy = 0.0
        for rows, importance in samples:
            m = 1.0 if importance is None else importance.astype(np.float64)
            noise += float((m * (rows - _round_rows(rows, kind, tensor.name, importance)) ** 2).sum())
            energy += float((m * rows.astype(np.float64) ** 2).sum())
        return Option(kind, types.n_bytes(tensor.shape, kind), weight * noise / energy if energy else 0.0)

    return [*pool.map(measure, kinds)]


def sensitivity(name: str, *, guided: bool) -> float:
    """The weight of the error of a layer's tensor."""
    weights = GUIDED if guided else UNGUIDED
    return next((weight for role, weight in weights.items() if f".{role}" in name), 1.0)


def _sample_rows(tensor: OutputTensor) -> list[tuple[NDArray[np.float32], NDArray[np.float32] | None]]:
    """Evenly spread rows, with the importance of the matrix that they are of."""
    height = tensor.shape[-2]
    n_row = math.prod(tensor.shape[:-1])
    wanted = np.unique(np.linspace(0, n_row - 1, min(ROWS, n_row)).astype(np.int64))
    matrices = tensor.importance() if tensor.importance else None
    rows: dict[int, list[NDArray[np.float32]]] = {}
    first = 0
    for block in tensor.blocks():
        flat = block.reshape(-1, block.shape[-1])
        here = wanted[(wanted >= first) & (wanted < first + len(flat))]
        picked = flat[here - first].astype(np.float32)
        types.require_finite(picked, tensor.name)
        for row, matrix in zip(picked, here // height, strict=True):
            rows.setdefault(int(matrix), []).append(row)
        first += len(flat)
    return [(np.stack(group), None if matrices is None else matrices[matrix]) for matrix, group in rows.items()]


def _round_rows(
    rows: NDArray[np.float32], kind: TensorType, name: str, importance: NDArray[np.float32] | None
) -> NDArray[np.float64]:
    """What is left of `rows` in a type, in float64."""
    data = np.frombuffer(types.encode(rows, kind, name, importance), np.uint8)
    if kind in types.FLOATS:
        return data.view(types.FLOATS[kind]).astype(np.float64).reshape(rows.shape)
    return kernels.dequantize(data, kind).astype(np.float64).reshape(rows.shape)
