"""How every long job is stopped and continued: a folder of its own, a manifest, and finished pieces with checksums.

The folder has everything that is unfinished. Its `job.jsonl` has the manifest (every choice and input that decides the
result) and then a line per finished piece with the checksum of its bytes. The journal is not trusted: every piece is
read and hashed again before it is reused, and a piece that differs is made anew.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from moe2gguf.errors import OutputError
from moe2gguf.gguf import kernels
from moe2gguf.gguf.file import TensorType
from moe2gguf.gguf.system import NO_ROOM, clear_away, discard, open_here, open_locked, read_at, sync
from moe2gguf.gguf.types import FLOATS

MAX_BYTES = 64 << 20
"""Of a journal that is read."""

PLAN = "plan"
"""The entry of a manifest that follows from the others: it is named only where no other one differs."""

_JOURNAL = "job.jsonl"
_BLOCK = 1 << 20
_HEAD = 64  # bytes that show whether a file is a journal


class Interrupted(KeyboardInterrupt):
    """A job was interrupted, and its message tells where it can be continued."""


@dataclass(frozen=True)
class Piece:
    """A finished piece of work: the XXH3-128 of its bytes (hexadecimal), and what else is to be remembered of it."""

    checksum: str
    facts: Mapping[str, Any] = field(default_factory=dict)


class Journal:
    """A file of JSON lines: the manifest of a job, if it has one, and its finished pieces by name.

    Lines are appended whole. A line that is torn, hostile or of another program is passed over. Of two lines of one
    name the last one counts.

    Raises:
        OutputError: the file exists and cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Mapping[str, str] | None = None
        self.pieces: dict[str, Piece] = {}
        self._used: set[str] = set()  # the facts that this process recorded or found
        self._lock = threading.Lock()
        for entry in _read_lines(path):
            match entry:
                case {"job": dict(manifest)} if all(isinstance(value, str) for value in manifest.values()):
                    self.manifest = manifest
                case {"piece": str(name), "xxh3": str(checksum), "facts": dict(facts)}:
                    self.pieces.pop(name, None)  # the order is that of the last lines
                    self.pieces[name] = Piece(checksum, facts)

    def require_own(self) -> None:
        """Raise OutputError where the file is another one than a journal, and would be harmed by lines at its end."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            head = file.read(_HEAD).lstrip()
        if head and not any(own.startswith(head) or head.startswith(own) for own in (b'{"job"', b'{"piece"')):
            raise OutputError(f"{self.path}: exists and is no journal of moe2gguf; choose another name")

    def begin(self, manifest: Mapping[str, str]) -> None:
        """Start anew with this manifest; what the file had is gone."""
        self.pieces.clear()
        self.manifest = manifest
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self._append({"job": dict(manifest)}, durable=True)

    def record(self, name: str, piece: Piece, *, durable: bool = False) -> None:
        """Add a finished piece; `durable`: its line is on the disk when this returns."""
        with self._lock:
            self.pieces.pop(name, None)
            self.pieces[name] = piece
            self._append({"piece": name, "xxh3": piece.checksum, "facts": dict(piece.facts)}, durable=durable)

    def record_facts(self, name: str, facts: Mapping[str, Any]) -> None:
        """Add a piece that is nothing but JSON-ready facts; the line is on the disk when this returns."""
        self.record(name, Piece(_checksum_facts(facts), facts), durable=True)
        self._used.add(name)

    def find_facts(self, name: str) -> Mapping[str, Any] | None:
        """The facts of a piece of `record_facts`; None where there are none, or others than were recorded."""
        piece = self.pieces.get(name)
        if piece is None or piece.checksum != _checksum_facts(piece.facts):
            return None
        self._used.add(name)
        return piece.facts

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Turn an interrupt of the block into `Interrupted`, with the place of the facts that it recorded or found."""
        try:
            yield
        except Interrupted:
            raise
        except KeyboardInterrupt as error:
            if self._used:
                raise Interrupted(_describe_kept(self.path, len(self._used))) from error
            raise

    def _append(self, entry: Mapping[str, Any], *, durable: bool) -> None:
        line = "\n" + json.dumps(entry, ensure_ascii=False)  # a line that a kill has torn ends before this one
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            with open(open_here(self.path, flags), "ab") as file:
                file.write(line.encode("utf-8", "surrogatepass"))
                file.flush()
                if durable:
                    os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror}); choose another place") from error


