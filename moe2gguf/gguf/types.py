"""Tensor types: which there are, how large, and how an array becomes their bytes."""

import contextlib
import math
from collections.abc import Iterable

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from numpy.typing import NDArray

from moe2gguf.errors import CorruptWeightError
from moe2gguf.gguf import kernels
from moe2gguf.gguf.file import BLOCK_SIZES, LaterType, TensorType

Array = NDArray[np.generic]

FLOATS: dict[TensorType, np.dtype[np.generic]] = {
    GGMLType.F32: np.dtype(np.float32),
    GGMLType.F16: np.dtype(np.float16),
    GGMLType.BF16: np.dtype(ml_dtypes.bfloat16),
}


_TYPES: dict[str, TensorType] = {**GGMLType.__members__, **LaterType.__members__}

BLOCKS: tuple[TensorType, ...] = tuple(
    _TYPES[name]
    for name in (
        *("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "NVFP4", "MXFP4"),
        *("Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "Q2_0", "TQ2_0", "TQ1_0"),
        *("IQ1_M", "IQ1_S", "Q1_0"),
    )
)
"""The block types that llama.cpp can quantize to, large to small:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml.c#L8089"""

NUMPY: frozenset[TensorType] = frozenset(
    _TYPES[name] for name in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "TQ2_0", "TQ1_0")
)
"""The block types that the gguf package can quantize to as well, to the same bytes, more slowly."""

NAMES: dict[str, TensorType] = {kind.name.lower(): kind for kind in (*FLOATS, *BLOCKS)}
"""Every type we can write, by its name in lower case."""

_FILE_TYPES = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_S", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S"}
_FILE_TYPES |= {"MXFP4": "MOSTLY_MXFP4_MOE"}
_LATER_FILE_TYPES = {"MOSTLY_Q2_0": 41}


def file_type(name: str) -> int:
    """llama.cpp's number for a file type, such as ALL_F32 or MOSTLY_Q4_K_M:
    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/include/llama.h#L115
    """
    known = gguf.LlamaFileType.__members__
    return int(known[name]) if name in known else _LATER_FILE_TYPES[name]


FILE_TYPES: dict[TensorType, int] = {
    kind: file_type(_FILE_TYPES.get(kind.name, f"MOSTLY_{kind.name}")) for kind in (*FLOATS, *BLOCKS)
}
"""The `general.file_type` of a file whose weights are mostly of a type."""


def name_file_type(number: object) -> str | None:
    """Return what a user calls the file type of this number, such as "Q4_K_M"; None for a number that says nothing."""
    known = {**gguf.LlamaFileType.__members__, **_LATER_FILE_TYPES}
    name = next((name for name, value in known.items() if value == number), "GUESSED")
    return None if name == "GUESSED" else name.removeprefix("ALL_").removeprefix("MOSTLY_")


def find_float(dtype: np.dtype[np.generic]) -> TensorType:
    """Return the float type that stores `dtype` unchanged."""
    return next(kind for kind, stored in FLOATS.items() if stored == dtype)


def find_type(name: str) -> TensorType:
    """Return the type called `name`, in upper or lower case; raises KeyError for another name."""
    return NAMES[name.lower()]


def block_size(kind: TensorType) -> int:
    """Return the elements of a block; a row's width must be a multiple of it."""
    return BLOCK_SIZES[kind][0]


def bits_per_weight(kind: TensorType) -> float:
    """Bits that one element takes, its share of the block's scales included."""
    elements, size = BLOCK_SIZES[kind]
    return 8 * size / elements


def n_bytes(shape: tuple[int, ...], kind: TensorType) -> int:
    """Return the size of a tensor in bytes; `shape`'s last axis must be a multiple of the block size."""
    elements, size = BLOCK_SIZES[kind]
    return math.prod(shape) // elements * size


