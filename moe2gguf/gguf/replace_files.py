"""Files that appear under their names only when they are complete: made in a folder beside, flushed, then moved.

An error or a full disk leaves nothing; an interrupt or a crash leaves at most the folder `NAME.partial`, which the next
run of the same job continues.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from moe2gguf.gguf.outputs import output_error, partial_path, require_room
from moe2gguf.gguf.resume import Job
from moe2gguf.gguf.system import open_here, sync


@contextlib.contextmanager
def replace_files(
    out: Path, targets: Sequence[Path], size: int, manifest: Mapping[str, str] | None = None, *, resume: bool = True
) -> Iterator[tuple[Job, list[Path]]]:
    """The job that makes `targets`, and where the block writes each: in `OUT.partial`, from where they are moved.

    The folder is removed when they have their names, and after any exception but an interrupt (KeyboardInterrupt or
    SystemExit) of a job that has a `manifest`. Arguments and errors as in `write_model`.
    """
    folder = partial_path(out)
    require_room(out, size)
    kept = (KeyboardInterrupt, SystemExit) if manifest is not None else ()
    with Job(folder, manifest or {}, resume=resume and manifest is not None) as job:
        try:
            parts = [folder / target.name for target in targets]
            yield job, parts
            flush_files(parts)
            _move(parts, targets)
            job.remove()
        except BaseException as error:
            if not isinstance(error, kept):
                job.remove()
            if isinstance(error, OSError):
                raise output_error(out, error) from error
            raise


@contextlib.contextmanager
def open_part(path: Path, size: int | None = None) -> Iterator[int]:
    """A descriptor of a file, new or begun, of `size` bytes (None: as it is)."""
    descriptor = open_here(path, os.O_RDWR | os.O_CREAT)
    try:
        if size is not None:
            os.ftruncate(descriptor, size)
        yield descriptor
    finally:
        os.close(descriptor)


def flush_files(paths: Iterable[Path]) -> None:
    """Wait until the disk has the files."""
    for path in paths:
        with open_part(path) as descriptor:
            os.fsync(descriptor)


def _move(parts: Sequence[Path], targets: Sequence[Path]) -> None:
    """Give the files their names, the first shard last: without it llama.cpp finds no model.

    At no moment is there a first shard beside shards of another run. After an error every file is back where it was.
    """
    try:
        if len(targets) > 1:
            targets[0].unlink(missing_ok=True)
        for part, target in reversed(list(zip(parts, targets, strict=True))):
            part.replace(target)
    except BaseException:
        for part, target in zip(parts, targets, strict=True):
            if not part.exists():  # an interrupt may come between the move and the next line
                _move_back(part, target)
        raise
    sync(targets[0].parent)


def _move_back(part: Path, target: Path) -> None:
    """Move a file to where it can be continued; where that fails, remove it."""
    try:
        target.replace(part)
    except OSError:
        target.unlink(missing_ok=True)
