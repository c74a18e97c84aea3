"""A GGUF file, read without trusting it.

Every count, length and offset is compared with the bytes that remain before anything is allocated for it, so a
hostile header costs no more than a small multiple of its own size. The checks are those of llama.cpp, and more:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/gguf.cpp#L480
"""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType

from moe2gguf.errors import GGUFError, list_names
from moe2gguf.gguf.file import (
    BLOCK_SIZES,
    GGUFFile,
    LaterType,
    TensorInfo,
    TensorType,
    ValueType,
    list_problems,
    open_gguf,
    quote_text,
    read_into,
)
from moe2gguf.spec import MetadataValue

DEFAULT_ALIGNMENT = 32
MAX_HEADER = 64 << 20  # bytes of metadata and tensor list; the largest vocabularies in use need about 20 MiB
MAX_TENSORS = MAX_PAIRS = 100_000  # a tensor for each expert made about 50000
MAX_KEY = 65535  # bytes, from the format's specification
MAX_NAME = 63  # bytes of a tensor name, and
MAX_DIMS = 4  # its dimensions: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/gguf.cpp#L658
_WINDOW = 256 << 10
_SMALLEST_PAIR = 8 + 1 + 4 + 1  # key length, key, type, value
_SMALLEST_TENSOR = 8 + 1 + 4 + 4 + 8  # name length, name, n_dims, type, offset
_INT64_MAX = 2**63 - 1


_SCALARS: dict[int, np.dtype[np.generic]] = {
    kind: np.dtype(scalar).newbyteorder("<") for kind, scalar in GGUFReader.gguf_scalar_to_np.items()
} | {GGUFValueType.BOOL: np.dtype("u1")}  # which must be 0 or 1

_NOT_GGUF = {
    b"\0\0\0\0": "zeros: the program that wrote it was probably stopped; make the file again",
    b"vers": "text, perhaps a Git LFS pointer: fetch the real file with `git lfs pull`",
    b"lmgg": "a ggml file from before GGUF: convert the original model again",
    b"tjgg": "a ggjt file from before GGUF: convert the original model again",
    b"PK\x03\x04": "a zip archive (a PyTorch checkpoint?): convert it first",
}


def read_gguf(path: str | Path) -> GGUFFile:
    """Read and check the header of a GGUF file (version 2 or 3, little endian); no tensor byte is read.

    Raises GGUFError, naming file, key or tensor, what was expected and what was found.
    """
    path = Path(path)
    with open_gguf(path) as file:
        try:
            return _Header(path, file).parse()
        except OSError as error:
            raise GGUFError(f"{path}: cannot be read: {error.strerror}") from error


