"""The recipe of `moe2gguf views`: one set of weights under several names, one for each number of used experts.

A view is a folder with a set of two shards as llama.cpp reads them. The first holds the metadata alone, with its own
count; the second holds the tensors, and is one file on disk for all views, by links. So programs that offer every
folder as a model offer each count, and one view can draft for another:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-model-loader.cpp#L595-L671
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/common/preset.cpp#L387-L445
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe2gguf.errors import GGUFError
from moe2gguf.gguf.counts import ExpertCounts, read_counts
from moe2gguf.gguf.expert_tensors import copy_tensor
from moe2gguf.gguf.file import GGUFFile
from moe2gguf.gguf.layout import Layout
from moe2gguf.gguf.made_for import USED_HERE
from moe2gguf.gguf.outputs import check_target, make_folder, write_whole
from moe2gguf.gguf.set_used import require_count
from moe2gguf.gguf.shards import lay_out_apart, list_view_paths, read_model
from moe2gguf.gguf.system import link_or_copy
from moe2gguf.gguf.writer import write_model
from moe2gguf.progress import Progress, silent
from moe2gguf.spec import Metadata


@dataclass(frozen=True)
class Views:
    """What `write_views` did: the first shard of each view by its count, and whether the weights are one file."""

    paths: dict[int, Path]
    linked: bool

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return {"paths": {k: str(path) for k, path in self.paths.items()}, "linked": self.linked}


def write_views(
    source: str | Path, folder: str | Path, used: Sequence[int], *, force: bool = False, progress: Progress = silent
) -> Views:
    """Write a view of the file `source` for every count of `used`: FOLDER/NAME-kK/NAME-kK-00001-of-00002.gguf.

    Args:
        source: a GGUF file with experts, or a shard of one.
        folder: where the views appear; it is made if it is not there.
        used: experts used per token, shared ones included (none: as in the file).
        force: replace views that are there.
        progress: receives stages ("write", "verify") and the bytes done.

    Raises:
        GGUFError: the file has no experts, or cannot serve one of the counts; each is named.
        OutputError: a view exists, or cannot be written.
    """
    file, folder = read_model(Path(source)), Path(folder)
    counts = read_counts(file)
    used = list(dict.fromkeys(used or [counts.n_used]))
    if not counts.n_expert:
        raise GGUFError(f"{file.path}: has no experts; a view is of a number of them")
    for k in used:
        require_count(file, counts, k)
    targets = {k: list_view_paths(folder, file.path, k) for k in used}
    tensors = [copy_tensor(file, name) for name in file.tensors]
    layouts = {k: lay_out_apart(_change_count(file, counts, k), tensors, file.types) for k in used}
    first, *others = used
    head, weights = targets[first]
    with _make_folders([*reversed(head.parents), *(targets[k][0].parent for k in others)]):
        for target in (path for pair in targets.values() for path in pair):
            check_target(target, file.files, force=force)

        # Write the first view as a set of two shards, then each other one as a header beside a link to its weights.
        stem = head.with_name(f"{head.parent.name}.gguf")
        write_model(stem, [([], layouts[first][0]), (tensors, layouts[first][1])], progress=progress)
        linked = [_add_view(layouts[k][0], targets[k], weights) for k in others]
    return Views({k: pair[0] for k, pair in targets.items()}, all(linked))


@contextlib.contextmanager
def _make_folders(folders: Sequence[Path]) -> Iterator[None]:
    """Make the folders that are missing; if the block fails, they are gone again. Raises OutputError."""
    made: list[Path] = []
    try:
        for folder in folders:
            if not folder.is_dir():
                made.append(folder)
                make_folder(folder)
        yield
    except BaseException:
        for folder in reversed(made):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _change_count(file: GGUFFile, counts: ExpertCounts, k: int) -> Metadata:
    """The metadata with another number of used experts, and a name that tells it."""
    key = f"{file.metadata['general.architecture']}.expert_used_count"
    changes = {key: k - counts.n_shared} | ({USED_HERE: k} if USED_HERE in file.metadata else {})
    if isinstance(name := file.metadata.get("general.name"), str):
        return {**file.metadata, **changes, "general.name": f"{name}, {k} of {counts.n_expert} experts"}
    return {**file.metadata, **changes}


def _add_view(layout: Layout, target: Sequence[Path], weights: Path) -> bool:
    """Write one more view beside the first; whether its weights are a link, not a copy."""
    head, tail = target
    fresh = tail.with_name(f".{tail.name}.partial")
    with write_whole(head) as partial:
        partial.write_bytes(layout.header)
        try:
            linked = link_or_copy(weights, fresh)
            head.unlink(missing_ok=True)  # never does it stand beside weights that it does not describe
            fresh.replace(tail)
        finally:
            fresh.unlink(missing_ok=True)
    return linked
