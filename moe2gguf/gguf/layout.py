"""Where everything stands in a GGUF file: the header's bytes and every tensor's offset, from names and shapes alone.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, little endian).
"""

import math
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from gguf import GGUFValueType as Kind

from moe2gguf.errors import GGUFError
from moe2gguf.gguf import types
from moe2gguf.gguf.file import TensorInfo, TensorType, ValueType
from moe2gguf.spec import MetadataValue

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32

EACH_EXPERT = re.compile(r"(?<!_norm)_exps\.")
"""In the name of a tensor that has a part for each expert; the norm before them in arctic has not."""


@dataclass(frozen=True)
class Entry:
    """One tensor as the header names it; `shape` in numpy order."""

    name: str
    shape: tuple[int, ...]
    type: TensorType

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


def mean_bits_per_weight(tensors: Collection[Entry | TensorInfo]) -> float:
    """Bits per element of all tensors together; 0 where there are none."""
    n_weight = sum(math.prod(tensor.shape) for tensor in tensors)
    return 8 * sum(tensor.n_bytes for tensor in tensors) / max(n_weight, 1)


def active_bytes(tensors: Collection[Entry | TensorInfo], n_expert: int, n_expert_used: int) -> int:
    """Return the bytes of weights read per generated token with `n_expert_used` of `n_expert` experts (0: dense).

    An embedding that is not also the output matrix is left out: one row of it is read.
    """
    skipped = {"token_embd.weight"} if any(tensor.name == "output.weight" for tensor in tensors) else set()
    in_experts = sum(tensor.n_bytes for tensor in tensors if EACH_EXPERT.search(tensor.name))
    rest = sum(t.n_bytes for t in tensors if not EACH_EXPERT.search(t.name) and t.name not in skipped)
    return rest + (in_experts * n_expert_used // n_expert if n_expert else 0)


def lay_out(
    metadata: Mapping[str, MetadataValue],
    tensors: Sequence[Entry],
    kinds: Mapping[str, ValueType] = MappingProxyType({}),
) -> Layout:
    """Return the layout of a file with this metadata and these tensors, in this order.

    `kinds` says how a value is stored where that differs from what `MetadataValue` promises, for metadata that comes
    from another file. A key `general.alignment` is obeyed.

    Raises:
        GGUFError: a metadata value does not fit its type, or two tensors share a name.
    """
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise GGUFError("two tensors have the same name")
    alignment = int(str(metadata.get("general.alignment", ALIGNMENT)))
    keys = b"".join(_pack_string(key) + _pack_value(key, value, kinds.get(key)) for key, value in metadata.items())
    infos, position = [], 0
    relative = {}
    for tensor in tensors:
        relative[tensor.name] = position
        infos.append(_pack_tensor(tensor, position))
        position = align_up(position + tensor.n_bytes, alignment)
    head = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)) + keys + b"".join(infos)
    header = head.ljust(align_up(len(head), alignment), b"\0")
    offsets = {name: len(header) + offset for name, offset in relative.items()}
    return Layout(header, offsets, len(header) + position)


def find_value(layout: Layout, key: str, value: str) -> int:
    """Return where the characters of the string `value` of `key` stand in the header."""
    prefix = _pack_string(key) + struct.pack("<IQ", Kind.STRING, len(value.encode()))
    return layout.header.index(prefix + value.encode()) + len(prefix)


def find_array(layout: Layout, key: str, n_value: int) -> int:
    """Return where the numbers of the FLOAT32 array of `n_value` values of `key` stand in the header."""
    prefix = _pack_string(key) + struct.pack("<IIQ", Kind.ARRAY, Kind.FLOAT32, n_value)
    return layout.header.index(prefix) + len(prefix)


def align_up(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment


def measure_info(tensor: Entry) -> int:
    """Return the bytes of the tensor's entry in the header."""
    return len(_pack_tensor(tensor, 0))


def _pack_tensor(tensor: Entry, offset: int) -> bytes:
    dims = tuple(reversed(tensor.shape))
    return _pack_string(tensor.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type, offset)


def _pack_string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")  # bytes of another file that were not UTF-8 come back as they were
    return struct.pack("<Q", len(data)) + data


SCALARS: dict[type, Kind] = {bool: Kind.BOOL, int: Kind.UINT32, float: Kind.FLOAT32}
"""As which type a value is stored."""

_ITEMS: dict[type, Kind] = {bool: Kind.BOOL, int: Kind.INT32, float: Kind.FLOAT32}
_CODES: dict[Kind, str] = {
    Kind.UINT8: "B",
    Kind.INT8: "b",
    Kind.UINT16: "H",
    Kind.INT16: "h",
    Kind.UINT32: "I",
    Kind.INT32: "i",
    Kind.FLOAT32: "f",
    Kind.BOOL: "?",
    Kind.UINT64: "Q",
    Kind.INT64: "q",
    Kind.FLOAT64: "d",
}


def _pack_value(key: str, value: MetadataValue, stored: ValueType | None) -> bytes:
    try:
        if isinstance(value, list):
            return struct.pack("<I", Kind.ARRAY) + _pack_array(value, stored.element if stored else None)
        if isinstance(value, str):
            return struct.pack("<I", Kind.STRING) + _pack_string(value)
        kind = stored.type if stored else SCALARS[type(value)]
        return struct.pack(f"<I{_CODES[kind]}", kind, value)
    except (struct.error, OverflowError, KeyError) as error:
        raise GGUFError(f"metadata {key}: {value!r} does not fit a GGUF value ({error})") from error


def _pack_array(values: Sequence[str] | Sequence[int] | Sequence[float], element: Kind | None) -> bytes:
    if not values and element is None:
        raise struct.error("an empty array has no type")
    if element is None:
        element = Kind.STRING if isinstance(values[0], str) else _ITEMS[type(values[0])]
    if element == Kind.STRING:
        return struct.pack("<IQ", element, len(values)) + b"".join(_pack_string(str(item)) for item in values)
    return struct.pack(f"<IQ{len(values)}{_CODES[element]}", element, len(values), *values)
