"""The rule for every output: it is no file that is read, and it replaces a file only where that is wanted."""

import contextlib
import os
import re
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path

from moe2gguf.errors import OutputError
from moe2gguf.gguf.shards import list_shard_paths
from moe2gguf.gguf.system import NO_ROOM, disk_bytes, sync

_UNFINISHED = ("", ".partial", ".work")
"""Endings of the names that are written to before an output has its own."""

_SHARD = re.compile(r"(.+)-\d{5,}-of-\d{5,}\.gguf", re.DOTALL)


def check_outputs(
    outputs: Mapping[str, Path], inputs: Iterable[Path], *, force: bool, may_exist: Container[str] = ()
) -> None:
    """Refuse outputs that are inputs, that are each other, or that exist and must not be replaced.

    Args:
        outputs: the files or folders to write, by what messages call them ("--csv rows.csv", or the name alone).
        inputs: the files and folders that are read. A folder stands for its files, a shard for its whole set.
        force: whether existing files may be replaced. Inputs never are.
        may_exist: names of outputs that are continued, not replaced; as folders they may hold inputs.

    Raises:
        OutputError: naming the output, or its folder, which is missing or read-only; links and hard links to an input
            count as the input.
    """
    for name, out in outputs.items():
        _require_name(name, out)
        if name not in may_exist:
            require_place(out.parent)
    read = {identity: file for path in inputs for file in _files(path) for identity in _identities(file)}
    for name, out in outputs.items():
        if found := _find_input(out, read, whole=name not in may_exist):
            raise OutputError(f"{name}: would replace {found}, which is read; choose another name")
        if out.exists() and not out.is_dir():
            _require_replaceable(name, out, force=force or name in may_exist)
    for (name, out), (other_name, other) in combinations(outputs.items(), 2):
        if {*_identities(out)} & {*_identities(other)}:
            raise OutputError(f"{name} and {other_name}: are the same file; choose two names")


@contextlib.contextmanager
def write_whole(target: Path) -> Iterator[Path]:
    """Yield a name to write to; it becomes `target` if the block succeeds. Raises OutputError for disk errors."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise output_error(target, error) from error
        raise


def output_error(target: Path, error: Exception) -> OutputError:
    """Return what a disk error means, in words."""
    reason = getattr(error, "strerror", None) or error
    if getattr(error, "errno", None) in NO_ROOM:
        return OutputError(f"{target}: no room left while writing ({reason}); nothing was kept")
    return OutputError(f"{target}: cannot be written ({reason}); nothing was kept")


def check_target(target: Path, sources: Iterable[Path], *, force: bool) -> None:
    """Refuse a target that must not be replaced or cannot be written.

    Raises:
        OutputError: as `check_outputs`, with `sources` as the inputs; the target is a folder, or its own folder is
            missing or read-only.
    """
    if target.is_dir():
        raise OutputError(f"{target}: exists and is not a regular file; choose another name")
    check_outputs({str(target): target}, sources, force=force)


def list_model_paths(out: Path, n_shard: int) -> list[Path]:
    """Return the names of the files of a model: `moe.gguf` alone, or moe-00001-of-00003.gguf ..."""
    return [out] if n_shard == 1 else list_shard_paths(out.with_suffix("") if out.suffix == ".gguf" else out, n_shard)


def check_model_target(out: Path, n_shard: int, sources: Iterable[Path], *, force: bool, size: int = 0) -> None:
    """`check_target` for every file of a model, of `size` bytes together; `out` must not be a folder."""
    if out.is_dir():
        raise OutputError(f"{out}: is a folder; name a file in it")
    sources = tuple(sources)
    for target in list_model_paths(out, n_shard):
        check_target(target, sources, force=force)
    require_room(out, size)


def partial_path(target: Path) -> Path:
    """The folder in which a file, or a set of them, is written until it is complete."""
    return target.with_name(target.name + ".partial")


def require_room(out: Path, size: int, begun: Iterable[Path] = (), beside: str = "") -> None:
    """Raise OutputError unless `size` bytes fit in the free room and in what unfinished work on `out` has taken.

    `begun` are the folders with that work, if not the one in which a file is written; `beside` is what else is counted.
    """
    folders = [*begun] or [partial_path(out)]
    require_place(out.parent)
    taken = sum(disk_bytes(path) for folder in folders for path in folder.rglob("*"))
    free = shutil.disk_usage(out.parent).free + taken
    if free < size:
        raise OutputError(f"{out.parent}: {free:,} bytes are free, {out.name}{beside} needs {size:,}; make room first")


def _require_name(name: str, out: Path) -> None:
    """Raise OutputError where no file can have the name, or that of an unfinished one."""
    if not out.name:
        raise OutputError(f"{name}: is a folder; choose another name")
    try:
        for ending in _UNFINISHED:
            out.with_name(out.name + ending).exists()
    except OSError as error:
        raise OutputError(f"{name}: cannot be written ({error.strerror}); choose another name") from error


def require_place(folder: Path) -> None:
    """Raise OutputError where no file can be made."""
    if not folder.is_dir():
        raise OutputError(f"{folder}: no such folder; create it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder}: not writable; choose another folder")


def make_folder(folder: Path) -> None:
    """Make a folder and those that it is in, unless they are there. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error


def _require_replaceable(name: str, out: Path, *, force: bool) -> None:
    """Raise OutputError where what exists is no regular file, or may not be replaced."""
    if not out.is_file():
        raise OutputError(f"{name}: exists and is not a regular file; choose another name")
    if not force:
        raise OutputError(f"{name}: exists; choose another name, or replace it with --force")


def _find_input(out: Path, read: Mapping[object, Path], *, whole: bool) -> Path | None:
    """The input that writing `out` would replace, if there is one; the `whole` folder, if it is one."""
    for written in _names(out):
        for identity in _identities(written):
            if identity in read:
                return read[identity]
    inside = (file for file in read.values() if whole and out.is_dir() and out.resolve() in file.resolve().parents)
    return next(inside, None)


def identify_output(out: Path) -> set[tuple[int, int, int]]:
    """What tells the file or folder that is there, and every shard of the set of this name, from earlier ones."""
    shards = _set_of(out.stem, out.parent) if out.parent.is_dir() else ()
    found = (path.stat() for path in (out, *shards) if path.exists())
    return {(status.st_dev, status.st_ino, status.st_mtime_ns) for status in found}


def _files(path: Path) -> Iterator[Path]:
    """The file itself, all files of a folder, or all shards of a set."""
    if path.is_dir():
        yield from (file for file in path.iterdir() if not file.is_dir())
    elif match := _SHARD.fullmatch(path.name):
        yield from _set_of(match[1], path.parent)
    yield path


def _names(out: Path) -> Iterator[Path]:
    """Every file that is written for an output: unfinished ones and shards too."""
    yield from (out.with_name(out.name + ending) for ending in _UNFINISHED)
    if out.suffix == ".gguf" and out.parent.is_dir():
        yield from sorted(_set_of(out.stem, out.parent))


def _set_of(stem: str, folder: Path) -> Iterator[Path]:
    """Every file that is named as a shard of the set `stem`."""
    for file in folder.iterdir():
        if (match := _SHARD.fullmatch(file.name)) and match[1] == stem:
            yield file


def _identities(path: Path) -> Iterator[object]:
    """What two names of one file have in common: the place, and for what exists the file system's number."""
    yield os.path.realpath(path)  # Path.resolve raises for a link to itself
    if path.exists():
        status = path.stat()
        yield status.st_dev, status.st_ino
