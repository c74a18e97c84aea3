"""Where a name that stands inside a checkpoint may lead: to a file of that checkpoint, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

from moe2gguf.errors import CheckpointError

_DRIVE = re.compile(r"^[A-Za-z]:")


def inside(folder: Path, relative_name: str) -> Path:
    """Return `folder / relative_name` after making sure that it lies in `folder`, links followed.

    One way out is allowed, the Hugging Face hub's cache, where `models--x/snapshots/REVISION/file` is a link to
    `models--x/blobs/HASH`: if `folder` is such a snapshot, a link may lead anywhere in the same `models--x`.
    (https://huggingface.co/docs/huggingface_hub/guides/manage-cache)

    The file need not exist.

    Raises:
        CheckpointError: the name is empty, absolute, has `..`, a backslash, a drive letter or a NUL, or a link on
            the way leaves the folder.
    """
    reason = _bad_name(relative_name)
    if reason:
        raise CheckpointError(f"{folder}: refused the file name {relative_name!r}: {reason}")
    path = folder / relative_name
    try:
        target, root = path.resolve(), folder.resolve()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long or not to be encoded
        cause = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{folder}: cannot follow the file name {relative_name[:200]!r} ({cause})") from error
    if not target.is_relative_to(_boundary(root)):
        raise CheckpointError(f"{path}: is a link that leaves the model's folder; put the file itself there")
    return path


def _bad_name(name: str) -> str | None:
    """Say what is wrong with the name itself, before the file system is asked."""
    if "\0" in name:
        return "it has a NUL character"
    if "\\" in name:
        return "it has a backslash"
    if name.startswith("/") or _DRIVE.match(name):
        return "it is absolute"
    parts = name.split("/")
    if ".." in parts:
        return "it leads out of the folder (..)"
    if all(part in ("", ".") for part in parts):
        return "it names no file"
    return None


def _boundary(root: Path) -> Path:
    """Return the directory that links in the (resolved) folder `root` must not leave."""
    cache = root.parent.parent
    if root.parent.name == "snapshots" and cache.name.startswith("models--"):
        return cache
    return root
