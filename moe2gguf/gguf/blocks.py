"""Quantized weights, cut and amplified without decoding them.

A row of a block type is a run of whole blocks, so rows can be moved and rows can be cut between blocks by copying
bytes. Every block type is linear in its scales, hence a power of two multiplies all its weights exactly when it
multiplies the scales exactly: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from numpy.typing import NDArray

from moe2gguf.errors import CorruptWeightError
from moe2gguf.gguf.file import BLOCK_SIZES, TensorType
from moe2gguf.gguf.finite import FIELDS

Bytes = NDArray[np.uint8]

_E8M0_NAN = 0xFF


def is_power_of_two(factor: float) -> bool:
    """Return whether multiplying a float by `factor` only moves its exponent."""
    return factor > 0 and math.frexp(factor)[0] == 0.5


def find_block_order(order: NDArray[np.int64], block: int) -> NDArray[np.int64] | None:
    """Return which block stands in each place of each expert: (n_expert, d_expert // block), -1 for zero neurons.

    `order` is (n_expert, d_expert) neuron numbers, -1 for zero neurons. None where neurons leave their block.
    """
    n_expert, d_expert = order.shape
    if d_expert % block:
        return None
    places = order.reshape(n_expert, -1, block)
    first = places[:, :, :1]
    run = np.where(first < 0, first, first + np.arange(block))
    if (first % block * (first >= 0)).any() or not np.array_equal(places, run):
        return None
    chosen: NDArray[np.int64] = np.where(first < 0, -1, first // block)[:, :, 0]
    return chosen


def slice_blocks(
    rows: Bytes, kind: TensorType, chosen: NDArray[np.int64], factors: Sequence[float] | NDArray[np.generic], name: str
) -> Iterator[Bytes]:
    """Rows (n_row, row_bytes) of a block type -> each expert's (n_row, bytes), its `chosen` blocks times its factor.

    `chosen` is a `find_block_order`; a zero neuron's block is all zero bytes, which every block type reads as zeros.

    Raises:
        CorruptWeightError: a factor does not multiply a block's scales exactly.
    """
    size = BLOCK_SIZES[kind][1]
    blocks = rows.reshape(len(rows), -1, size)
    for places, factor in zip(chosen, factors, strict=True):
        taken = blocks[:, np.maximum(places, 0)]
        taken[:, places < 0] = 0
        yield amplify(taken.reshape(-1, size), kind, float(factor), name).reshape(len(rows), -1)


def amplify(blocks: Bytes, kind: TensorType, factor: float, name: str) -> Bytes:
    """`blocks` (n_block, block_bytes), owned by the caller, with every weight times `factor`, exactly.

    Raises:
        CorruptWeightError: the factor is no power of two, or a scale would overflow or lose bits.
    """
    if factor == 1:
        return blocks
    if not is_power_of_two(factor):
        raise CorruptWeightError(f"{name}: blocks cannot be multiplied by {factor:g} exactly; only by a power of two")
    if kind == GGMLType.MXFP4:
        exact = _move_exponents(blocks, round(math.log2(factor)))
    elif kind == GGMLType.NVFP4:
        exact = _replace_scales(blocks[:, :4], factor)
    elif kind == GGMLType.IQ1_M:
        exact = _multiply_scattered(blocks, factor)
    else:
        exact = all(_multiply(blocks[:, at : at + 2], factor) for _, at, _ in FIELDS[kind])
    if not exact:
        raise CorruptWeightError(
            f"{name}: a block's scale times {factor:g} does not fit {kind.name}; amplify with --expert-scale, "
            "or give the tensor another type with --tensor-type"
        )
    return blocks


def _multiply(raw: Bytes, factor: float) -> bool:
    """Multiply the f16 numbers whose bytes are `raw` (n, 2), in place; whether it was exact."""
    before = np.ascontiguousarray(raw).view("<f2")
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        after = before * np.float16(factor)
        exact = (after / np.float16(factor) == before) | ~np.isfinite(before)  # what was broken is found by `verify`
    raw[:] = after.view(np.uint8)
    return bool((exact & (np.isfinite(after) | ~np.isfinite(before))).all())


def _multiply_scattered(blocks: Bytes, factor: float) -> bool:
    """IQ1_M keeps the bits of its f16 in the upper four bits of its last four 16-bit words:
    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-common.h#L430
    """
    words = np.ascontiguousarray(blocks[:, -8:]).view("<u2")
    nibbles = words >> 12
    scale = nibbles[:, :1] | nibbles[:, 1:2] << 4 | nibbles[:, 2:3] << 8 | nibbles[:, 3:] << 12
    raw = np.ascontiguousarray(scale.astype("<u2")).view(np.uint8)
    exact = _multiply(raw, factor)
    bits = raw.view("<u2")
    parts = np.concatenate([bits >> shift & 0xF for shift in (0, 4, 8, 12)], axis=1)
    blocks[:, -8:] = (words & 0x0FFF | parts << 12).astype("<u2").view(np.uint8)
    return exact


def _move_exponents(blocks: Bytes, power: int) -> bool:
    """MXFP4's scale is the exponent of a power of two, one byte; 255 is NaN."""
    moved = blocks[:, 0].astype(np.int64) + power
    broken = blocks[:, 0] == _E8M0_NAN
    exact = bool((broken | ((moved >= 0) & (moved < _E8M0_NAN))).all())
    blocks[:, 0] = np.where(broken, _E8M0_NAN, moved & 0xFF)
    return exact


def _list_ue4m3_values() -> NDArray[np.float64]:
    """Return the value of each byte as NVFP4's scale, from 0 to 127; 127 means 0 there.

    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-impl.h#L514
    """
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    value[127] = 0
    return np.asarray(value, np.float64)


def _replace_scales(scales: Bytes, factor: float) -> bool:
    """NVFP4's four scales are small unsigned floats, looked up among their 127 values."""
    values = _list_ue4m3_values()
    wanted = values[scales & 0x7F] * factor
    codes = np.searchsorted(values[:127], wanted).clip(max=126).astype(np.uint8)
    exact = bool((values[codes] == wanted).all())
    scales[:] = codes
    return exact
