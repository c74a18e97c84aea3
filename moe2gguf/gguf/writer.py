"""The files of a model: their tensors made, encoded and written by several threads, then verified, then named.

Nothing has its final name that is not complete and verified, see `moe2gguf.gguf.replace_files`.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from moe2gguf.errors import CorruptWeightError, GGUFError, list_names
from moe2gguf.gguf import types
from moe2gguf.gguf.file import TensorType
from moe2gguf.gguf.layout import Entry, Layout
from moe2gguf.gguf.outputs import list_model_paths
from moe2gguf.gguf.replace_files import flush_files, open_part, replace_files
from moe2gguf.gguf.resume import Job, checksum_range
from moe2gguf.gguf.system import count_processors, write_at
from moe2gguf.gguf.verify import require_sound
from moe2gguf.progress import Progress

Blocks = Callable[[], Iterator[NDArray[np.generic]]]

Importance = Callable[[], Sequence[NDArray[np.float32]]]
"""Per matrix of a tensor (one, or one per expert) the importance of its columns (width,), made when it is written."""

Files = Sequence[tuple[Sequence["OutputTensor"], Layout]]
"""The tensors of each file of a model, and where they are in it."""

Finish = Callable[[int, Layout], None]
"""Fills in what was not known before all tensors were made, through a descriptor of a file with this layout."""

PIECE = 1 << 18
"""Elements that are quantized together: a fraction of a second in the slowest kernel, a megabyte of float32."""

FLUSH_BYTES = 1 << 26
"""The disk is set to work whenever so much has been written, so that little is left to wait for at the end."""

_TURN = threading.Lock()
"""The kernel serialises the writes to one file; this lock keeps the other threads from waiting busily for it."""


@dataclass(frozen=True)
class OutputTensor(Entry):
    """A tensor to write: `blocks` yields consecutive pieces of it when asked; `sources` names its origin.

    `copied`: the pieces are blocks of its type already, so that nothing is quantized. `importance` weighs the errors of
    its columns while it is quantized.
    """

    sources: tuple[str, ...] = ()
    blocks: Blocks = field(default=lambda: iter(()), repr=False, compare=False)
    copied: bool = field(default=False, kw_only=True)
    importance: Importance | None = field(default=None, repr=False, compare=False, kw_only=True)


class Written(NamedTuple):
    """What `write_model` did: the path of the (first) file, and how many tensors an earlier run had finished."""

    path: Path
    n_reused: int


def write_model(
    out: Path,
    files: Files,
    manifest: Mapping[str, str] | None = None,
    *,
    resume: bool = True,
    hashes: MutableMapping[str, str] | None = None,
    finish: Finish | None = None,
    threads: int | None = None,
    progress: Progress,
) -> Written:
    """Write, verify and name the files of a model: one, or a set of shards, of which all appear or none.

    Args:
        out: the name of the one file; of a set, see `list_model_paths`.
        files: the tensors and the layout of each file.
        manifest: of the job, see `moe2gguf.gguf.resume.Job`: what was stopped is continued. None: it is not.
        resume: False replaces what was stopped.
        hashes: SHA-256 of the tensors' sources by name. Making a tensor fills it in; for a tensor that is reused it is
            restored.
        finish: fills in what was not known before all tensors were made; it is called for each file.
        threads: how many tensors are worked on at once (None: the number of cores, at most 4), and how many threads
            quantize their rows and verify (None: the number of cores).
        progress: receives stages ("write", "verify") and the bytes done.

    Raises:
        OutputError: there is not enough room, the disk has an error, or the folder `OUT.partial` belongs to another job
            or another process.
        CorruptWeightError: a weight is NaN, infinite, or too large for its type.
        GGUFError: a source file ended early, or a written file did not verify.
    """
    cores = count_processors()
    size = sum(layout.file_size for _, layout in files)
    with replace_files(out, list_model_paths(out, len(files)), size, manifest, resume=resume) as (job, parts):
        with progress("write", size) as advance:
            for part, (tensors, layout) in zip(parts, files, strict=True):
                write_tensors(
                    part,
                    layout,
                    tensors,
                    threads=threads or min(cores, 4),
                    quantizers=threads or cores,
                    advance=advance,
                    job=job,
                    hashes=hashes,
                )
        for part, (_, layout) in zip(parts, files, strict=True):
            if finish:
                with open_part(part) as descriptor:
                    finish(descriptor, layout)
        # the disk still works on the files while they are read again
        with ThreadPoolExecutor(1) as background, progress("verify", size) as advance:
            flushed = background.submit(flush_files, parts)
            require_sound(parts[0], threads=threads, progress=advance)
            flushed.result()
    return Written(list_model_paths(out, len(files))[0], job.n_reused)


def write_tensors(
    path: Path,
    layout: Layout,
    tensors: Sequence[OutputTensor],
    *,
    threads: int,
    advance: Callable[[int], None] = lambda _: None,
    quantizers: int | None = None,
    job: Job | None = None,
    hashes: MutableMapping[str, str] | None = None,
) -> None:
    """Write header and tensors at the places `layout` gives them; `advance` is told the bytes as they are written.

    Each thread works on one tensor at a time, so reading, casting and writing overlap, and no more than `threads`
    tensors are in memory. Block types are quantized by `quantizers` more threads (None: as many), a few rows at a time,
    so that one large tensor keeps all cores busy too. One more thread keeps the disk working. A tensor that the `job`
    has finished is compared with its checksum, not made again. The first failure stops everything and is raised.
    """
    with (
        open_part(path, layout.file_size) as descriptor,
        ThreadPoolExecutor(1) as disk,
        ThreadPoolExecutor(quantizers or threads) as kernels,
        ThreadPoolExecutor(threads) as pool,
    ):
        write_at(descriptor, memoryview(layout.header), 0)
        advance(len(layout.header))
        writer = _Writer(descriptor, layout, advance, kernels, job, hashes)
        tasks = [pool.submit(writer.write, tensor) for tensor in tensors]
        try:
            _flush_often(disk, descriptor, tasks)
        finally:
            writer.stop.set()
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Writer:
    """Writes the tensors of one open file; `write` runs in several threads until `stop` is set."""

    descriptor: int
    layout: Layout
    advance: Callable[[int], None]
    kernels: ThreadPoolExecutor
    job: Job | None
    hashes: MutableMapping[str, str] | None
    stop: threading.Event = field(default_factory=threading.Event)

    def write(self, tensor: OutputTensor) -> int:
        """Write one tensor, or take over a finished one; returns its bytes. An error stops the other threads too."""
        try:
            if not self.stop.is_set():
                if self._reuse(tensor):
                    self.advance(tensor.n_bytes)
                else:
                    self._make(tensor)
        except BaseException:
            self.stop.set()
            raise
        return tensor.n_bytes

    def _reuse(self, tensor: OutputTensor) -> bool:
        """Take over a tensor that the job has finished if its bytes are unharmed, with the hashes of its sources.

        Without the hash of every source it must be made again, for these hashes make up the digest of the source.
        """
        piece = self.job.find(tensor.name) if self.job else None
        if not self.job or piece is None:
            return False
        known = {name: value for name, value in piece.facts.items() if _is_sha256(value)}
        if self.hashes is not None and known.keys() != {*tensor.sources}:
            return False
        offset = self.layout.offsets[tensor.name]
        if not self.job.confirm(tensor.name, checksum_range(self.descriptor, offset, tensor.n_bytes)):
            return False
        if self.hashes is not None:
            self.hashes.update(known)
        return True

    def _make(self, tensor: OutputTensor) -> None:
        """Make, encode and write the tensor, piece by piece; the job is told when it is complete."""
        offset = position = self.layout.offsets[tensor.name]
        checksum = xxhash.xxh3_128()
        for data in self._encode(tensor):
            if self.stop.is_set():
                return
            with _TURN:
                write_at(self.descriptor, data, position)
            checksum.update(data)
            position += len(data)
            self.advance(len(data))
        if position != offset + tensor.n_bytes:
            raise GGUFError(f"{tensor.name}: {position - offset} bytes were made, the plan says {tensor.n_bytes}")
        if self.job:
            hashes = {} if self.hashes is None else {source: self.hashes[source] for source in tensor.sources}
            self.job.record(tensor.name, checksum.hexdigest(), hashes)

    def _encode(self, tensor: OutputTensor) -> Iterator[memoryview]:
        label = f"{tensor.name} (from {list_names(tensor.sources)})" if tensor.sources else tensor.name
        matrices = tensor.importance() if tensor.importance and tensor.type not in types.FLOATS else None
        row = 0
        for block in check_blocks(tensor):
            yield from _encode_block(block, tensor.type, label, self.kernels, _Weights(matrices, tensor.shape, row))
            row += block.size // max(block.shape[-1], 1)


def check_blocks(tensor: OutputTensor) -> Iterator[NDArray[np.generic]]:
    """Yield the pieces of a tensor, of which those of numbers are finite.

    Raises:
        CorruptWeightError: a number is NaN or infinite.
    """
    row = 0
    for block in tensor.blocks():
        if block.dtype != np.uint8 and not types.is_finite(block):
            raise _describe_corruption(tensor, block, row)
        yield block
        row += block.size // max(block.shape[-1], 1)


def _describe_corruption(tensor: OutputTensor, block: NDArray[np.generic], first_row: int) -> CorruptWeightError:
    """Say where in the tensor the first bad number of a `block` stands, which begins at a row, and its origin."""
    place = first_row * block.shape[-1] + int(np.argmin(np.isfinite(block.astype(np.float32))))
    index, sources = [int(i) for i in np.unravel_index(place, tensor.shape)], tensor.sources
    name = tensor.name
    if len(index) == 3:
        expert = index.pop(0)
        name = f"{name}, expert {expert}"
        sources = sources[expert : expert + 1] if len(sources) == tensor.shape[0] else sources
    origin = f" (from {list_names(sources)})" if sources else ""
    return CorruptWeightError(f"{name}{origin}: NaN or infinity at {index}; fetch a sound copy of the checkpoint")


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _flush_often(disk: ThreadPoolExecutor, descriptor: int, tasks: Sequence[Future[int]]) -> None:
    """Wait for the `tasks`, each of which returns the bytes it wrote; raises the first error of them or of the disk."""
    flush, waiting = disk.submit(lambda: None), 0
    for task in as_completed(tasks):
        waiting += task.result()
        if waiting >= FLUSH_BYTES and flush.done():
            flush.result()
            flush, waiting = disk.submit(os.fsync, descriptor), 0
    flush.result()


class _Weights(NamedTuple):
    """The importance of the matrices of a tensor of this `shape`, asked from its row `first` on."""

    matrices: Sequence[NDArray[np.float32]] | None
    shape: tuple[int, ...]
    first: int

    def cut(self, n_row: int, step: int) -> Iterator[tuple[int, int, NDArray[np.float32] | None]]:
        """Yield pieces (start, stop, importance) of at most `step` rows; with an importance none spans two matrices."""
        height = self.shape[-2] if self.matrices is not None else self.first + n_row + 1
        start = 0
        while start < n_row:
            matrix, row = divmod(self.first + start, height)
            stop = min(start + step, start + height - row, n_row)
            yield start, stop, None if self.matrices is None else self.matrices[matrix]
            start = stop


def _encode_block(
    block: NDArray[np.generic], kind: TensorType, label: str, kernels: ThreadPoolExecutor, weights: _Weights
) -> Iterator[memoryview]:
    """`block` as bytes of type `kind`: at once, or for block types in pieces of rows made in parallel."""
    if kind in types.FLOATS or block.dtype == np.uint8:
        yield types.encode(block, kind, label)
        return
    rows = block.reshape(-1, block.shape[-1])
    step = max(1, PIECE // rows.shape[1])
    pieces = [(rows[i:j], importance) for i, j, importance in weights.cut(len(rows), step)]
    yield from kernels.map(lambda piece: types.encode(piece[0], kind, label, piece[1]), pieces)
