"""Which files may be read as part of a checkpoint: names stay in its folder, links to files are followed."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from moe2gguf.errors import CheckpointError, name_odd_file

_DRIVE = re.compile(r"^[A-Za-z]:")


@dataclass(frozen=True)
class Origin:
    """A repository of the Hugging Face Hub, "OWNER/NAME", and a commit of it."""

    repository: str
    revision: str


def find_origin(folder: Path) -> Origin | None:
    """Return which repository and commit a folder of the Hub's cache holds; None for another folder.

    It is `models--OWNER--NAME/snapshots/COMMIT`: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    match Path(os.path.abspath(folder)).parts:
        case (*_, home, "snapshots", revision) if home.startswith("models--"):
            return Origin(home.removeprefix("models--").replace("--", "/"), revision)
    return None


def resolve_inside(folder: Path, relative_name: str) -> Path:
    """Return `folder / relative_name`, a file or folder that may be read as part of the checkpoint in `folder`.

    The name may have been written by a stranger, so it must not lead out of the folder. A link to a file is followed
    wherever it leads: it was put there on this machine, by the hub's cache, whose snapshots consist of links, or by the
    user. A link to a folder must stay within `folder`. The file need not exist.

    Raises:
        CheckpointError: the name is empty, absolute, has `..`, a backslash, a drive letter or a NUL; a folder on the
            way lies elsewhere; a link leads nowhere; or what is there is no file (a pipe would block for ever).
    """
    reason = _find_bad_name(relative_name)
    if reason:
        raise CheckpointError(f"{folder}: refused the file name {relative_name!r}: {reason}")
    path = folder / relative_name
    try:
        reason = _find_bad_target(path, folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a name too long or not to be encoded
        cause = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{folder}: cannot follow the file name {relative_name[:200]!r} ({cause})") from error
    if reason:
        raise CheckpointError(f"{path}: {reason}")
    return path


def links_out_of(folder: Path) -> list[str]:
    """Return "NAME -> TARGET" of the files in `folder` that are links to somewhere else.

    Within the hub's cache `models--x/snapshots/REVISION/file` is a link to `models--x/blobs/HASH`; links to the same
    `models--x` are left out.
    """
    root = folder.resolve()
    home = root.parent.parent if find_origin(root) else root
    links = sorted(path for path in folder.iterdir() if path.is_symlink() and path.is_file())
    return [f"{path.name} -> {path.resolve()}" for path in links if not path.resolve().is_relative_to(home)]


def _find_bad_target(path: Path, root: Path) -> str | None:
    """Say why what is at `path` must not be read as a part of the (resolved) folder `root`."""
    if not path.parent.resolve().is_relative_to(root):
        return "lies behind a link to another folder; link the files instead, or copy the folder"
    if not path.exists():
        return f"is a link to {path.readlink()}, where no file is" if path.is_symlink() else None
    if path.is_dir():
        outside = not path.resolve().is_relative_to(root)
        return "is a link to another folder; link the files instead, or copy the folder" if outside else None
    return name_odd_file(path)


def _find_bad_name(name: str) -> str | None:
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
