"""Whether a GGUF file is sound: its header, its tensors against its own metadata, and every value in it.

Written apart from the writer: the two agree because both follow llama.cpp, not because they share code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe2gguf.errors import GGUFError
from moe2gguf.gguf.expected import check_architecture, check_experts_alike
from moe2gguf.gguf.file import Findings, GGUFFile, list_problems, quote_text
from moe2gguf.gguf.finite import check_values
from moe2gguf.gguf.shards import merge_shards, read_shards
from moe2gguf.gguf.system import count_processors


@dataclass(frozen=True)
class Verification:
    """What `verify` found: the file is sound when `problems` is empty; `notes` are worth knowing, not wrong."""

    path: Path
    n_tensors: int
    n_bytes: int  # of all tensors
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def verify(
    path: str | Path, *, threads: int | None = None, progress: Callable[[int], None] | None = None
) -> Verification:
    """Check header, layout, shapes against the metadata, and that no value is NaN or infinite.

    Of a shard, the whole set is checked.

    `progress` is called in this thread with the bytes checked since its last call; `threads` None means one per core,
    at most 8. A file that cannot be read at all has that as its only problem; nothing is raised for it.
    """
    path = Path(path)
    try:
        shards = read_shards(path)
    except GGUFError as error:
        return Verification(Path(path), 0, 0, (str(error),), ())
    found, file = Findings(), merge_shards(shards)
    for shard in shards:
        _check_layout(shard, found, name=f"{shard.path.name}: " if len(shards) > 1 else "")
    if not file.tensors:
        found.problems.append("the file holds metadata, but no tensor")
    check_architecture(file, found)
    check_experts_alike(file, found)
    check_values(file, found, threads or min(count_processors(), 8), progress or (lambda _: None))
    n_bytes = sum(tensor.n_bytes for tensor in file.tensors.values())
    return Verification(file.path, len(file.tensors), n_bytes, tuple(found.problems), tuple(found.notes))


def require_sound(
    path: Path, *, threads: int | None = None, progress: Callable[[int], None] | None = None
) -> Verification:
    """`verify`, raising GGUFError with all problems when there are any."""
    result = verify(path, threads=threads, progress=progress)
    if result.problems:
        raise GGUFError(list_problems(result.path, list(result.problems)))
    return result


def _check_layout(file: GGUFFile, found: Findings, name: str) -> None:
    """llama.cpp takes tensors only in the order of the list, each right after the padded one before.

    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/gguf.cpp#L796
    """
    if not file.tensors:
        return
    expected = end = file.data_offset
    for tensor in file.tensors.values():
        if tensor.offset != expected:
            found.problems.append(
                f"{name}tensor {quote_text(tensor.name)} starts at byte {tensor.offset}, llama.cpp wants it "
                f"at {expected}"
            )
        end = tensor.offset + tensor.n_bytes
        expected = -(-end // file.alignment) * file.alignment
        if not tensor.n_elements:
            found.problems.append(f"{name}tensor {quote_text(tensor.name)} has no elements: shape {tensor.shape}")
    if file.file_size > expected:
        found.notes.append(f"{name}{file.file_size - expected} bytes follow the last tensor; nothing reads them")
