"""The file on disk: written beside its final name by several threads, checked, then renamed.

Nothing ever stands under the final name that is not complete. An error or a full disk leaves nothing; an interrupt or a
crash leaves at most `NAME.partial`, which the next run continues where it has a journal, else replaces.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from moe2gguf.errors import GGUFError, OutputError
from moe2gguf.gguf import types
from moe2gguf.gguf.file import TensorType
from moe2gguf.gguf.layout import Entry, Layout
from moe2gguf.gguf.resume import Journal, discard, discard_abandoned, lock, partial_path

Blocks = Callable[[], Iterator[NDArray[np.generic]]]

Importance = Callable[[], Sequence[NDArray[np.float32] | None]]
"""Per matrix of a tensor (one, or one per expert) the importance of its columns (width,), made when it is written."""

PIECE = 1 << 18
"""Elements that are quantized together: a fraction of a second in the slowest kernel, a megabyte of float32."""

FLUSH_BYTES = 1 << 26
"""The disk is set to work whenever so much has been written, so that little is left to wait for at the end."""

_TURN = threading.Lock()
"""A file system lets one thread at a time write to a file; the others would spend their cores on waiting for it."""


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


def check_target(target: Path, sources: Iterable[Path], *, force: bool) -> None:
    """Refuse a target that must not be replaced or cannot be written.

    Raises:
        OutputError: the target is one of the `sources` (also by link), exists and `force` is off, is no regular
            file, or its folder is missing or read-only.
    """
    if target.exists():
        if any(source.exists() and target.samefile(source) for source in sources):
            raise OutputError(f"{target}: is a file of the model itself; choose another name")
        if not stat.S_ISREG(target.stat().st_mode):
            raise OutputError(f"{target}: exists and is not a regular file; choose another name")
        if not force:
            raise OutputError(f"{target}: exists; choose another name, or replace it with --force")
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent}: no such folder; create it first")
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"{target.parent}: not writable; choose another folder")


@contextlib.contextmanager
def replacing(target: Path, file_size: int, journal: Journal | None = None) -> Iterator[tuple[int, Path]]:
    """Open `TARGET.partial` for writing (descriptor and path); give it the final name if the block succeeds.

    The data is flushed to disk before the rename. With a `journal` an unfinished file is continued, and an interrupt
    (KeyboardInterrupt, whose message then says so, or SystemExit) keeps finished tensors. Any other exception removes
    the partial file.

    Raises:
        OutputError: not enough room, a disk error, or another process is writing the same target.
    """
    partial = partial_path(target)
    require_room(partial, file_size)
    try:
        if partial.is_dir():
            discard_abandoned(partial)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise OutputError(f"{partial}: cannot be created ({error.strerror})") from error
    try:
        lock(descriptor, partial)
    except BaseException:
        os.close(descriptor)
        raise
    try:
        if journal is None or not journal.begin(whole=os.fstat(descriptor).st_size == file_size):
            os.ftruncate(descriptor, 0)
            os.ftruncate(descriptor, file_size)
        yield descriptor, partial
        os.fsync(descriptor)
        os.replace(partial, target)
        if journal:
            journal.remove()
        sync_folder(target.parent)
    except BaseException as error:
        clean_up(error, target, journal)
        raise
    finally:
        os.close(descriptor)


def clean_up(error: BaseException, target: Path, journal: Journal | None) -> None:
    """Remove what is unfinished, unless it can be continued after `error`.

    Raises:
        OutputError: in the place of an `error` of the disk.
    """
    if journal and journal.outlives(error):
        return
    discard(partial_path(target))
    if journal:
        journal.remove()
    if isinstance(error, OSError):
        raise output_error(target, error) from error


def write_tensors(
    descriptor: int,
    layout: Layout,
    tensors: Sequence[OutputTensor],
    *,
    threads: int,
    advance: Callable[[int], None],
    quantizers: int | None = None,
    journal: Journal | None = None,
) -> None:
    """Write header and tensors at the places `layout` gives them; `advance` is told the bytes as they are written.

    Each thread works on one tensor at a time, so reading, casting and writing overlap, and no more than `threads`
    tensors are in memory. Block types are quantized by `quantizers` more threads (None: as many), a few rows at a time,
    so that one large tensor keeps all cores busy too. One more thread keeps the disk working. What the `journal` holds
    is checked, not made again. The first failure stops everything and is raised.
    """
    _write_at(descriptor, memoryview(layout.header), 0)
    advance(len(layout.header))
    stop = threading.Event()
    with (
        ThreadPoolExecutor(1) as disk,
        ThreadPoolExecutor(quantizers or threads) as kernels,
        ThreadPoolExecutor(threads) as pool,
    ):

        def write(tensor: OutputTensor) -> int:
            try:
                if not stop.is_set():
                    _write_tensor(descriptor, layout.offsets[tensor.name], tensor, advance, stop, kernels, journal)
            except BaseException:
                stop.set()
                raise
            return tensor.n_bytes

        jobs = [pool.submit(write, tensor) for tensor in tensors]
        try:
            _flush_often(disk, descriptor, jobs)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _flush_often(disk: ThreadPoolExecutor, descriptor: int, jobs: Sequence[Future[int]]) -> None:
    """Wait for the `jobs`, each of which returns the bytes it wrote; raises the first error of them or of the disk."""
    flush, waiting = disk.submit(lambda: None), 0
    for job in as_completed(jobs):
        waiting += job.result()
        if waiting >= FLUSH_BYTES and flush.done():
            flush.result()
            flush, waiting = disk.submit(os.fsync, descriptor), 0
    flush.result()


def write_over(descriptor: int, data: bytes, offset: int) -> None:
    """Write `data` at `offset`, over a placeholder of the same length."""
    _write_at(descriptor, memoryview(data), offset)


def _write_tensor(
    descriptor: int,
    offset: int,
    tensor: OutputTensor,
    advance: Callable[[int], None],
    stop: threading.Event,
    kernels: ThreadPoolExecutor,
    journal: Journal | None,
) -> None:
    if journal and journal.holds(descriptor, offset, tensor.name, tensor.n_bytes, tensor.sources):
        advance(tensor.n_bytes)
        return
    position, checksum = offset, xxhash.xxh3_128()
    label = f"{tensor.name} (from {', '.join(tensor.sources)})" if tensor.sources else tensor.name
    matrices = tensor.importance() if tensor.importance and tensor.type not in types.FLOATS else None
    row = 0
    for block in tensor.blocks():
        pieces = _encoded(block, tensor.type, label, kernels, _Weights(matrices, tensor.shape, row))
        row += block.size // max(block.shape[-1], 1)
        for data in pieces:
            if stop.is_set():
                return
            with _TURN:
                _write_at(descriptor, data, position)
            checksum.update(data)
            position += len(data)
            advance(len(data))
    if position != offset + tensor.n_bytes:
        raise GGUFError(f"{tensor.name}: {position - offset} bytes were made, the plan says {tensor.n_bytes}")
    if journal:
        journal.record(tensor.name, checksum.hexdigest(), tensor.sources)


class _Weights(NamedTuple):
    """The importance of the matrices of a tensor of this `shape`, asked from its row `first` on."""

    matrices: Sequence[NDArray[np.float32] | None] | None
    shape: tuple[int, ...]
    first: int

    def cut(self, n_row: int, step: int) -> Iterator[tuple[int, int, NDArray[np.float32] | None]]:
        """Pieces (start, stop, importance) of at most `step` rows; with an importance none spans two matrices."""
        height = self.shape[-2] if self.matrices is not None else self.first + n_row + 1
        start = 0
        while start < n_row:
            matrix, row = divmod(self.first + start, height)
            stop = min(start + step, start + height - row, n_row)
            yield start, stop, None if self.matrices is None else self.matrices[matrix]
            start = stop


def _encoded(
    block: NDArray[np.generic], kind: TensorType, label: str, kernels: ThreadPoolExecutor, weights: _Weights
) -> Iterator[memoryview]:
    """`block` as bytes of type `kind`: at once, or for block types in pieces of rows made in parallel."""
    if kind in types.FLOATS or block.dtype == np.uint8:
        yield types.encode(block, kind, label)
        return
    types.require_finite(block, label)
    rows = block.reshape(-1, block.shape[-1])
    step = max(1, PIECE // rows.shape[1])
    pieces = [(rows[i:j], importance) for i, j, importance in weights.cut(len(rows), step)]
    yield from kernels.map(lambda piece: types.encode(piece[0], kind, label, piece[1]), pieces)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def require_room(partial: Path, file_size: int) -> None:
    """Raise OutputError unless the file fits, in the free room and in what an unfinished one has taken already."""
    taken = sum(path.lstat().st_blocks for path in (partial, *partial.glob("*"))) * 512 if partial.exists() else 0
    free = shutil.disk_usage(partial.parent).free + taken
    if free < file_size:
        raise OutputError(f"{partial.parent}: {free:,} bytes are free, the file needs {file_size:,}; make room first")


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where folders can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def output_error(target: Path, error: OSError) -> OutputError:
    """What a disk error means, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(f"{target}: no room left while writing ({error.strerror}); nothing was kept")
    return OutputError(f"{target}: cannot be written ({error.strerror or error}); nothing was kept")