class Job:
    """A long job with its folder; use it in a `with` statement, which holds the lock of the folder.

    folder    holds everything unfinished; its parent exists
    manifest  every choice and input that decides the result, by the name that a user knows it by
    resume    False: start anew, whatever the folder holds

    Work of the same job is continued. After an interrupt with finished pieces the `with` statement raises `Interrupted`
    with the place where they are. A folder without any finished piece is removed after an error.

    Raises:
        OutputError: the folder holds another job's work (every difference is named) or no work at all, another process
            uses it, or it cannot be written, in the `with` statement too.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, str], *, resume: bool = True) -> None:
        self.folder = folder
        self.n_reused = 0
        self._manifest = {**manifest, "moe2gguf": version("moe2gguf")}
        self._resume = resume
        self._lock = threading.Lock()

    def __enter__(self) -> Job:
        self._descriptor = open_locked(self.folder)
        try:
            self._journal = self._continue_or_begin()
        except BaseException as error:
            os.close(self._descriptor)
            if isinstance(error, OSError):
                raise self._explain(error) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not self.n_finished and not isinstance(error, Interrupted):  # it keeps a job in this
            self.remove()
        os.close(self._descriptor)
        if isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted) and self.n_finished:
            raise Interrupted(_describe_kept(self.folder, self.n_finished)) from error
        if isinstance(error, OSError) and _is_about(error, self.folder):
            raise self._explain(error) from error

    def _explain(self, error: OSError) -> OutputError:
        place = error.filename if isinstance(error.filename, str) else self.folder
        return OutputError(
            f"{place}: cannot be used ({error.strerror or error}); remove what is in the way, or make room, then "
            "repeat the command: it goes on with what is finished"
        )

    @property
    def n_finished(self) -> int:
        """Number of pieces that are finished."""
        return len(self._journal.pieces)

    def find(self, name: str) -> Piece | None:
        """The finished piece of this name, as the journal has it: its bytes are not compared."""
        return self._journal.pieces.get(name)

    def confirm(self, name: str, checksum: str) -> bool:
        """Whether the piece `name` is finished and has this `checksum` today; if not, it is forgotten."""
        piece = self.find(name)
        with self._lock:
            if piece is None or piece.checksum != checksum:
                self._journal.pieces.pop(name, None)
                return False
            self.n_reused += 1
        return True

    def record(self, name: str, checksum: str, facts: Mapping[str, Any] | None = None) -> None:
        """Note that the piece `name` is finished: the XXH3-128 of its bytes, and JSON-ready facts to remember."""
        self._journal.record(name, Piece(checksum, facts or {}))

    @contextlib.contextmanager
    def save(self, name: str, facts: Mapping[str, Any] | None = None) -> Iterator[Path]:
        """Make the file or folder `name` of the job as a finished piece: the block writes to the path that it gets.

        It is flushed to the disk, renamed and recorded. The path keeps the ending of `name`.

        Raises:
            OutputError: the disk has an error or no room.
        """
        target = self.folder / name
        unfinished = target.with_name(f"unfinished-{target.name}")
        discard(unfinished)
        try:
            yield unfinished
            checksum = checksum_path(unfinished, flush=True)
            discard(target)
            unfinished.replace(target)
        except OSError as error:
            discard(unfinished)
            raise OutputError(
                f"{target}: cannot be written ({error.strerror or error}); make room, then repeat the command: it goes "
                "on with what is finished"
            ) from error
        self._journal.record(name, Piece(checksum, facts or {}), durable=True)

    def holds(self, name: str) -> bool:
        """Whether the file or folder `name` is a finished piece and unharmed."""
        target = self.folder / name
        return self.find(name) is not None and target.exists() and self.confirm(name, checksum_path(target))

    def last(self, pattern: str) -> str | None:
        """The name of the newest file or folder that matches the regular expression and is finished and unharmed."""
        names = [name for name in reversed(self._journal.pieces) if re.fullmatch(pattern, name)]
        return next((name for name in names if self.holds(name)), None)

    def drop(self, name: str) -> None:
        """Remove a file or folder that is no longer needed."""
        self._journal.pieces.pop(name, None)
        discard(self.folder / name)

    def drop_others(self, pattern: str, kept: str) -> None:
        """Remove the files and folders that match the regular expression, except one."""
        for name in [name for name in self._journal.pieces if re.fullmatch(pattern, name) and name != kept]:
            self.drop(name)

    def remove(self) -> None:
        """The job is complete, or given up: remove the folder."""
        self._journal.pieces.clear()
        clear_away(self.folder)

    def _continue_or_begin(self) -> Journal:
        """The journal of this job in the folder, with what is finished, or an empty one in an empty folder."""
        path = self.folder / _JOURNAL
        if not path.is_symlink() and not path.is_file() and any(self.folder.iterdir()):
            raise OutputError(f"{self.folder}: is in the way, and holds no unfinished work; remove it, or rename it")
        journal = Journal(path)
        if self._resume and journal.manifest is not None:
            if differences := _differences(journal.manifest, self._manifest):
                raise OutputError(
                    "\n".join(
                        [
                            f"{self.folder}: holds the unfinished work of another job:",
                            *(f"  - {line}" for line in differences),
                            "repeat that job to finish it, or start anew with --no-resume",
                        ]
                    )
                )
            for left in self.folder.glob("unfinished-*"):
                discard(left)
            return journal
        for left in self.folder.iterdir():
            discard(left)
        try:
            journal.begin(self._manifest)
        except BaseException:
            discard(self.folder)
            raise
        return journal


def describe_record(record: Any) -> dict[str, str]:
    """The fields of a dataclass for a manifest, by name; those of dataclasses in it likewise."""
    described: dict[str, str] = {}
    for one in fields(record):
        value = getattr(record, one.name)
        described |= describe_record(value) if is_dataclass(value) else {one.name.replace("_", " "): describe(value)}
    return described


def describe(value: Any) -> str:
    """A value for a manifest: nothing for None, and of a file its name, size and time of change, without its folder."""
    if not isinstance(value, Path):
        return "" if value is None else str(value)
    status = value.stat()
    return f"{value.name} of {status.st_size:,} bytes, changed {status.st_mtime_ns}"


def describe_job(
    command: str, options: Any, files: Iterable[Path], header: bytes, kinds: Iterable[TensorType]
) -> dict[str, str]:
    """The manifest of a job that writes GGUF files: options (a dataclass), input files, and the output's header.

    The types `kinds` that are written decide whether the build of llama.cpp's kernels matters.
    """
    return {
        "command": command,
        **describe_record(options),
        **{file.name: describe(file) for file in files},
        **({} if FLOATS.keys() >= {*kinds} else {"llama.cpp": kernels.build()}),
        PLAN: hashlib.sha256(header).hexdigest(),
    }


def checksum_range(descriptor: int, offset: int, n_bytes: int) -> str:
    """XXH3-128 of `n_bytes` bytes of an open file from `offset` on, or of those that there are."""
    found, buffer = xxhash.xxh3_128(), bytearray(_BLOCK)
    for at in range(offset, offset + n_bytes, _BLOCK):
        piece = memoryview(buffer)[: offset + n_bytes - at]
        found.update(piece[: read_at(descriptor, piece, at)])
    return found.hexdigest()


def checksum_path(path: Path, *, flush: bool = False) -> str:
    """XXH3-128 of a file, or of the names and contents of all files in a folder; `flush`: they are on the disk then."""
    if not path.is_dir():
        if flush:
            sync(path)
        descriptor = open_here(path, os.O_RDONLY)
        try:
            return checksum_range(descriptor, 0, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)
    files = sorted(file for file in path.rglob("*") if not file.is_dir())
    parts = [f"{file.relative_to(path)} {checksum_path(file, flush=flush)}\n" for file in files]
    return xxhash.xxh3_128("".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _read_lines(path: Path) -> Iterator[Any]:
    """What each line of a journal says; nothing where there is no file, and no line that is not JSON."""
    try:
        with open(open_here(path, os.O_RDONLY), "rb") as file:
            lines = file.read(MAX_BYTES).splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        if path.is_symlink():
            return
        raise OutputError(f"{path}: cannot be read ({error.strerror}); choose another place") from error
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            yield json.loads(line)


def _checksum_facts(facts: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _describe_kept(place: Path, n: int) -> str:
    return f"{place} keeps what is finished ({n} piece{'s'[: n > 1]}); the same command goes on there"


def _is_about(error: OSError, folder: Path) -> bool:
    """Whether a disk was full, read-only or broken, or a file of the folder was the matter."""
    if error.errno in (*NO_ROOM, errno.EROFS, errno.EIO):
        return True
    return isinstance(error.filename, str) and folder.absolute() in Path(error.filename).absolute().parents


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What tells two jobs apart; their plans, which follow from the rest, only where the rest is the same."""
    found = {key: (before.get(key), now.get(key)) for key in dict.fromkeys([*now, *before])}
    differing = {key: pair for key, pair in found.items() if pair[0] != pair[1]}
    shown = {key: pair for key, pair in differing.items() if key != PLAN} or differing
    return [f"{key}: {old or 'none'} there, {new or 'none'} now" for key, (old, new) in shown.items()]
