"""The file on disk: written beside its final name by several threads, checked, then renamed.

Nothing ever stands under the final name that is not complete: a crash, a full disk or an interrupt leaves at most
`NAME.partial`, which the next run replaces.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import GGUFError, OutputError
from moe2gguf.export import types
from moe2gguf.export.layout import Entry, Layout
from moe2gguf.export.reader import TensorType

Blocks = Callable[[], Iterator[NDArray[np.generic]]]

PIECE = 1 << 18
"""Elements that are quantized together: a fraction of a second in the slowest kernel, a megabyte of float32."""


@dataclass(frozen=True)
class OutputTensor(Entry):
    """A tensor to write: `blocks` yields consecutive pieces of it when asked; `sources` names its origin."""

    sources: tuple[str, ...] = ()
    blocks: Blocks = field(default=lambda: iter(()), repr=False, compare=False)


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
def replacing(target: Path, file_size: int) -> Iterator[tuple[int, Path]]:
    """Open `TARGET.partial` for writing (descriptor and path); give it the final name if the block succeeds.

    The data is flushed to disk before the rename. On any exception the partial file is removed.

    Raises:
        OutputError: not enough room, a disk error, or another process is writing the same target.
    """
    partial = target.with_name(target.name + ".partial")
    _require_room(target.parent, file_size)
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise OutputError(f"{partial}: cannot be created ({error.strerror})") from error
    try:
        _lock(descriptor, partial)
    except BaseException:
        os.close(descriptor)
        raise
    try:
        os.ftruncate(descriptor, 0)
        os.ftruncate(descriptor, file_size)
        yield descriptor, partial
        os.fsync(descriptor)
        os.replace(partial, target)
        _sync_folder(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise _output_error(target, error) from error
        raise
    finally:
        os.close(descriptor)


def write_tensors(
    descriptor: int,
    layout: Layout,
    tensors: Sequence[OutputTensor],
    *,
    threads: int,
    advance: Callable[[int], None],
    quantizers: int | None = None,
) -> None:
    """Write header and tensors at the places `layout` gives them; `advance` is told the bytes as they are written.

    Each thread works on one tensor at a time, so reading, casting and writing overlap, and no more than `threads`
    tensors are in memory. Block types are quantized by `quantizers` more threads (None: as many), a few rows at a time,
    so that one large tensor keeps all cores busy too. The first failure stops everything and is raised.
    """
    _write_at(descriptor, memoryview(layout.header), 0)
    advance(len(layout.header))
    stop = threading.Event()
    with ThreadPoolExecutor(quantizers or threads) as kernels, ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(_write_tensor, descriptor, layout.offsets[t.name], t, advance, stop, kernels) for t in tensors
        ]
        try:
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            for job in done:
                job.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def write_text(descriptor: int, text: str, offset: int) -> None:
    """Write `text` at `offset`, over a placeholder of the same length."""
    _write_at(descriptor, memoryview(text.encode()), offset)


def _write_tensor(
    descriptor: int,
    offset: int,
    tensor: OutputTensor,
    advance: Callable[[int], None],
    stop: threading.Event,
    kernels: ThreadPoolExecutor,
) -> None:
    position = offset
    label = f"{tensor.name} (from {', '.join(tensor.sources)})" if tensor.sources else tensor.name
    for block in tensor.blocks():
        for data in _encoded(block, tensor.type, label, kernels):
            if stop.is_set():
                return
            _write_at(descriptor, data, position)
            position += len(data)
            advance(len(data))
    if position != offset + tensor.n_bytes:
        raise GGUFError(f"{tensor.name}: {position - offset} bytes were made, the plan says {tensor.n_bytes}")


def _encoded(
    block: NDArray[np.generic], kind: TensorType, label: str, kernels: ThreadPoolExecutor
) -> Iterator[memoryview]:
    """`block` as bytes of type `kind`: at once, or for block types in pieces of rows made in parallel."""
    if kind in types.FLOATS or block.dtype == np.uint8:
        yield types.encode(block, kind, label)
        return
    types.require_finite(block, label)
    rows = block.reshape(-1, block.shape[-1])
    step = max(1, PIECE // rows.shape[1])
    pieces = [rows[i : i + step] for i in range(0, len(rows), step)]
    yield from kernels.map(lambda piece: types.encode(piece, kind, label), pieces)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _require_room(folder: Path, file_size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < file_size:
        raise OutputError(f"{folder}: {free:,} bytes are free, the file needs {file_size:,}; make room first")


def _lock(descriptor: int, partial: Path) -> None:
    """One writer per target; the lock dies with the process."""
    try:
        import fcntl
    except ImportError:  # Windows: two writers of one target are the user's care
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(f"{partial}: another process is writing it; wait for it, or choose another name") from error
    except OSError:  # a file system without locks
        return


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where folders can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _output_error(target: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(f"{target}: no room left while writing ({error.strerror}); nothing was kept")
    return OutputError(f"{target}: cannot be written ({error.strerror or error}); nothing was kept")