class _Header:
    """Reads a header front to back, never past the file's end or MAX_HEADER."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.file_size = file.seek(0, 2)
        file.seek(0)
        self.end = min(self.file_size, MAX_HEADER)
        self.position = 0  # of the next byte to take
        self.window = b""
        self.at = 0  # index of that byte in the window
        self.what = "header"  # the part being read, for messages

    def fail(self, problem: str) -> GGUFError:
        return GGUFError(f"{self.path}: {self.what}: {problem}")

    def take(self, n: int) -> bytes:
        """The next n bytes; n is checked against the bytes that remain before anything is read."""
        if n > self.end - self.position:
            if self.end < self.file_size:
                raise self.fail(f"the header is longer than the {MAX_HEADER} bytes this program accepts")
            raise self.fail(f"needs {n} bytes, but only {self.end - self.position} remain; the file is cut or corrupt")
        if n > len(self.window) - self.at:
            self.refill(n)
        piece = self.window[self.at : self.at + n]
        self.at += n
        self.position += n
        return piece

    def refill(self, n: int) -> None:
        """Bring at least n bytes into the window."""
        rest = self.window[self.at :]
        size = min(max(n, _WINDOW), self.end - self.position) - len(rest)
        buffer = np.empty(size, np.uint8)
        read_into(self.file, self.position + len(rest), buffer, self.path)
        self.window, self.at = rest + buffer.tobytes(), 0

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def count(self, kind: str, smallest: int, limit: int = MAX_HEADER) -> int:
        """A number of things, each of which takes at least `smallest` bytes of what remains."""
        n = self.u64()
        if n * smallest > self.end - self.position:
            raise self.fail(f"{n} {kind} cannot fit in the {self.end - self.position} bytes that remain")
        if n > limit:
            raise self.fail(f"{n} {kind}; this program accepts at most {limit}")
        return n

    def text(self, limit: int) -> str:
        """A key or a tensor name: UTF-8, of 1 to `limit` bytes, without NUL."""
        n = self.u64()
        if not 0 < n <= limit:
            raise self.fail(f"its name must have 1 to {limit} bytes, found a length of {n}")
        try:
            name = self.take(n).decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"its name is not UTF-8: {error.object[:80]!r}") from error
        if "\0" in name:
            raise self.fail(f"its name {quote_text(name)} holds a NUL, where other readers would end it")
        return name

    def parse(self) -> GGUFFile:
        version = self.version()
        n_tensors = self.count("tensors", _SMALLEST_TENSOR, MAX_TENSORS)
        n_pairs = self.count("metadata keys", _SMALLEST_PAIR, MAX_PAIRS)
        metadata, types = self.pairs(n_pairs)
        alignment = self.alignment(metadata, types)
        listed = self.tensor_list(n_tensors)
        data_offset = _round_up(self.position, alignment) if listed else self.position
        tensors = self.place(listed, data_offset, alignment)
        return GGUFFile(self.path, version, alignment, metadata, types, tensors, data_offset, self.file_size)

    def version(self) -> int:
        if self.file_size < 24:
            raise self.fail(f"a GGUF file has at least 24 bytes, this one {self.file_size}; fetch it again")
        magic = self.take(4)
        if magic != b"GGUF":
            model = self.path.parent if self.path.with_name("config.json").is_file() else None
            way = f"; name its folder, {model}, which `moe2gguf convert` makes a GGUF file of" if model else ""
            raise self.fail(f"not a GGUF file; it starts with {_NOT_GGUF.get(magic, repr(magic))}{way}")
        version = self.u32()
        if version and version & 0xFFFF == 0:
            raise self.fail("a big-endian GGUF; this program reads little-endian ones, convert it first")
        if version == 1:
            raise self.fail("GGUF version 1, which nothing reads any more; convert the original model again")
        if version not in (2, 3):
            raise self.fail(f"GGUF version {version}; this program knows versions 2 and 3")
        return version

    def pairs(self, n: int) -> tuple[dict[str, MetadataValue], dict[str, ValueType]]:
        metadata: dict[str, MetadataValue] = {}
        types: dict[str, ValueType] = {}
        for i in range(n):
            self.what = f"metadata key {i + 1} of {n}"
            key = self.text(MAX_KEY)
            self.what = f"metadata {quote_text(key)}"
            if key in metadata:
                raise self.fail("the key appears twice")
            types[key] = kind = self.value_type()
            metadata[key] = self.scalar(kind.type) if kind.element is None else self.array(kind.element)
        return metadata, types

    def value_type(self) -> ValueType:
        kind = self.value_kind()
        if kind != GGUFValueType.ARRAY:
            return ValueType(kind)
        element = self.value_kind()
        if element == GGUFValueType.ARRAY:
            raise self.fail("an array of arrays; llama.cpp does not read those either")
        return ValueType(kind, element)

    def value_kind(self) -> GGUFValueType:
        number = self.u32()
        if number != GGUFValueType.STRING and number != GGUFValueType.ARRAY and number not in _SCALARS:
            raise self.fail(f"unknown value type {number}, expected 0 to 12")
        return GGUFValueType(number)

    def scalar(self, kind: GGUFValueType) -> str | bool | int | float:
        if kind == GGUFValueType.STRING:
            return self.string()
        dtype = _SCALARS[kind]
        value: bool | int | float = np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
        return self.truth([int(value)])[0] if kind == GGUFValueType.BOOL else value

    def array(self, kind: GGUFValueType) -> list[str] | list[int] | list[float]:
        if kind == GGUFValueType.STRING:
            return self.strings(self.count("strings", 8))
        dtype = _SCALARS[kind]
        n = self.count(f"{kind.name} elements", dtype.itemsize)
        values: list[int] = np.frombuffer(self.take(n * dtype.itemsize), dtype).tolist()
        return self.truth(values) if kind == GGUFValueType.BOOL else values

    def string(self) -> str:
        return self.take(self.u64()).decode("utf-8", "surrogateescape")

    def strings(self, n: int) -> list[str]:
        """n strings; the short way for those that lie in the window whole, as a vocabulary has a million of them."""
        values: list[str] = []
        while len(values) < n:
            values.append(self.string())  # checks, and refills the window
            window, at = self.window, self.at
            for _ in range(n - len(values)):
                end = at + 8 + int.from_bytes(window[at : at + 8], "little")
                if end > len(window):
                    break
                values.append(window[at + 8 : end].decode("utf-8", "surrogateescape"))
                at = end
            self.position += at - self.at
            self.at = at
        return values

    def truth(self, values: list[int]) -> list[int]:
        wrong = next((value for value in values if value > 1), None)
        if wrong is not None:
            raise self.fail(f"a BOOL must be 0 or 1, found {wrong}")
        return [value == 1 for value in values]

    def alignment(self, metadata: dict[str, MetadataValue], types: dict[str, ValueType]) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        self.what = "metadata 'general.alignment'"
        kind = types.get("general.alignment", ValueType(GGUFValueType.UINT32))
        if kind != ValueType(GGUFValueType.UINT32):
            raise self.fail(f"expected a UINT32, found {kind}")
        if not isinstance(value, int) or value < 1 or value & (value - 1):
            raise self.fail(f"expected a power of two, found {value}")
        return value

    def tensor_list(self, n: int) -> list[TensorInfo]:
        listed: dict[str, TensorInfo] = {}
        for i in range(n):
            self.what = f"tensor {i + 1} of {n}"
            name = self.text(MAX_NAME)
            self.what = f"tensor {quote_text(name)}"
            if name in listed:
                raise self.fail("the name appears twice")
            shape, kind = self.shape(), self.tensor_type()
            block, block_bytes = BLOCK_SIZES[kind]
            if (shape[-1] if shape else 1) % block:
                raise self.fail(f"rows of {shape[-1:]} elements are not whole {kind.name} blocks of {block}")
            n_bytes = math.prod(shape) // block * block_bytes
            listed[name] = TensorInfo(name, shape, kind, self.u64(), n_bytes, self.path)
        return list(listed.values())

    def shape(self) -> tuple[int, ...]:
        n_dims = self.u32()
        if n_dims > MAX_DIMS:
            raise self.fail(f"at most {MAX_DIMS} dimensions, found {n_dims}")
        shape = tuple(self.u64() for _ in range(n_dims))[::-1]
        # a zero must not hide a product that other readers, multiplying in 64 bits, would see wrap around
        if math.prod(max(n, 1) for n in shape) > _INT64_MAX:
            raise self.fail(f"the shape {shape} has more elements than 64 bits can count")
        return shape

    def tensor_type(self) -> TensorType:
        number = self.u32()
        for known in (GGMLQuantizationType, LaterType):
            if number in known._value2member_map_ and number in BLOCK_SIZES:
                return known(number)
        raise self.fail(f"unknown tensor type {number}; it was removed from llama.cpp, is newer, or is of a fork")

    def place(self, listed: list[TensorInfo], data_offset: int, alignment: int) -> dict[str, TensorInfo]:
        """The tensors at absolute offsets; all that are misaligned, outside the file or overlapping are named."""
        self.what = "tensor data"
        room = self.file_size - data_offset
        problems = [
            f"tensor {quote_text(t.name)}: its offset {t.offset} is not a multiple of the alignment {alignment}"
            for t in listed
            if t.offset % alignment
        ]
        if beyond := [t for t in listed if t.offset + t.n_bytes > room]:
            names = list_names([quote_text(t.name) for t in beyond])
            problems.append(
                f"{len(beyond)} of {len(listed)} tensors end behind the file, which has {max(room, 0)} bytes of data "
                f"and needs {max(t.offset + t.n_bytes for t in beyond)}: {names}; it is cut or corrupt, get it again"
            )
        order = sorted((t for t in listed if t.n_bytes), key=lambda t: t.offset)
        problems += [
            f"tensors {quote_text(a.name)} and {quote_text(b.name)} overlap: the first ends at {a.offset + a.n_bytes}, "
            f"the second starts at {b.offset}"
            for a, b in pairwise(order)
            if a.offset + a.n_bytes > b.offset
        ]
        if problems:
            raise GGUFError(list_problems(self.path, problems))
        return {t.name: replace(t, offset=t.offset + data_offset) for t in listed}


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
