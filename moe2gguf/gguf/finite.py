"""Whether every value of a file is finite: elements of float tensors, the scales of block types."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as GGMLType

from moe2gguf.errors import GGUFError
from moe2gguf.gguf.file import (
    BLOCK_SIZES,
    CHUNK,
    Findings,
    GGUFFile,
    LaterType,
    TensorInfo,
    open_gguf,
    quote_text,
    read_into,
)

_STEP = 1 << 20  # bytes looked at together: they and the scratch space stay in the cache
_HALF = 0x7C00  # the exponent of an f16; all ones mean NaN or infinity


class _Field(NamedTuple):
    """A float inside a block: NaN or infinite when all bits of `exponent` are set."""

    dtype: npt.DTypeLike
    offset: int  # bytes from the block's start
    exponent: int


# https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-common.h#L180, read as in ggml_validate_row_data:
# https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c#L5380
# Integers and NVFP4 are absent: each of their bytes is a number. IQ1_M, whose scale is scattered, is in `_bad_blocks`.
_BY_OFFSETS = {
    (0,): "F16 Q4_0 Q5_0 Q8_0 Q1_0 IQ1_S IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS",
    (0, 2): "Q4_1 Q5_1 Q8_1 Q4_K Q5_K",
    (52,): "TQ1_0",
    (64,): "TQ2_0",
    (80, 82): "Q2_K",
    (108,): "Q3_K",
    (208,): "Q6_K",
}
"""The types with f16 numbers at these places of a block, such as its scale."""

FIELDS: dict[int, tuple[_Field, ...]] = {
    GGMLType[name]: tuple(_Field("<u2", offset, _HALF) for offset in offsets)
    for offsets, names in _BY_OFFSETS.items()
    for name in names.split()
} | {
    GGMLType.BF16: (_Field("<u2", 0, 0x7F80),),
    GGMLType.F32: (_Field("<u4", 0, 0x7F800000),),
    GGMLType.F64: (_Field("<u8", 0, 0x7FF0000000000000),),
    GGMLType.Q8_K: (_Field("<u4", 0, 0x7F800000),),
    GGMLType.MXFP4: (_Field("u1", 0, 0xFF),),  # a power of two, where 255 is NaN
    LaterType.Q2_0: (_Field("<u2", 0, _HALF),),
}


class _Range(NamedTuple):
    """Some whole blocks of a tensor, in bytes from the tensor's start."""

    tensor: TensorInfo
    start: int
    n_bytes: int


def check_values(file: GGUFFile, found: Findings, threads: int, progress: Callable[[int], None]) -> None:
    """Reads every tensor; one problem per tensor with NaN or infinite values."""
    ranges = [part for tensor in file.tensors.values() for part in _ranges(tensor)]
    n_bad: dict[str, int] = defaultdict(int)
    first: dict[str, int] = {}
    progress(file.data_offset)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for part, (n, block) in zip(ranges, pool.map(_scan, ranges), strict=True):
                if n:
                    n_bad[part.tensor.name] += n
                    first.setdefault(part.tensor.name, block)
                progress(part.n_bytes)
    except GGUFError as error:  # the file shrank
        found.problems.append(str(error))
    found.problems += [_describe_bad(file.tensors[name], n_bad[name], block) for name, block in first.items()]


def _ranges(tensor: TensorInfo) -> Iterator[_Range]:
    block = BLOCK_SIZES[tensor.type][1]
    step = CHUNK // block * block
    for start in range(0, tensor.n_bytes, step):
        yield _Range(tensor, start, min(step, tensor.n_bytes - start))


def _scan(part: _Range) -> tuple[int, int]:
    """Return how many bad blocks there are in a range, and the tensor's block number of the first."""
    tensor, start, n_bytes = part
    if tensor.type not in FIELDS and tensor.type != GGMLType.IQ1_M:
        return 0, 0
    block = BLOCK_SIZES[tensor.type][1]
    step = min(_STEP // block * block, n_bytes)
    buffer, scratch = np.empty(step, np.uint8), np.empty(step, np.uint8)
    n_bad, first = 0, 0
    with open_gguf(tensor.file) as file:
        for at in range(start, start + n_bytes, step):
            piece = buffer[: start + n_bytes - at]
            read_into(file, tensor.offset + at, piece, tensor.file)
            bad = _bad_blocks(piece, tensor.type, scratch)
            if bad is not None:
                first = first if n_bad else at // block + int(bad.argmax())
                n_bad += int(bad.sum())
    return n_bad, first


def _bad_blocks(raw: npt.NDArray[np.uint8], kind: int, scratch: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_] | None:
    """Return which of the blocks hold a NaN or an infinity; None when none does. `scratch` has raw's size or more."""
    block = BLOCK_SIZES[kind][1]
    if kind == GGMLType.IQ1_M:  # the f16 is spread over the top four bits of the block's last four 16-bit words
        words = raw.view("<u2").reshape(-1, block // 2)
        bad = (words[:, 27] & 0x7000 == 0x7000) & (words[:, 26] & 0xC000 == 0xC000)
        return bad if bad.any() else None
    found: npt.NDArray[np.bool_] | None = None
    for dtype, offset, exponent in FIELDS[kind]:
        values = raw.view(dtype)
        values = values.reshape(-1, block // values.itemsize)[:, offset // values.itemsize]
        mask = values.dtype.type(exponent)
        bits = np.bitwise_and(values, mask, out=scratch.view(dtype)[: values.size])
        if bits.max() == mask:
            found = (bits == mask) if found is None else found | (bits == mask)
    return found


def _describe_bad(tensor: TensorInfo, n_bad: int, block: int) -> str:
    """Return the problem in words: tensor, layer, expert, how much, and where it begins (an index in numpy order)."""
    n = BLOCK_SIZES[tensor.type][0]
    index = [int(i) for i in np.unravel_index(block * n, tensor.shape)] if tensor.shape else []
    layer = re.match(r"blk\.(\d+)\.", tensor.name)
    where = [f"layer {layer[1]}"] if layer else []
    if re.search(r"_exps\.|ffn_gate_inp\.", tensor.name) and index:
        where.append(f"expert {index[0]}")
    what = "NaN or infinite values" if n == 1 else f"blocks of {n} with a NaN or infinite scale"
    place = f" ({', '.join(where)})" if where else ""
    n_all = math.prod(tensor.shape) // n
    return f"tensor {quote_text(tensor.name)}{place}: {n_bad} of {n_all} {what}, the first at {index}"
