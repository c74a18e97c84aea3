"""Changing one count in a finished file, in place."""

import os
import struct
from pathlib import Path

from gguf import GGUFValueType as Kind

from moe2gguf.errors import GGUFError, OutputError
from moe2gguf.gguf.counts import ExpertCounts, read_counts, require_architecture
from moe2gguf.gguf.expected import MAX_LAYERS, read_count
from moe2gguf.gguf.file import GGUFFile, list_problems
from moe2gguf.gguf.made_for import USED_HERE, read_made_for
from moe2gguf.gguf.reader import MAX_HEADER
from moe2gguf.gguf.shards import merge_shards, read_shards
from moe2gguf.gguf.system import write_at
from moe2gguf.limits import MAX_EXPERTS, check_expert_counts


def set_used(path: str | Path, n_expert_used: int) -> str:
    """Make `n_expert_used` the number of experts that run per token when the program that runs the file says nothing.

    The count contains the shared experts. Four bytes are overwritten, so the file is whole at every moment. Returns a
    sentence where the experts are an arbitrary choice at this count, as those of a router of zeros; else nothing.

    Raises:
        GGUFError: not a file with experts, a count llama.cpp cannot run, or experts that were amplified or
            refitted for another count (the reason and the way out are named).
        OutputError: the file cannot be written.
    """
    shards = read_shards(Path(path))
    file = merge_shards(shards)
    path = file.path
    problems, architecture = list[str](), require_architecture(file)
    read_count(file, f"{architecture}.expert_count", problems, 0, MAX_EXPERTS)
    read_count(file, f"{architecture}.expert_shared_count", problems, 0, MAX_EXPERTS)
    read_count(file, f"{architecture}.block_count", problems, limit=MAX_LAYERS)
    if problems:
        raise GGUFError(list_problems(path, problems))
    counts, used_key = read_counts(file), f"{architecture}.expert_used_count"
    if not counts.n_expert or not counts.n_used:
        raise GGUFError(f"{path}: has no experts; only a file with an expert_count has a count to change")
    note = require_count(file, counts, n_expert_used)
    values = {USED_HERE: n_expert_used, used_key: n_expert_used - counts.n_shared}
    try:
        with path.open("r+b", buffering=0) as stream:
            header = stream.read(min(shards[0].data_offset, MAX_HEADER))
            for key, value in values.items():
                if key in file.metadata:
                    write_at(stream.fileno(), memoryview(struct.pack("<I", value)), _value_offset(header, key, path))
            os.fsync(stream.fileno())
    except OSError as error:
        raise OutputError(f"{path}: cannot be changed ({error.strerror}); make it writable, or copy it") from error
    return note


def require_count(file: GGUFFile, counts: ExpertCounts, n_expert_used: int) -> str:
    """Return a sentence where the choice of so many experts is arbitrary, else nothing.

    Raises GGUFError for a count that llama.cpp cannot run, or a file whose weights serve another one alone.
    """
    if refusals := check_expert_counts(counts.n_expert, n_expert_used, counts.size, counts.n_shared):
        raise GGUFError(f"{file.path}: " + " ".join(refusals))
    made_for = read_made_for(file.metadata)
    note = made_for.note(file.path.name, [n_expert_used]) if made_for else ""
    if made_for and note and not made_for.only_all:
        raise GGUFError(
            f"{file.path}: {made_for.reason}, and {n_expert_used} would make it worse. Convert again: "
            f"`moe2gguf convert MODEL OUT --used {n_expert_used}`, or for any count `moe2gguf convert MODEL OUT "
            "--no-refit --amplify any`"
        )
    return note


def _value_offset(header: bytes, key: str, path: Path) -> int:
    """Where the UINT32 value of `key` stands."""
    name = key.encode()
    prefix = struct.pack("<Q", len(name)) + name + struct.pack("<I", Kind.UINT32)
    if header.count(prefix) != 1:
        raise GGUFError(f"{path}: {key} is not one UINT32; convert the model again")
    return header.index(prefix) + len(prefix)
