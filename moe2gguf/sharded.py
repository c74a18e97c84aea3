"""The second pass for a model in several files: all of them appear, or none."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe2gguf.errors import OutputError
from moe2gguf.export.shards import shard_paths
from moe2gguf.export.verify import require_sound
from moe2gguf.export.writer import check_target, lock, output_error, require_room, sync_folder, write_tensors
from moe2gguf.planning import Plan
from moe2gguf.progress import Progress
from moe2gguf.writing import Finish


def set_paths(plan: Plan, out: Path) -> list[Path]:
    """What the shards of OUT are called, which `moe.gguf` gives moe-00001-of-00003.gguf ..."""
    return shard_paths(out.with_suffix("") if out.suffix == ".gguf" else out, len(plan.shards))


def check_set(plan: Plan, out: Path, *, force: bool) -> None:
    """`check_target` for every shard."""
    for target in set_paths(plan, out):
        check_target(target, plan.checkpoint.own_files, force=force)


def write_set(plan: Plan, out: Path, *, threads: int, quantizers: int, progress: Progress, finish: Finish) -> Path:
    """Write, verify and name the shards of `plan`; the first one's path. `finish` is called for each after all tensors.

    They are made in a folder `OUT.shards.partial`, verified there as a set, and moved beside OUT, the first one last:
    without it llama.cpp finds no model. A set that was stopped is begun anew.

    Raises:
        OutputError, GGUFError, CorruptWeightError: as `moe2gguf.convert.write_plan`.
    """
    targets = set_paths(plan, out)
    with _staging(out, plan.file_size) as folder:
        parts = [folder / target.name for target in targets]
        with progress("write", plan.file_size) as advance:
            for part, (tensors, layout) in zip(parts, plan.shards, strict=True):
                with _opened(part, os.O_CREAT | os.O_EXCL) as descriptor:
                    os.ftruncate(descriptor, layout.file_size)
                    write_tensors(descriptor, layout, tensors, threads=threads, quantizers=quantizers, advance=advance)
        for part, (_, layout) in zip(parts, plan.shards, strict=True):
            with _opened(part) as descriptor:
                finish(descriptor, layout)
        with progress("verify", plan.file_size) as advance:
            require_sound(parts[0], threads=threads, progress=advance)
        _move(parts, targets)
    return targets[0]


@contextlib.contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[int]:
    """A descriptor for writing; what was written is on the disk afterwards."""
    descriptor = os.open(path, os.O_RDWR | flags, 0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _staging(out: Path, size: int) -> Iterator[Path]:
    """The folder `OUT.shards.partial`, ours alone and without old shards; removed in the end, whatever happened.

    Raises:
        OutputError: no room, a disk error, or another process is writing the same set.
    """
    folder = out.with_name(out.name + ".shards.partial")
    require_room(folder, size)
    try:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_DIRECTORY", 0))
    except OSError as error:
        raise OutputError(f"{folder}: cannot be created ({error.strerror})") from error
    try:
        lock(descriptor, folder)
        try:
            for left in folder.glob("*.gguf"):
                left.unlink()
            yield folder
        except OSError as error:
            raise output_error(out, error) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _move(parts: Sequence[Path], targets: Sequence[Path]) -> None:
    """Give the shards their names; at no moment does a first shard stand beside shards of another run."""
    moved: list[Path] = []
    try:
        targets[0].unlink(missing_ok=True)
        for part, target in reversed(list(zip(parts, targets, strict=True))):
            part.replace(target)
            moved.append(target)
    except BaseException:
        for target in moved:
            target.unlink(missing_ok=True)
        raise
    sync_folder(targets[0].parent)
