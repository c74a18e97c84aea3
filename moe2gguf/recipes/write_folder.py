"""Write a Hugging Face folder: safetensors shards and small files, beside its final name, then renamed.

A folder under the final name is always complete: a crash leaves at most `NAME.partial`, which the next run replaces.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from moe2gguf.errors import OutputError
from moe2gguf.gguf import types
from moe2gguf.gguf.outputs import check_outputs, output_error, partial_path, require_room
from moe2gguf.gguf.system import clear_away, sync
from moe2gguf.gguf.writer import OutputTensor, check_blocks
from moe2gguf.hf.companions import copy_companions
from moe2gguf.hf.folder import open_checkpoint
from moe2gguf.progress import Progress, silent

SHARD_BYTES = 1 << 30
"""The size above which a shard is closed: as much of the model is in memory at once."""

MARK = "moe2gguf"
"""The key of config.json that says what made the folder; only folders with it are ever replaced."""


def check_folder_target(out: Path, sources: Sequence[Path], *, force: bool, size: int = 0) -> None:
    """Refuse a target of `size` bytes that must not be replaced or cannot be written.

    Raises:
        OutputError: it is or holds one of the `sources`, exists and `force` is off, is no folder that this program
            wrote, or its parent is missing, read-only or too full.
    """
    check_outputs({str(out): out}, sources, force=force)
    if out.exists() or out.is_symlink():
        if not force:
            raise OutputError(f"{out}: exists; choose another name, or replace it with --force")
        if out.is_symlink() or not _is_ours(out):
            raise OutputError(f"{out}: exists and was not written by moe2gguf; choose another name")
        if _old_path(out).exists():
            raise OutputError(f"{_old_path(out)}: is in the way of replacing {out.name}; remove it, or rename it")
    require_room(out, size)


def _old_path(out: Path) -> Path:
    """Where the folder that is replaced stands for a moment."""
    return out.with_name(out.name + ".old")


def _is_ours(folder: Path) -> bool:
    try:
        values = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and MARK in values


def write_hf_folder(
    out: Path,
    tensors: Sequence[OutputTensor],
    source: Path,
    make_texts: Callable[[], Mapping[str, str]],
    *,
    progress: Progress = silent,
) -> None:
    """Write the folder `out`, which gets its name when it is complete and has been opened as a checkpoint.

    Args:
        tensors: what the shards hold, in order.
        source: the folder whose tokenizer files, generation settings and licence are copied.
        make_texts: gives the content of config.json and of other text files by name. It is called when the tensors are
            written, since their provenance may name a digest of what was read for them.

    Raises:
        OutputError: a disk error; what stood at `out` is still there.
        CorruptWeightError: a value is NaN, infinite, or too large for its type.
        CheckpointError: a source cannot be read, or a link leads out of its folder.
    """
    size = sum(tensor.n_bytes for tensor in tensors)
    with _replace_folder(out, size) as partial:
        with progress("write", size) as advance:
            write_shards(partial, tensors, advance)
        for name, text in make_texts().items():
            (partial / name).write_text(text, "utf-8")
        copy_companions(source, partial)
        open_checkpoint(partial)


@contextlib.contextmanager
def _replace_folder(out: Path, size: int) -> Iterator[Path]:
    """An empty `OUT.partial`; it gets the final name if the block succeeds, and is removed if it does not.

    Raises:
        OutputError: there is no room for `size` bytes, or a disk error.
    """
    partial, old = partial_path(out), _old_path(out)
    require_room(out, size)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                sync(file)
        sync(partial)
        if out.exists():
            out.rename(old)
        partial.rename(out)
        sync(out.parent)
        clear_away(old)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not out.exists() and old.exists():
            old.rename(out)
        if isinstance(error, (OSError, SafetensorError)):  # the latter is what safetensors makes of the former
            raise output_error(out, error) from error
        raise


def write_shards(
    folder: Path, tensors: Sequence[OutputTensor], advance: Callable[[int], None], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `tensors` (float types) as one model.safetensors, or as shards with an index.

    One shard is in memory at a time. `advance` is told the bytes of each tensor as it is made.

    Raises:
        CorruptWeightError: a value is NaN, infinite, or too large for its type.
    """
    shards = _cut_into_shards(tensors, shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        many = len(shards) > 1
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if many else "model.safetensors"
        arrays = {}
        for tensor in shard:
            arrays[tensor.name] = _read_whole(tensor)
            weight_map[tensor.name] = name
            advance(tensor.n_bytes)
        save_file(arrays, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(tensor.n_bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(to_json(index), "utf-8")


def _cut_into_shards(tensors: Sequence[OutputTensor], shard_bytes: int) -> list[list[OutputTensor]]:
    """The tensors in order, cut where a shard would grow above `shard_bytes`."""
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.n_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.n_bytes
    return shards


def _read_whole(tensor: OutputTensor) -> NDArray[np.generic]:
    data = b"".join(bytes(types.encode(block, tensor.type, tensor.name)) for block in check_blocks(tensor))
    return np.frombuffer(data, types.FLOATS[tensor.type]).reshape(tensor.shape)


def to_json(values: Mapping[str, Any]) -> str:
    """A JSON object as text, indented, keys as they come."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
