"""Changing one count in a finished file, in place."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from gguf import GGUFValueType as Kind

from moe2gguf.errors import GGUFError
from moe2gguf.gguf.expected import MAX_LAYERS, read_count
from moe2gguf.gguf.file import GGUFFile, listing
from moe2gguf.gguf.made_for import USED, USED_HERE, read_made_for
from moe2gguf.gguf.reader import MAX_HEADER, read_gguf
from moe2gguf.limits import MAX_EXPERTS, check_expert_counts


def set_used(path: str | Path, n_expert_used: int) -> None:
    """Make `n_expert_used` the number of experts that run per token when the program that runs the file says nothing.

    Four bytes are overwritten, so the file is whole at every moment.

    Raises:
        GGUFError: not an expert file of arch `llama`, a count llama.cpp cannot run, or experts that were amplified or
            refitted for another count (the reason and the way out are named).
    """
    path = Path(path)
    file = read_gguf(path)
    problems: list[str] = []
    n_expert = read_count(file, "llama.expert_count", problems, 0, MAX_EXPERTS)
    n_layer = read_count(file, "llama.block_count", problems, limit=MAX_LAYERS)
    if problems:
        raise GGUFError(listing(path, problems))
    if not n_expert or USED not in file.metadata:
        raise GGUFError(f"{path}: has no experts; only a file with llama.expert_count has a count to change")
    refusals = check_expert_counts(n_expert, n_expert_used, n_layer=n_layer, n_tensor=len(file.tensors))
    if refusals:
        raise GGUFError(f"{path}: " + " ".join(refusals))
    _require_free(file, n_expert_used)
    with path.open("r+b", buffering=0) as stream:
        header = stream.read(min(file.data_offset, MAX_HEADER))
        for key in (USED_HERE, USED):
            if key in file.metadata:
                os.pwrite(stream.fileno(), struct.pack("<I", n_expert_used), _value_offset(header, key, path))
        os.fsync(stream.fileno())


def _require_free(file: GGUFFile, n_expert_used: int) -> None:
    """Raise GGUFError for a file whose weights serve another count alone."""
    made_for = read_made_for(file.metadata)
    if made_for and made_for.note(file.path.name, [n_expert_used]):
        raise GGUFError(
            f"{file.path}: {made_for.reason}, and {n_expert_used} would make it worse. Convert again: "
            f"`moe2gguf convert MODEL OUT --used {n_expert_used}`, or --no-refit --amplify any"
        )


def _value_offset(header: bytes, key: str, path: Path) -> int:
    """Where the UINT32 value of `key` stands."""
    name = key.encode()
    prefix = struct.pack("<Q", len(name)) + name + struct.pack("<I", Kind.UINT32)
    if header.count(prefix) != 1:
        raise GGUFError(f"{path}: {key} is not one UINT32; convert the model again")
    return header.index(prefix) + len(prefix)
