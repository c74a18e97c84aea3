"""The second pass of a model that is one file or a set of shards: all of them appear, or none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moe2gguf.errors import OutputError
from moe2gguf.gguf.layout import Layout
from moe2gguf.gguf.resume import Journal, discard, discard_abandoned, lock, partial_path
from moe2gguf.gguf.shards import shard_paths
from moe2gguf.gguf.verify import require_sound
from moe2gguf.gguf.writer import OutputTensor, check_target, clean_up, require_room, sync_folder, write_tensors
from moe2gguf.gguf.writing import Finish, write_file
from moe2gguf.progress import Progress

Shards = Sequence[tuple[Sequence[OutputTensor], Layout]]
"""The tensors of each file, and where they stand."""


def model_paths(out: Path, n_shard: int) -> list[Path]:
    """What a model of so many shards is called: `moe.gguf`, or moe-00001-of-00003.gguf ..."""
    return [out] if n_shard == 1 else shard_paths(out.with_suffix("") if out.suffix == ".gguf" else out, n_shard)


def check_model_target(out: Path, n_shard: int, sources: Iterable[Path], *, force: bool) -> None:
    """`check_target` for every file; shards are not numbered after a folder."""
    if out.is_dir():
        raise OutputError(f"{out}: is a folder; name a file in it")
    sources = tuple(sources)
    for target in model_paths(out, n_shard):
        check_target(target, sources, force=force)


def write_model(
    out: Path,
    shards: Shards,
    journal: Journal,
    *,
    progress: Progress,
    threads: int,
    quantizers: int | None = None,
    verifiers: int | None = None,
    finish: Finish | None = None,
) -> Path:
    """Write, verify and name the files of a model; the path of the first. Arguments and errors as in `write_file`.

    A set is made in a folder `OUT.partial`, verified there, and moved beside OUT, the first shard last: without it
    llama.cpp finds no model. `finish` is called for each shard after all tensors.
    """
    if len(shards) == 1:
        tensors, layout = shards[0]
        write_file(
            out,
            layout,
            tensors,
            progress=progress,
            threads=threads,
            quantizers=quantizers,
            verifiers=verifiers,
            journal=journal,
            finish=finish,
        )
        return out
    targets, size = model_paths(out, len(shards)), sum(layout.file_size for _, layout in shards)
    with _working_folder(out, size, journal) as folder:
        parts = [folder / target.name for target in targets]
        with progress("write", size) as advance:
            for part, (tensors, layout) in zip(parts, shards, strict=True):
                with _opened(part, layout.file_size) as file:
                    write_tensors(
                        file,
                        layout,
                        tensors,
                        threads=threads,
                        quantizers=quantizers,
                        advance=advance,
                        journal=journal,
                    )
        for part, (_, layout) in zip(parts, shards, strict=True):
            with _opened(part, layout.file_size) as file:
                if finish:
                    finish(file, layout)
        with progress("verify", size) as advance:
            require_sound(parts[0], threads=verifiers, progress=advance)
        _move(parts, targets)
    return targets[0]


@contextlib.contextmanager
def _opened(path: Path, size: int) -> Iterator[int]:
    """A descriptor of a file of `size` bytes, new or begun; what was written is on the disk afterwards."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        os.ftruncate(descriptor, size)
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _working_folder(out: Path, size: int, journal: Journal) -> Iterator[Path]:
    """The folder `OUT.partial`, ours alone; empty, or with the shards that the journal knows. Removed in the end.

    Raises:
        OutputError: no room, a disk error, or another process is writing the same model.
    """
    folder = partial_path(out)
    require_room(folder, size)
    try:
        if folder.is_file():
            discard_abandoned(folder)
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_DIRECTORY", 0))
    except OSError as error:
        raise OutputError(f"{folder}: cannot be created ({error.strerror})") from error
    try:
        lock(descriptor, folder)
        try:
            if not journal.begin():
                for left in folder.iterdir():
                    discard(left)
            yield folder
            discard(folder)
            journal.remove()
        except BaseException as error:
            clean_up(error, out, journal)
            raise
    finally:
        os.close(descriptor)


def _move(parts: Sequence[Path], targets: Sequence[Path]) -> None:
    """Give the shards their names; at no moment does a first shard stand beside shards of another run."""
    moved: list[tuple[Path, Path]] = []
    try:
        targets[0].unlink(missing_ok=True)
        for part, target in reversed(list(zip(parts, targets, strict=True))):
            part.replace(target)
            moved.append((part, target))
    except BaseException:
        for part, target in moved:
            _move_back(part, target)
        raise
    sync_folder(targets[0].parent)


def _move_back(part: Path, target: Path) -> None:
    """Where it can be continued from, or away."""
    try:
        target.replace(part)
    except OSError:
        target.unlink(missing_ok=True)
