"""What differs between systems: processors, opening without following links, bytes at a place, names, locks of folders.

Windows has no lock that a folder could hold, and no way to read or write at a place without moving the file's position:
there two processes on one folder are the user's care, and threads take turns.
"""

import contextlib
import errno
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from moe2gguf.errors import LeftBehindWarning, OutputError

_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_turn = threading.Lock()


def open_here(path: Path, flags: int) -> int:
    """A descriptor of the file, as bytes, for these flags of `os.open`. Raises OSError for a link, but on Windows."""
    return os.open(path, flags | _FLAGS, 0o666)


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` with the bytes from `offset` on, as far as there are any; how many there were."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    with _turn:
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` from `offset` on."""
    while data:
        if hasattr(os, "pwrite"):
            count = os.pwrite(descriptor, data, offset)
        else:
            with _turn:
                os.lseek(descriptor, offset, os.SEEK_SET)
                count = os.write(descriptor, data)
        data, offset = data[count:], offset + count


def count_processors() -> int:
    """Return how many processors this process may use: psutil knows it where the system does."""
    try:
        import psutil

        return len(psutil.Process().cpu_affinity())
    except (ImportError, AttributeError):  # macOS has no such limit
        return os.cpu_count() or 1


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder as far as folders can be opened. Raises OSError."""
    is_folder, is_unix = path.is_dir(), hasattr(os, "O_DIRECTORY")
    try:
        # Windows flushes only what may be written
        descriptor = open_here(path, os.O_RDONLY if is_folder or is_unix else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not is_folder:
            raise


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The numbers of errors that mean a full disk."""


def disk_bytes(path: Path) -> int:
    """The bytes of the disk that a file takes, or on Windows those of the file."""
    status = path.lstat()
    return int(status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size)


@contextlib.contextmanager
def temporary_folder(beside: Path | None = None) -> Iterator[Path]:
    """A folder that goes again, beside a file or where the system has such. Raises OutputError if none can be made."""
    try:
        # what cannot be removed in the end must not hide the error that the block had
        made = tempfile.TemporaryDirectory(
            prefix=f"{'.' if beside else ''}moe2gguf-", dir=beside and beside.parent, ignore_cleanup_errors=True
        )
    except OSError as error:
        where, way = (f"{beside.parent}: ", "make room") if beside else ("", "set TMPDIR to a folder with room")
        raise OutputError(f"{where}no temporary folder can be made ({error.strerror}); {way}") from error
    with made as folder:
        yield Path(folder)


def link_or_copy(source: Path, target: Path) -> bool:
    """Give a file a second name, in place of what is there; True for a link, False for a copy where links fail.

    Raises OSError as `shutil.copyfile` does.
    """
    target.unlink(missing_ok=True)
    way = os.path.relpath(os.path.realpath(source), os.path.realpath(target.parent))
    for link, origin in ((os.link, source), (os.symlink, way)):
        with contextlib.suppress(OSError):  # another file system, or one without links
            link(origin, target)
            return True
    try:
        shutil.copyfile(source, target)
        sync(target)
    except OSError:
        target.unlink(missing_ok=True)
        raise
    return False


def discard(path: Path) -> None:
    """Remove a file or a folder, if there is one; a link, but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def clear_away(folder: Path) -> None:
    """Remove a folder that is no longer needed; a failure is a warning, as what was made is there all the same."""
    discard(folder)
    if os.path.lexists(folder):
        warnings.warn(f"{folder}: cannot be removed, and is not needed any more", LeftBehindWarning, stacklevel=2)


def open_locked(folder: Path) -> int:
    """A descriptor of the folder, made if there is none; no other process has the lock that it holds.

    The lock is given back when the descriptor is closed or the process ends.

    Raises:
        OutputError: it cannot be made, or another process uses it.
    """
    try:
        folder.mkdir(exist_ok=True)
        directory = getattr(os, "O_DIRECTORY", None)  # Windows opens no folder
        place = Path(os.devnull) if directory is None else folder
        descriptor = open_here(place, os.O_RDONLY | (directory or 0))
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be created ({error.strerror}); remove what is in the way, or choose another place"
        ) from error
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, descriptor)
        _lock(descriptor, folder)
        undo.pop_all()
    return descriptor


def _lock(descriptor: int, folder: Path) -> None:
    """Take the lock of a folder, where there are locks.

    Raises:
        OutputError: another process has the lock, or has just removed the folder.
    """
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(f"{folder}: another process is writing it; wait for it, or choose another name") from error
    except OSError:  # a file system without locks
        return
    if not folder.is_dir() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
        raise OutputError(f"{folder}: another process has just finished there; repeat the command")
