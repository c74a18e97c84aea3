"""Lazy, checked tensors of a folder of safetensors files: names and shapes first, bytes when asked.

Headers are checked by the safetensors library itself (sizes, gaps, overlaps, unknown types); our part is the set of
files (index, shards) and reading: by `readinto`, not by a memory map, so that a process's memory is what it works on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import struct
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from moe2gguf.errors import CheckpointError, list_names
from moe2gguf.hf.json_file import read_json
from moe2gguf.hf.paths import resolve_inside

Array = NDArray[np.generic]
Seen = Callable[[memoryview], object]

DTYPES: dict[str, np.dtype[np.generic]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The storage types we read, by their safetensors name."""

MOST_NAMES = 8
"""Tensors or files that a message names; of the others it gives the number."""

PIECE = 1 << 20
"""Bytes that are read at once: they stay in the cache while they are hashed."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
MERGE = "PeftModel.from_pretrained(BASE_MODEL, DIR).merge_and_unload().save_pretrained(OUT)"
ADAPTER = f"holds an adapter, which is no model by itself; merge it into its base model: {MERGE}"
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint; `offset` and `n_bytes` place it in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    n_bytes: int

    def read(self, seen: Seen = lambda _: None) -> Array:
        """Return the whole tensor, in its storage type (bf16 as `ml_dtypes.bfloat16`)."""
        return next(self.blocks(max(self.n_bytes, 1), seen))

    def blocks(self, max_bytes: int, seen: Seen = lambda _: None) -> Iterator[Array]:
        """Yield consecutive row blocks of at most `max_bytes` (at least one row each), shape (n_row, *shape[1:]).

        `seen` is given the bytes piece by piece, as they are read.

        Raises:
            CheckpointError: the file cannot be read, or ends before the tensor does.
        """
        row_bytes = max(self.n_bytes // max(self.shape[0] if self.shape else 1, 1), 1)
        step = max(max_bytes // row_bytes, 1)
        with _open(self.file) as file:
            file.seek(self.offset)
            n_row = self.shape[0] if self.shape else 1
            for start in range(0, n_row, step):
                shape = (min(step, n_row - start), *self.shape[1:]) if self.shape else ()
                block = np.empty(shape, DTYPES[self.dtype])
                _read_into(file, block, self, seen)
                yield block

    def equals(self, other: StoredTensor) -> bool:
        """Return whether `other` has the same shape and the same numbers, whatever the type."""
        if self.shape != other.shape or not {self.dtype, other.dtype} <= DTYPES.keys():
            return False
        n_row = self.shape[0] if self.shape else 1
        ours, theirs = (one.blocks(max(one.n_bytes // max(n_row, 1), 1) * 1024) for one in (self, other))
        pairs = zip(ours, theirs, strict=True)
        return all(np.array_equal(a.astype(np.float32), b.astype(np.float32)) for a, b in pairs)

    def is_zero(self) -> bool:
        """Return whether every element is zero."""
        return not any(block.any() for block in self.blocks(PIECE))


def _open(path: Path) -> FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from error


def _read_into(file: FileIO, block: Array, tensor: StoredTensor, seen: Seen) -> None:
    view = block.reshape(-1).view(np.uint8).data
    while view:
        try:
            count = file.readinto(view[:PIECE])
        except OSError as error:
            raise CheckpointError(f"{tensor.file}: cannot be read in {tensor.name} ({error.strerror})") from error
        if not count:
            raise CheckpointError(f"{tensor.file}: ends inside {tensor.name}; fetch a sound copy of the file")
        seen(view[:count])
        view = view[count:]


def read_headers(folder: Path, is_derived: Callable[[str], bool] = lambda _: False) -> dict[str, StoredTensor]:
    """Return every tensor of the checkpoint in `folder`, by name; reads headers only.

    Index and shards may disagree about tensors that `is_derived` says carry no numbers of their own.

    Raises:
        CheckpointError: no safetensors files, a missing or surplus shard, a second model, a name outside the folder, a
            broken header, a tensor that two shards hold, or an index that disagrees with the shards (all names listed).
    """
    index = resolve_inside(folder, INDEX)
    files = _list_indexed_files(folder) if index.exists() else [_find_single_file(folder)]
    tensors: dict[str, StoredTensor] = {}
    twice = []
    for file in files:
        for tensor in _read_header(file):
            if tensor.name in tensors:
                twice.append(f"{tensor.name} (in {tensors[tensor.name].file.name} and {file.name})")
            tensors[tensor.name] = tensor
    if twice:
        raise CheckpointError(f"{folder}: tensors stored twice: {list_names(twice, MOST_NAMES)}")
    if index.exists():
        _compare_with_index(index, tensors, is_derived)
    return tensors


def _find_single_file(folder: Path) -> Path:
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE in found:
        return resolve_inside(folder, SINGLE)
    if found and not (found := [name for name in found if name != "adapter_model.safetensors"]):
        raise CheckpointError(f"{folder}: {ADAPTER}")
    if len(found) == 1 and not _SHARD.fullmatch(found[0]):
        return resolve_inside(folder, found[0])
    if found:
        raise CheckpointError(
            f"{folder}: has {list_names(found, MOST_NAMES)}, but neither {SINGLE} nor {INDEX}; fetch the index, or "
            f"call the file that is the model {SINGLE}"
        )
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder}: holds pickled weights ({list_names(pickles, MOST_NAMES)}), which can run code when they are "
            "read; save the model as safetensors first"
        )
    raise CheckpointError(f"{folder}: no *.safetensors file; is this a Hugging Face model folder?")


def list_shards(folder: Path) -> list[Path]:
    """List the files that the index of `folder` names, whether they are there or not; none without an index."""
    index = resolve_inside(folder, INDEX)
    names = sorted(set(_read_weight_map(index).values())) if index.exists() else []
    return [resolve_inside(folder, name) for name in names]


def _list_indexed_files(folder: Path) -> list[Path]:
    files = list_shards(folder)
    names = [file.relative_to(folder).as_posix() for file in files]
    if missing := [name for name, file in zip(names, files, strict=True) if not file.is_file()]:
        raise CheckpointError(f"{folder}: shards named in {INDEX} are missing: {list_names(missing, MOST_NAMES)}")
    stems = {match[1] for name in names if (match := _SHARD.fullmatch(name))}
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    _refuse_second_model(folder, names, files)
    if surplus := [name for name in present if name not in names and (m := _SHARD.fullmatch(name)) and m[1] in stems]:
        raise CheckpointError(
            f"{folder}: shards that {INDEX} does not name: {list_names(surplus, MOST_NAMES)}; fetch one whole set"
        )
    return files


def _refuse_second_model(folder: Path, names: list[str], shards: list[Path]) -> None:
    """Refuse a model.safetensors beside the shards that `names` lists, unless it holds the same tensors."""
    single = resolve_inside(folder, SINGLE)
    if SINGLE in names or not single.exists():
        return
    tensors = {tensor.name: tensor for tensor in _read_header(single)}
    sharded = {tensor.name: tensor for shard in shards for tensor in _read_header(shard)}
    if tensors.keys() != sharded.keys() or not all(tensors[name].equals(sharded[name]) for name in tensors):
        raise CheckpointError(
            f"{folder}: holds two models, {SINGLE} and the shards of {INDEX}, and they differ (transformers would load "
            f"{SINGLE}); move away the one that you do not want"
        )


def _read_weight_map(index: Path) -> Mapping[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty; expected an object: tensor -> file")
    if wrong := [name for name, file in weight_map.items() if not isinstance(file, str)]:
        raise CheckpointError(f"{index}: weight_map names no file for {list_names(wrong, MOST_NAMES)}")
    return weight_map


def _compare_with_index(index: Path, tensors: Mapping[str, StoredTensor], is_derived: Callable[[str], bool]) -> None:
    weight_map = _read_weight_map(index)
    absent = sorted(name for name in weight_map if name not in tensors and not is_derived(name))
    unnamed = sorted(name for name in tensors if name not in weight_map and not is_derived(name))
    elsewhere = sorted(
        name
        for name, file in weight_map.items()
        if name in tensors and tensors[name].file != resolve_inside(index.parent, file)
    )
    problems = [
        f"{what}: {list_names(names, MOST_NAMES)}"
        for what, names in (
            ("named in the index, stored nowhere", absent),
            ("stored, not named in the index", unnamed),
            ("stored in another file than the index says", elsewhere),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{index}: the index and the shards disagree; " + "; ".join(problems))


def _read_header(path: Path) -> list[StoredTensor]:
    """Return the tensors of one file, after the safetensors library has checked the whole header against the file."""
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length), object_pairs_hook=_require_unique)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a sound safetensors file ({error}); fetch it again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        tensors.append(StoredTensor(name, entry["dtype"], shape, path, 8 + length + start, end - start))
    return tensors


def _require_unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise SafetensorError(f"names twice: {list_names(twice, MOST_NAMES)}")
    return dict(pairs)


class Readable(Protocol):
    """A tensor of any kind of source, whose numbers or bytes can be read whole or in pieces of rows."""

    @property
    def name(self) -> str:
        """As stored."""

    @property
    def dtype(self) -> str:
        """The name of its type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In numpy order."""

    def read(self, seen: Seen) -> Array:
        """Return all of it; `seen` is given its bytes."""

    def blocks(self, max_bytes: int, seen: Seen) -> Iterator[Array]:
        """Return consecutive pieces of whole rows; `seen` is given their bytes."""


class SourceDigest:
    """One SHA-256 over a checkpoint's tensors that does not depend on how they are sharded.

    Every tensor is hashed as it is read; the digest covers name, type, shape and hash of each, in name order. `parts`
    are the hashes by name, in hexadecimal.
    """

    def __init__(self) -> None:
        self.parts: dict[str, str] = {}
        self._turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def read(self, tensor: Readable) -> Array:
        """Return the whole tensor, hashed unless it has been."""
        with self._hashed(tensor) as seen:
            return tensor.read(seen)

    def blocks(self, tensor: Readable, max_bytes: int) -> Iterator[Array]:
        """Yield the tensor in row blocks, hashed when the last block is taken."""
        with self._hashed(tensor) as seen:
            yield from tensor.blocks(max_bytes, seen)

    @contextlib.contextmanager
    def _hashed(self, tensor: Readable) -> Iterator[Seen]:
        """What is to be given the bytes of a tensor; two threads that read one tensor wait for each other."""
        with self._turns[tensor.name]:
            if tensor.name in self.parts:
                yield lambda _: None
                return
            sha = hashlib.sha256()
            yield sha.update
            self.parts[tensor.name] = sha.hexdigest()

    def hexdigest(self, tensors: Mapping[str, Readable]) -> str:
        """Return the digest over `tensors`, each of which must have been read."""
        sha = hashlib.sha256()
        for name in sorted(tensors):
            tensor = tensors[name]
            sha.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode() + bytes.fromhex(self.parts[name]))
        return sha.hexdigest()


def digest_source(tensors: Mapping[str, Readable]) -> str:
    """Return the digest over `tensors`, all of which are read for it."""
    digest = SourceDigest()
    for tensor in tensors.values():
        for _ in digest.blocks(tensor, PIECE):
            pass
    return digest.hexdigest(tensors)
