"""One model in several GGUF files, named and numbered as llama.cpp's gguf-split does.

Every shard says its number (from 0), their count and the number of tensors of all; the first holds the metadata:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-model-loader.cpp#L595-L671
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from gguf import GGUFValueType as Kind

from moe2gguf.errors import GGUFError, PlanError
from moe2gguf.gguf.file import GGUFFile, TensorInfo, ValueType, list_problems, quote_text
from moe2gguf.gguf.layout import ALIGNMENT, Entry, Layout, align_up, lay_out, measure_info
from moe2gguf.gguf.metadata import SOURCE_DIGEST
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.spec import MetadataValue

NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
KINDS = {NUMBER: ValueType(Kind.UINT16), COUNT: ValueType(Kind.UINT16), TENSORS: ValueType(Kind.INT32)}
"""With another type llama.cpp aborts."""

EVERYWHERE = ("general.alignment", "general.file_type", SOURCE_DIGEST)
"""Keys that every shard of ours has: where its tensors stand, and what tells it from a shard of another set."""

MAX_SHARDS = 65535
_NAME = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})\.gguf", re.DOTALL)

T = TypeVar("T", bound=Entry)


def read_model(path: Path) -> GGUFFile:
    """Read the header of a GGUF file, or of the whole set that it is a shard of, as one. Errors as `read_shards`."""
    return merge_shards(read_shards(path))


def read_shards(path: Path) -> list[GGUFFile]:
    """Read the file `path` alone, or every shard of its set, in order.

    Raises:
        GGUFError: a shard is missing, renamed, of another set, or no sound GGUF file, or a tensor stands in two of
            them; all such shards are named.
    """
    file = read_gguf(path)
    if file.metadata.get(COUNT, 1) == 1:
        return [file]
    number, count, _ = _read_numbers(file)
    paths = list_shard_paths(_find_stem(file, number, count), count)
    if missing := [other.name for other in paths if not other.is_file()]:
        raise GGUFError(list_problems(path, [f"shard {name} is missing; fetch the whole set" for name in missing]))
    shards: list[GGUFFile] = []
    problems = []
    for i, other in enumerate(paths):
        shard = file if other == path else read_gguf(other)
        shards.append(shard)
        problems += _find_strangeness(shard, i, shards[0])
    problems = problems or _find_disagreements(shards)
    if problems:
        raise GGUFError(list_problems(path, problems))
    return shards


def merge_shards(shards: Sequence[GGUFFile]) -> GGUFFile:
    """Join several shards to one file, with the path and metadata of the first, without the `split.*` keys."""
    first = shards[0]
    return replace(
        first,
        metadata={key: value for key, value in first.metadata.items() if key not in KINDS},
        types={key: kind for key, kind in first.types.items() if key not in KINDS},
        tensors={name: tensor for shard in shards for name, tensor in shard.tensors.items()},
        data_offset=sum(shard.data_offset for shard in shards),
        file_size=sum(shard.file_size for shard in shards),
    )


def _read_numbers(file: GGUFFile) -> tuple[int, int, int]:
    """Read (number from 0, count, tensors of all shards); raises GGUFError where the file says nothing sound."""
    values = []
    for key, kind in KINDS.items():
        value = file.metadata.get(key)
        if not isinstance(value, int) or file.types[key] != kind:
            found = f"found {file.types[key]}" if key in file.types else "it is missing"
            raise GGUFError(f"{file.path}: metadata {key}: expected a {kind} in a shard, {found}")
        values.append(value)
    number, count, n_tensor = values
    if not 0 <= number < count:
        raise GGUFError(f"{file.path}: says it is shard {number + 1} of {count}")
    return number, count, n_tensor


def _find_stem(file: GGUFFile, number: int, count: int) -> Path:
    """Return the common part of the set's names, after comparing the file's own name with its number."""
    match = _NAME.fullmatch(file.path.name)
    if not match or (int(match[2]), int(match[3])) != (number + 1, count):
        raise GGUFError(
            f"{file.path}: says it is shard {number + 1} of {count}, but llama.cpp finds the others only if its name "
            f"ends in {_make_ending(number, count)}; give it back its name"
        )
    return file.path.with_name(match[1])


def _find_strangeness(shard: GGUFFile, i: int, first: GGUFFile) -> list[str]:
    """Return what in shard `i` shows that it is another one, or of another set than `first`."""
    number, count, n_tensor = _read_numbers(shard)
    _, count_of_all, n_tensor_of_all = _read_numbers(first)
    name = shard.path.name
    if (count, n_tensor) != (count_of_all, n_tensor_of_all):
        return [
            f"{name} is of another set: it says {count} shards with {n_tensor} tensors, the first one says "
            f"{count_of_all} with {n_tensor_of_all}"
        ]
    if number != i:
        return [f"{name} is shard {number + 1} by its own words: renamed, or a copy"]
    shared = [key for key in shard.metadata if key in first.metadata and key != NUMBER]
    differing = [key for key in shared if not _are_same(shard.metadata[key], first.metadata[key])]
    return [f"{name} is of another set: its {quote_text(key)} differs from the first one's" for key in differing]


def _are_same(a: MetadataValue, b: MetadataValue) -> bool:
    """Return whether two values are equal; NaN is, to itself."""
    return a == b or repr(a) == repr(b)


def _find_disagreements(shards: Sequence[GGUFFile]) -> list[str]:
    """Tensors that stand in two shards, and a number of them that is not the promised one."""
    owner: dict[str, TensorInfo] = {}
    problems = []
    for shard in shards:
        for tensor in shard.tensors.values():
            if tensor.name in owner:
                both = f"{owner[tensor.name].file.name} and {shard.path.name}"
                problems.append(f"tensor {quote_text(tensor.name)} stands in two shards, {both}")
            owner[tensor.name] = tensor
    promised = _read_numbers(shards[0])[2]
    if not problems and len(owner) != promised:
        problems.append(f"the shards hold {len(owner)} tensors, their metadata says {promised}")
    return problems


def list_shard_paths(stem: Path, count: int) -> list[Path]:
    """Return the names of a set of `count` shards; `stem` is their path without the ending."""
    return [stem.with_name(stem.name + _make_ending(number, count)) for number in range(count)]


def name_model(file: Path) -> str:
    """Return the name of a file, or of the set that this shard begins, without what tells shards apart."""
    return file.name.removesuffix(".gguf").partition("-00001-of-")[0]


def list_view_paths(folder: Path, file: Path, n_expert_used: int) -> list[Path]:
    """Return the two files of the view of a model with so many experts; each view has a folder of its own."""
    name = f"{name_model(file)}-k{n_expert_used}"
    return list_shard_paths(folder / name / name, 2)


def _make_ending(number: int, count: int) -> str:
    return f"-{number + 1:05d}-of-{count:05d}.gguf"


def lay_out_files(
    metadata: Mapping[str, MetadataValue],
    tensors: Sequence[T],
    kinds: Mapping[str, ValueType],
    max_bytes: int | None,
) -> tuple[tuple[tuple[T, ...], Layout], ...]:
    """The tensors of each file of a model, and where they stand: one file, or shards of at most `max_bytes` each.

    There is one file where it is no larger, header included, or `max_bytes` is None. The keys `EVERYWHERE` stand in all
    shards, the others in the first.

    Raises:
        PlanError: a tensor or the metadata alone is larger than a shard, or there would be too many shards.
    """
    whole = lay_out(metadata, tensors, kinds)
    if max_bytes is None or whole.file_size <= max_bytes:
        return ((tuple(tensors), whole),)
    alignment, kinds = int(str(metadata.get("general.alignment", ALIGNMENT))), {**kinds, **KINDS}
    heads = (metadata, {key: metadata[key] for key in EVERYWHERE if key in metadata})
    empty = [len(lay_out(_number_shard(head, 0, 1, 0), [], kinds).header) + alignment for head in heads]
    sizes = {tensor.name: measure_info(tensor) + align_up(tensor.n_bytes, alignment) for tensor in tensors}
    needs = {"the metadata": empty[0], **{name: empty[1] + size for name, size in sizes.items()}}
    if too_large := {name: size for name, size in needs.items() if size > max_bytes}:
        raise PlanError([_describe_small_size(max_bytes, too_large)])
    groups, used = [list[T]()], empty[0]
    for tensor in tensors:
        if used + sizes[tensor.name] > max_bytes:
            groups.append([])
            used = empty[1]
        groups[-1].append(tensor)
        used += sizes[tensor.name]
    if len(groups) > MAX_SHARDS:
        raise PlanError(
            [f"--shard-size {max_bytes:,}: makes {len(groups):,} shards, and {MAX_SHARDS:,} can be numbered"]
        )
    return tuple(
        (tuple(group), lay_out(_number_shard(heads[i > 0], i, len(groups), len(tensors)), group, kinds))
        for i, group in enumerate(groups)
    )


def lay_out_apart(
    metadata: Mapping[str, MetadataValue], tensors: Sequence[Entry], kinds: Mapping[str, ValueType]
) -> tuple[Layout, Layout]:
    """Lay out a file as two shards: the metadata alone, and the tensors alone, which is the same for other metadata."""
    kinds, weights = {**kinds, **KINDS}, {key: metadata[key] for key in EVERYWHERE if key in metadata}
    head = lay_out(_number_shard(metadata, 0, 2, len(tensors)), [], kinds)
    return head, lay_out(_number_shard(weights, 1, 2, len(tensors)), tensors, kinds)


def _describe_small_size(max_bytes: int, needs: Mapping[str, int]) -> str:
    """Return what needs a larger shard than `max_bytes`, and how large one must be."""
    largest = max(needs, key=lambda name: needs[name])
    more = f" and {len(needs) - 1} more" if len(needs) > 1 else ""
    return f"--shard-size {max_bytes:,}: too small for {largest}{more}; give at least {needs[largest]:,} bytes"


def _number_shard(
    head: Mapping[str, MetadataValue], number: int, count: int, n_tensor: int
) -> dict[str, MetadataValue]:
    return {**head, NUMBER: number, COUNT: count, TENSORS: n_tensor}
