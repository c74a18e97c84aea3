"""Cutting one MLP into experts.

A slicing is an *order*: an integer array (n_expert, d_expert) that says which neuron of the dense MLP stands in each
place of each expert, with `PADDING` for a zero neuron. Every neuron stands in exactly one place. Zero neurons are free
of error, since silu(0) * 0 = 0.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from moe2gguf.gguf.types import is_finite, widen
from moe2gguf.graphs import GRAPHS
from moe2gguf.spec import Slicing

PADDING = -1

PIECE = 1 << 20
"""Elements that are cut out at once: few enough for the cache, enough for several threads to quantize."""

ROUTER_SIZE = 1e-2
"""The largest |logit| on the calibration tokens: small, and far above the rounding of a float32 softmax."""

EXACT_ROUTER_SIZE = 1e-3
"""The same where the file must be the dense model with all experts used; near-ties are then decided by rounding."""

Array = NDArray[np.generic]
Order = NDArray[np.int64]


def expert_width(d_ff: int, n_expert: int, align: int = 1) -> int:
    """Return d_expert: the smallest width, a multiple of `align`, at which `n_expert` experts hold `d_ff` neurons.

    Example: expert_width(1536, 8, align=256) == 256, of which 192 are neurons and 64 are zero.
    """
    return _up(_up(d_ff, n_expert) // n_expert, align)


def _up(number: int, multiple: int) -> int:
    """Round `number` up to a multiple of `multiple`."""
    return -(-number // multiple) * multiple


def default_in_shared(n_expert: int, n_expert_used: int) -> int:
    """Return how many experts are one shared expert by default, in a graph that has such: a quarter, less than run."""
    return max(1, min(n_expert // 4, n_expert_used - 1))


def default_n_shared(n_expert: int, n_expert_used: int) -> int:
    """Return how many experts are shared by default: 8 of 12 used, 4 of 8, 2 of 4, where there are 16.

    All that run but a quarter of all experts; at least half of those that run, never all of them.
    """
    return min(max(n_expert_used - n_expert // 4, n_expert_used // 2), n_expert_used - 1)


def contiguous_order(d_ff: int, n_expert: int, align: int = 1, grain: int = 1) -> Order:
    """Cut neurons 0, 1, 2 ... into n_expert runs whose lengths differ by at most one, each padded to the same width.

    Runs are whole groups of `grain` neurons, which must divide d_ff and the padded width. Returns (n_expert, d_expert).
    Source: the MoEification recipe, https://huggingface.co/kalomaze/Mistral-7b-MoEified-8x
    """
    order = np.full((n_expert, expert_width(d_ff, n_expert, align)), PADDING, np.int64)
    for row, groups in zip(order, np.array_split(np.arange(d_ff).reshape(-1, grain), n_expert), strict=True):
        row[: groups.size] = groups.reshape(-1)
    return order


def plain_scale(slicing: Slicing) -> NDArray[np.float32]:
    """Return the output scales (n_expert,) that undo the graph's weights.

    Where these depend on the number of used experts, they are undone for all experts with `exact`, for `n_expert_used`
    of them else.
    """
    n, graph = slicing.n_expert, GRAPHS[slicing.target]
    if graph.gating == "renormalized":
        return np.full(n, n if slicing.method.amplify == "exact" else slicing.n_expert_used, np.float32)
    scale = np.ones(n, np.float32)
    scale[slicing.in_shared :] = 1 / graph.weight_of_expert(slicing.n_routed)
    return scale


def slice_rows(weight: Array, order: Order) -> Iterator[Array]:
    """Yield each expert's rows (d_expert, d_model) of a gate or up projection (d_ff, d_model), in pieces of rows."""
    step = _count_rows(weight.shape[-1])
    for neurons in (row[start : start + step] for row in order for start in range(0, len(row), step)):
        if _is_run(neurons):
            yield weight[neurons[0] : neurons[0] + len(neurons)]
        else:
            block = weight[np.maximum(neurons, 0)]
            block[neurons == PADDING] = 0
            yield block


def slice_columns(weight: Array, order: Order, scale: Sequence[float] | Array) -> Iterator[Array]:
    """Yield each expert's columns (d_model, d_expert) of a down projection (d_model, d_ff), times its scale, in pieces.

    The product is rounded once to the weight's own type; it is exact where the factor of `scale` (n_expert,) is a power
    of two and nothing overflows (an overflow becomes an infinity, which the writer refuses).
    """
    step = _count_rows(order.shape[-1])
    for neurons, factor in zip(order, scale, strict=True):
        is_run, number = _is_run(neurons), weight.dtype.type(factor)
        for rows in (weight[start : start + step] for start in range(0, len(weight), step)):
            if is_run:
                columns = rows[:, neurons[0] : neurons[0] + len(neurons)]
            else:
                columns = rows[:, np.maximum(neurons, 0)]
                columns[:, neurons == PADDING] = 0
            yield columns if number == 1 else _multiply(columns, number)


def _multiply(array: Array, number: np.generic) -> Array:
    """The product in the array's own type; by way of float32, where 16 bits are several times faster."""
    with np.errstate(over="ignore", invalid="ignore"):
        wide = widen(array) if is_finite(array) else array.astype(np.float32)
        return (wide * np.float32(number)).astype(array.dtype)


def _count_rows(width: int) -> int:
    """How many rows make a piece."""
    return max(1, PIECE // max(1, width))


def _is_run(neurons: NDArray[np.int64]) -> bool:
    """Whether the neurons are consecutive, so that a view serves instead of a copy."""
    return bool(neurons[0] != PADDING and (np.diff(neurons) == 1).all())
