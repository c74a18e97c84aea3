"""Where everything stands in a GGUF file: the header's bytes and every tensor's offset, from names and shapes alone.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, little endian).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gguf import GGMLQuantizationType as GGMLType
from gguf import GGUFValueType as Kind

from moe2gguf.errors import GGUFError
from moe2gguf.export import types
from moe2gguf.spec import MetadataValue

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32


@dataclass(frozen=True)
class Entry:
    """One tensor as the header names it; `shape` in numpy order."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor's data, without padding."""
        return types.n_bytes(self.shape, self.type)


@dataclass(frozen=True)
class Layout:
    """A file before its data: `header` and, for each tensor, the absolute offset of its data."""

    header: bytes
    offsets: Mapping[str, int]
    file_size: int


def lay_out(metadata: Mapping[str, MetadataValue], tensors: Sequence[Entry]) -> Layout:
    """The layout of a file with this metadata and these tensors, in this order.

    Raises:
        GGUFError: a metadata value does not fit its type, or two tensors share a name.
    """
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise GGUFError("two tensors have the same name")
    keys = b"".join(_string(key) + _value(key, value) for key, value in metadata.items())
    infos, position = [], 0
    relative = {}
    for tensor in tensors:
        relative[tensor.name] = position
        infos.append(_tensor_info(tensor, position))
        position = _aligned(position + tensor.n_bytes)
    head = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)) + keys + b"".join(infos)
    header = head.ljust(_aligned(len(head)), b"\0")
    offsets = {name: len(header) + offset for name, offset in relative.items()}
    return Layout(header, offsets, len(header) + position)


def value_offset(layout: Layout, key: str, value: str) -> int:
    """Where the characters of the string `value` of `key` stand in the header."""
    prefix = _string(key) + struct.pack("<IQ", Kind.STRING, len(value.encode()))
    return layout.header.index(prefix + value.encode()) + len(prefix)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _tensor_info(tensor: Entry, offset: int) -> bytes:
    dims = tuple(reversed(tensor.shape))
    return _string(tensor.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type, offset)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


_SCALARS: dict[type, tuple[Kind, str]] = {
    bool: (Kind.BOOL, "?"),
    int: (Kind.UINT32, "I"),
    float: (Kind.FLOAT32, "f"),
}
_ITEMS: dict[type, tuple[Kind, str]] = _SCALARS | {int: (Kind.INT32, "i")}


def _value(key: str, value: MetadataValue) -> bytes:
    try:
        if isinstance(value, str):
            return struct.pack("<I", Kind.STRING) + _string(value)
        if isinstance(value, list):
            return struct.pack("<I", Kind.ARRAY) + _array(value)
        kind, code = _SCALARS[type(value)]
        return struct.pack(f"<I{code}", kind, value)
    except (struct.error, OverflowError, KeyError) as error:
        raise GGUFError(f"metadata {key}: {value!r} does not fit a GGUF value ({error})") from error


def _array(values: Sequence[str] | Sequence[int] | Sequence[float]) -> bytes:
    if not values:
        raise struct.error("an empty array has no type")
    if isinstance(values[0], str):
        return struct.pack("<IQ", Kind.STRING, len(values)) + b"".join(_string(str(item)) for item in values)
    kind, code = _ITEMS[type(values[0])]
    return struct.pack(f"<IQ{len(values)}{code}", kind, len(values), *values)
