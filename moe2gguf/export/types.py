"""Tensor types: which there are, how large, and how an array becomes their bytes."""

from __future__ import annotations

import math

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from numpy.typing import NDArray

from moe2gguf.errors import CorruptWeightError

Array = NDArray[np.generic]

FLOATS: dict[GGMLType, np.dtype[np.generic]] = {
    GGMLType.F32: np.dtype(np.float32),
    GGMLType.F16: np.dtype(np.float16),
    GGMLType.BF16: np.dtype(ml_dtypes.bfloat16),
}

BLOCKS: tuple[GGMLType, ...] = (
    GGMLType.Q8_0,
    GGMLType.Q5_1,
    GGMLType.Q5_0,
    GGMLType.Q4_1,
    GGMLType.Q4_0,
    GGMLType.TQ2_0,
    GGMLType.TQ1_0,
)
"""The block types that the gguf package can quantize to."""

NAMES: dict[str, GGMLType] = {kind.name.lower(): kind for kind in (*FLOATS, *BLOCKS)}
"""What `--type` takes, beside "auto"."""

FILE_TYPES: dict[GGMLType, int] = {
    GGMLType.F32: gguf.LlamaFileType.ALL_F32,
    GGMLType.F16: gguf.LlamaFileType.MOSTLY_F16,
    GGMLType.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    GGMLType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    GGMLType.Q5_1: gguf.LlamaFileType.MOSTLY_Q5_1,
    GGMLType.Q5_0: gguf.LlamaFileType.MOSTLY_Q5_0,
    GGMLType.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    GGMLType.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    GGMLType.TQ2_0: gguf.LlamaFileType.MOSTLY_TQ2_0,
    GGMLType.TQ1_0: gguf.LlamaFileType.MOSTLY_TQ1_0,
}
"""The `general.file_type` of a file whose weights are mostly of a type."""


def of_dtype(dtype: np.dtype[np.generic]) -> GGMLType:
    """The float type that stores `dtype` unchanged."""
    return next(kind for kind, stored in FLOATS.items() if stored == dtype)


def block_size(kind: GGMLType) -> int:
    """Elements per block; a row's width must be a multiple of it."""
    return int(gguf.GGML_QUANT_SIZES[kind][0])


def n_bytes(shape: tuple[int, ...], kind: GGMLType) -> int:
    """The size of a tensor in bytes; `shape`'s last axis must be a multiple of the block size."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // int(elements) * int(size)


def encode(array: Array, kind: GGMLType, name: str) -> memoryview:
    """`array` (f32, f16 or bf16) as the bytes of type `kind`; `name` is for the error message.

    Raises:
        CorruptWeightError: a value is NaN or infinite, or too large for f16.
    """
    require_finite(array, name)
    if kind in FLOATS:
        with np.errstate(over="ignore"):
            encoded: Array = np.ascontiguousarray(array, FLOATS[kind])
        if kind is GGMLType.F16 and array.dtype != encoded.dtype and not is_finite(encoded):
            raise _overflow(array, name)
    else:
        encoded = gguf.quants.quantize(array.astype(np.float32), kind)
    return encoded.reshape(-1).view(np.uint8).data


def require_finite(array: Array, name: str) -> None:
    """Raises CorruptWeightError where `array` holds a NaN or an infinity."""
    if not is_finite(array):
        bad = np.argwhere(~np.isfinite(array.astype(np.float32)))[0]
        where = ", ".join(map(str, bad))
        raise CorruptWeightError(f"{name}: NaN or infinity at [{where}]; fetch a sound copy of the checkpoint")


_EXPONENT = {2: {"float16": 0x7C00, "bfloat16": 0x7F80}, 4: {"float32": 0x7F800000}}


def is_finite(array: Array) -> bool:
    """Whether no element is NaN or infinite, from the exponent bits alone (several times faster than isfinite)."""
    size = array.dtype.itemsize
    exponent = _EXPONENT[size][array.dtype.name]
    bits = array.view(np.uint16 if size == 2 else np.uint32).astype(np.uint32, copy=False)
    return bool(array.size == 0 or (bits & exponent).max() < exponent)


def _overflow(array: Array, name: str) -> CorruptWeightError:
    largest = float(np.abs(array.astype(np.float32)).max())
    return CorruptWeightError(f"{name}: {largest:.6g} does not fit into f16 (at most 65504); use --type bf16 or f32")
