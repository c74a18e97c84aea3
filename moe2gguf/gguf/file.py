"""A GGUF file whose header was read: its metadata, its list of tensors, and their bytes.

How the header is read, without trusting it, is in `reader`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from moe2gguf.errors import GGUFError, count_problems, name_odd_file
from moe2gguf.spec import Metadata, MetadataValue

CHUNK = 16 << 20

MAX_ALIGNMENT = 1 << 20
"""Of a file that is written again: what a larger one adds to every tensor is nothing but room."""


class LaterType(IntEnum):
    """Tensor types of llama.cpp that no release of the gguf package has yet."""

    Q2_0 = 42


TensorType: TypeAlias = GGMLQuantizationType | LaterType

# (elements, bytes) of one block: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-common.h#L180
# (the gguf package has 40 bytes for Q8_1, whose two scales are f16 by now)
BLOCK_SIZES: dict[int, tuple[int, int]] = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
BLOCK_SIZES |= {GGMLQuantizationType.Q8_1: (32, 36), LaterType.Q2_0: (64, 18)}

DTYPES: dict[int, npt.DTypeLike] = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
    GGMLQuantizationType.F64: np.dtype("<f8"),
    GGMLQuantizationType.I8: np.dtype("i1"),
    GGMLQuantizationType.I16: np.dtype("<i2"),
    GGMLQuantizationType.I32: np.dtype("<i4"),
    GGMLQuantizationType.I64: np.dtype("<i8"),
}


class ValueType(NamedTuple):
    """How a metadata value is stored: `type`, and for an array the type of its elements."""

    type: GGUFValueType
    element: GGUFValueType | None = None

    def __str__(self) -> str:
        """`UINT32`, or `ARRAY of STRING`."""
        return self.type.name if self.element is None else f"ARRAY of {self.element.name}"


@dataclass
class Findings:
    """What was found in a file: problems make it unsound, notes are worth knowing."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the tensor list; `shape` in numpy order, `offset` in bytes from the start of `file`."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    n_bytes: int
    file: Path

    @property
    def n_elements(self) -> int:
        """The product of the shape."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is, of the last axis."""
        n, n_bytes = BLOCK_SIZES[self.type]
        return (self.shape[-1] if self.shape else 1) // n * n_bytes


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file whose header is sound: every tensor lies inside the file and overlaps no other.

    `metadata` and `tensors` keep the file's order. Strings that are not UTF-8 carry surrogate escapes, so that
    `value.encode("utf-8", "surrogateescape")` gives the file's bytes back.
    """

    path: Path
    version: int
    alignment: int
    metadata: dict[str, MetadataValue]
    types: dict[str, ValueType]  # of the metadata, as stored
    tensors: dict[str, TensorInfo]
    data_offset: int
    file_size: int

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that holds a part of it: one, or the shards that were read as one."""
        return tuple(dict.fromkeys([self.path, *(tensor.file for tensor in self.tensors.values())]))

    def kinds_of(self, metadata: Metadata) -> dict[str, ValueType]:
        """How the values in `metadata` are stored that are this file's own, unchanged."""
        return {key: kind for key, kind in self.types.items() if metadata.get(key) is self.metadata[key]}

    def read_tensor(self, tensor: TensorInfo) -> npt.NDArray[np.generic]:
        """The whole tensor: an array of its shape, or for block types the blocks as uint8 (n_rows, row_bytes).

        Raises GGUFError when the file became shorter since its header was read.
        """
        raw = np.empty(tensor.n_bytes, np.uint8)
        with open_gguf(tensor.file) as file:
            read_into(file, tensor.offset, raw, tensor.file)
        dtype = DTYPES.get(tensor.type)
        if dtype is not None:
            return raw.view(dtype).reshape(tensor.shape)
        return raw.reshape(math.prod(tensor.shape[:-1]), tensor.row_bytes)

    def chunks(self, tensor: TensorInfo, n_bytes: int = CHUNK) -> Iterator[npt.NDArray[np.uint8]]:
        """The tensor's bytes in pieces of whole blocks, at most about `n_bytes` each.

        All pieces share one buffer: use each before asking for the next. Raises GGUFError like `read_tensor`.
        """
        block = BLOCK_SIZES[tensor.type][1]
        step = min(max(n_bytes // block, 1) * block, tensor.n_bytes)
        buffer = np.empty(step, np.uint8)
        with open_gguf(tensor.file) as file:
            for start in range(0, tensor.n_bytes, max(step, 1)):
                piece = buffer[: tensor.n_bytes - start]
                read_into(file, tensor.offset + start, piece, tensor.file)
                yield piece


def refuse_alignment(file: GGUFFile) -> list[str]:
    """Why a file that is to be written again must not have its alignment: one sentence, or none."""
    if file.alignment <= MAX_ALIGNMENT:
        return []
    return [f"{file.path}: aligns tensors to {file.alignment} bytes; at most {MAX_ALIGNMENT} make sense"]


def open_gguf(path: Path) -> BinaryIO:
    """Open a regular file for unbuffered reading; raises GGUFError for anything else (a pipe would hang)."""
    try:
        if what := name_odd_file(path):
            raise GGUFError(f"{path}: {what}")
        return path.open("rb", buffering=0)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise GGUFError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error


def read_into(file: BinaryIO, offset: int, target: npt.NDArray[np.uint8], path: Path) -> None:
    """Fill `target` with the bytes at `offset`; raises GGUFError when the file ends before."""
    view = target.data
    try:
        file.seek(offset)
        while view:
            n = file.readinto(view)  # type: ignore[attr-defined]  # a raw file has it, BinaryIO does not say so
            if not n:
                raise GGUFError(f"{path}: ends before byte {offset + target.size}; it was longer a moment ago")
            view = view[n:]
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read at byte {offset}: {error.strerror}") from error


def quote_text(text: str, limit: int = 80) -> str:
    """A string from a file, quoted and escaped for a message or a terminal, shortened to about `limit` characters."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}... ({len(text)} characters)"


def list_problems(path: Path, problems: list[str], limit: int = 20) -> str:
    """One message of all problems; beyond `limit` they are only counted, for a hostile file can have a million."""
    more = [f"and {len(problems) - limit} more"] if len(problems) > limit else []
    return "\n".join([f"{path}: {count_problems(problems)}:", *(f"  - {line}" for line in problems[:limit] + more)])
