"""Which tensors of an unfinished file, or set of files, are complete, so that a stopped job goes on where it was.

Beside `NAME.partial`, a file or the folder of a set, lies `NAME.partial.jsonl`: first the job (everything that decides
the bytes), then one line per finished tensor with the checksum of its bytes. Nothing is believed on the word of the
journal: a tensor's bytes are read again and must have that checksum, or the tensor is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import xxhash

from moe2gguf.errors import OutputError
from moe2gguf.gguf import kernels
from moe2gguf.gguf.file import TensorType
from moe2gguf.gguf.types import FLOATS

MAX_BYTES = 64 << 20
PLAN = "plan"
_PIECE = 1 << 20
_SHA256 = re.compile("[0-9a-f]{64}")


def partial_path(target: Path) -> Path:
    """Where a file, or a set of them, is written until it is complete."""
    return target.with_name(target.name + ".partial")


def discard(partial: Path) -> None:
    """Remove an unfinished file or folder, if there is one; a link, but not what it leads to."""
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            partial.unlink()


def lock(descriptor: int, partial: Path) -> None:
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


def discard_abandoned(partial: Path) -> None:
    """`discard` what another kind of job (a file, a set) has left; raises OutputError while that job still runs."""
    descriptor = os.open(partial, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        lock(descriptor, partial)
        discard(partial)
    finally:
        os.close(descriptor)


def describe_job(
    command: str, options: Any, files: Iterable[Path], header: bytes, kinds: Iterable[TensorType]
) -> dict[str, str]:
    """A job for a `Journal`: the fields of a dataclass of options, the input files, the output's header and types.

    Files, those among the options too, count as the same while they have the same name, size and time of change; paths
    are left out.
    """
    return {
        "command": command,
        **{field.name.replace("_", " "): _described(getattr(options, field.name)) for field in fields(options)},
        **{file.name: _described(file) for file in files},
        **({} if FLOATS.keys() >= {*kinds} else {"llama.cpp": kernels.build()}),
        PLAN: hashlib.sha256(header).hexdigest(),
    }


def _described(value: Any) -> str:
    """An option (nothing for None), or a file without its folder."""
    if not isinstance(value, Path):
        return "" if value is None else str(value)
    stat = value.stat()
    return f"{value.name} of {stat.st_size:,} bytes, changed {stat.st_mtime_ns}"


@dataclass(frozen=True)
class _Entry:
    """A finished tensor: XXH3 of its bytes, and SHA-256 of each source it was made from."""

    checksum: str
    sources: Mapping[str, str]


class Journal:
    """The journal of the file, or set of files, that becomes `target`.

    job     every choice and input that decides the bytes, by the name that a user knows it by
    hashes  SHA-256 of the sources by name, filled while they are read: remembered, and restored for what is reused
    resume  False: whatever is there is replaced

    Raises:
        OutputError: there is an unfinished file of another job; every difference is named.
    """

    def __init__(
        self,
        target: Path,
        job: Mapping[str, str],
        hashes: MutableMapping[str, str] | None = None,
        *,
        resume: bool = True,
    ) -> None:
        self.partial = partial_path(target)
        self.path = self.partial.with_name(self.partial.name + ".jsonl")
        self.reused = 0
        self._job = dict(job)
        self._hashes = hashes
        self._lock = threading.Lock()
        self._done: dict[str, _Entry] = {}
        self._known = self._read() if resume and self.partial.exists() else None
        if self._known is not None and (differences := _differences(self._known, self._job)):
            raise OutputError(
                "\n".join(
                    [
                        f"{self.partial}: is the unfinished file of another job:",
                        *(f"  - {line}" for line in differences),
                        "repeat that job to finish it, or start anew with --no-resume",
                    ]
                )
            )

    @property
    def done(self) -> int:
        """Number of tensors that are finished."""
        return len(self._done)

    def begin(self, *, whole: bool = True) -> bool:
        """Start: True where the partial file (`whole`: of the size to come) is continued, False where it is to empty.

        The caller holds the lock of the partial file.
        """
        if self._known is not None and whole:
            return True
        self._done.clear()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self._append({"job": self._job})
        return False

    def holds(self, descriptor: int, offset: int, name: str, n_bytes: int, sources: Sequence[str]) -> bool:
        """Whether the tensor `name` stands complete and unharmed at `offset`."""
        entry = self._done.get(name)
        if entry is None or (self._hashes is not None and entry.sources.keys() != {*sources}):
            return False
        found, buffer = xxhash.xxh3_128(), bytearray(_PIECE)
        for at in range(offset, offset + n_bytes, _PIECE):
            piece = memoryview(buffer)[: offset + n_bytes - at]
            found.update(piece[: os.preadv(descriptor, [piece], at)])
        with self._lock:
            if found.hexdigest() != entry.checksum:
                del self._done[name]
                return False
            if self._hashes is not None:
                self._hashes.update(entry.sources)
            self.reused += 1
        return True

    def record(self, name: str, checksum: str, sources: Sequence[str]) -> None:
        """Note that the tensor `name` is complete, with `checksum` (XXH3-128, hexadecimal) over its bytes."""
        hashes = {} if self._hashes is None else {source: self._hashes[source] for source in sources}
        with self._lock:
            self._done[name] = _Entry(checksum, hashes)
            self._append({"tensor": name, "xxh3": checksum, "sources": hashes})

    def outlives(self, error: BaseException) -> bool:
        """Whether finished tensors are to be kept after `error`: after an interrupt, whose message then says so."""
        kept = self.done > 0 and isinstance(error, (KeyboardInterrupt, SystemExit))
        if kept and isinstance(error, KeyboardInterrupt):
            error.args = (f"{self.partial} keeps {self.done} finished tensors; the same command goes on there",)
        return kept

    def remove(self) -> None:
        """The file is complete, or given up."""
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _append(self, line: Mapping[str, Any]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        with open(os.open(self.path, flags, 0o666), "ab") as file:
            file.write(("\n" + json.dumps(line)).encode())  # a line that a kill has torn ends here

    def _read(self) -> dict[str, str] | None:
        """The job that the journal belongs to (None: there is no usable journal); takes over its tensors."""
        try:
            with self.path.open("rb") as file:
                lines = file.read(MAX_BYTES).splitlines()
        except OSError:
            return None
        entries = [_parsed(line) for line in lines]
        for entry in entries:
            match entry:
                case {"tensor": str(name), "xxh3": str(checksum), "sources": dict(sources)}:
                    if all(isinstance(value, str) and _SHA256.fullmatch(value) for value in sources.values()):
                        self._done[name] = _Entry(checksum, sources)
        return next((entry["job"] for entry in entries if _is_job(entry)), None)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_job(entry: Any) -> bool:
    job = entry.get("job") if isinstance(entry, dict) else None
    return isinstance(job, dict) and all(isinstance(value, str) for value in job.values())


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What distinguishes two jobs; their plans, which follow from the rest, only where the rest is the same."""
    found = {key: (before.get(key), now.get(key)) for key in dict.fromkeys([*now, *before])}
    differing = {key: pair for key, pair in found.items() if pair[0] != pair[1]}
    shown = {key: pair for key, pair in differing.items() if key != PLAN} or differing
    return [f"{key}: {old or 'none'} there, {new or 'none'} now" for key, (old, new) in shown.items()]