def encode(array: Array, kind: TensorType, name: str, importance: NDArray[np.float32] | None = None) -> memoryview:
    """`array` as the bytes of type `kind`; `name` is for the error message.

    An array of f32, f16 or bf16, finite numbers, is encoded; one of uint8 holds blocks of that type already, which are
    kept. Rows that are quantized may share an `importance` (width,), how much each column's error matters.

    Raises:
        CorruptWeightError: a value is too large for the type.
        HarnessError: the type needs llama.cpp's kernels, and they are not installed.
    """
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array).reshape(-1).data
    if kind not in FLOATS:
        return _quantize(widen(array), kind, name, importance).data
    with np.errstate(over="ignore"):
        encoded: Array = np.ascontiguousarray(array, FLOATS[kind])
    if kind is GGMLType.F16 and array.dtype != encoded.dtype and not is_finite(encoded):
        raise _describe_overflow(array, name)
    return encoded.reshape(-1).view(np.uint8).data


def decode(rows: NDArray[np.uint8], kind: TensorType) -> NDArray[np.float32]:
    """Rows of blocks (n_row, row_bytes) as numbers (n_row, width): by llama.cpp, or the gguf package without it.

    Raises:
        HarnessError: the type needs llama.cpp, which is not installed or does not know it.
    """
    if not kernels.are_installed() and isinstance(kind, GGMLType):
        with contextlib.suppress(NotImplementedError):
            numbers: NDArray[np.float32] = gguf.quants.dequantize(rows, kind)
            return numbers
    return kernels.dequantize(rows, kind).reshape(len(rows), -1)


def widen(array: Array) -> NDArray[np.float32]:
    """Convert to float32, for finite f16 three times faster than numpy's own cast.

    The exponent and fraction of an f16, moved to those places of an f32, are the number times 2^-112, subnormals
    included: a float32 has the same fields with 13 more bits of fraction and a bias larger by 112.
    """
    if array.dtype != np.float16:
        return array.astype(np.float32, copy=False)
    bits = np.ascontiguousarray(array).view(np.int16).astype(np.int32)  # the sign fills the upper half
    bits <<= 13
    bits &= np.int32(-0x70002000)  # 0x8fffe000: one sign, and what belongs to the number
    numbers = bits.view(np.float32)
    numbers *= np.float32(2.0**112)
    return numbers


def require_kernels(kinds: Iterable[TensorType], *, importance: bool = False) -> None:
    """Raise HarnessError, before anything is written, if one of the types to write needs a missing kernel.

    The numpy versions of some kernels know nothing of an importance.
    """
    wanted = {kind for kind in kinds if kind in BLOCKS}
    kernels.require(wanted if importance or kernels.are_installed() else wanted - NUMPY)


def _quantize(
    rows: NDArray[np.float32], kind: TensorType, name: str, importance: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    """Quantize `rows` (..., width) by llama.cpp, or to the same bytes by the gguf package where that is missing."""
    if kind in NUMPY and importance is None and not kernels.are_installed():
        blocks: NDArray[np.uint8] = gguf.quants.quantize(rows, kind)
        return blocks.reshape(-1)
    return kernels.quantize(rows, kind, name, importance)


def require_finite(array: Array, name: str) -> None:
    """Raises CorruptWeightError where `array` holds a NaN or an infinity."""
    if not is_finite(array):
        bad = np.argwhere(~np.isfinite(array.astype(np.float32)))[0]
        where = ", ".join(map(str, bad))
        raise CorruptWeightError(f"{name}: NaN or infinity at [{where}]; fetch a sound copy of the checkpoint")


_EXPONENT = {2: {"float16": 0x7C00, "bfloat16": 0x7F80}, 4: {"float32": 0x7F800000}}


def is_finite(array: Array) -> bool:
    """Return whether no element is NaN or infinite, by the exponent bits alone: several times faster than isfinite."""
    size = array.dtype.itemsize
    bits = array.view(np.uint16 if size == 2 else np.uint32)
    exponent = bits.dtype.type(_EXPONENT[size][array.dtype.name])
    return bool(array.size == 0 or np.bitwise_and(bits, exponent).max() < exponent)


def _describe_overflow(array: Array, name: str) -> CorruptWeightError:
    largest = float(np.abs(array.astype(np.float32)).max())
    return CorruptWeightError(f"{name}: {largest:.6g} does not fit into f16 (at most 65504); bf16 and f32 hold it")
