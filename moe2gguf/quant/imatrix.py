"""Importance matrices: what the inputs of every weight matrix looked like, in llama.cpp's two file formats.

For each input column a file holds the sum of squares over the tokens seen, and how many those were. The GGUF form
(https://github.com/ggml-org/llama.cpp/blob/0c1e57098/tools/imatrix/imatrix.cpp#L537) keeps both per expert; the older
`.dat` (https://github.com/ggml-org/llama.cpp/blob/0c1e57098/common/imatrix-loader.cpp#L10) keeps averages, one count
per tensor, and says 1.0 where it has no data. Both are untrusted: everything is checked as it is read.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from numpy.typing import NDArray

from moe2gguf.errors import GGUFError, ImportanceError
from moe2gguf.gguf.file import GGUFFile, list_problems, open_gguf, quote_text, read_into
from moe2gguf.gguf.layout import lay_out
from moe2gguf.gguf.outputs import check_target
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.gguf.replace_files import replace_files
from moe2gguf.gguf.writer import OutputTensor, write_tensors
from moe2gguf.spec import MetadataValue

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
MODEL = "moe2gguf.imatrix.model"
"""What `identify_model` says of the model; llama.cpp passes over the key, and its own files have none."""

MAX_FILE = 8 << 30
MAX_LABEL = 120  # characters of a text's name that are kept
LARGEST = 1e12
"""No mean square of real activations comes near it; far above, the kernels' sums of squares overflow."""

_MAX_COUNT = 1 << 52
_MAX_CHUNKS = (1 << 31) - 1
_NORMS = re.compile(r"(output|blk\.\d+\.attn)_norm\.weight")


@dataclass(frozen=True)
class Activity:
    """What one tensor's matrices were fed.

    sums    (n_mat * width,) float32: per matrix (expert) and input column the sum of squares over its rows
    counts  (n_mat,) int64: rows (tokens) that each matrix saw; or (1,), the same for all
    """

    sums: NDArray[np.float32]
    counts: NDArray[np.int64]

    def means(self) -> NDArray[np.float32]:
        """Return mean squares (len(counts), columns), NaN where a count is zero; in float32, as llama.cpp divides."""
        with np.errstate(invalid="ignore", divide="ignore"):
            rows = self.sums.reshape(len(self.counts), -1)
            means: NDArray[np.float32] = np.divide(rows, self.counts[:, None].astype(np.float32), dtype=np.float32)
        means[self.counts == 0] = np.nan
        return means


@dataclass(frozen=True)
class ImportanceMatrix:
    """A whole file: `entries` by tensor name, the names of the texts, and how many chunks of how many tokens.

    `legacy`: read from a `.dat`, whose counts are chunks and whose experts without data say 1.0. `model`: see
    `identify_model`; "" where the file does not say.
    """

    entries: Mapping[str, Activity]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int
    legacy: bool = False
    model: str = ""

    @property
    def is_per_expert(self) -> bool:
        """Whether it was collected from a file with experts."""
        return any("_exps." in name for name in self.entries)


class Numbers(Protocol):
    """A tensor that can be read."""

    def read(self) -> NDArray[np.generic]:
        """Return all of it."""


def identify_model(tensors: Mapping[str, Numbers]) -> str:
    """Return a digest of a model's norms, which are the same numbers in all its types and slices."""
    digest = hashlib.sha256()
    for name in sorted(filter(_NORMS.fullmatch, tensors)):
        digest.update(name.encode() + tensors[name].read().astype("<f4").tobytes())
    return digest.hexdigest()


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix in either format.

    Raises:
        ImportanceError: not such a file, cut, or with values that cannot be; all of those are listed.
    """
    path = Path(path)
    try:
        with open_gguf(path) as file:
            magic, size = file.read(4), file.seek(0, 2)
            if size > MAX_FILE:
                raise ImportanceError(f"{path}: {size:,} bytes; no importance matrix has more than {MAX_FILE:,}")
            matrix = _from_gguf(read_gguf(path)) if magic == b"GGUF" else _Legacy(path, file, size).parse()
    except GGUFError as error:
        raise ImportanceError(f"not a sound importance matrix: {error}") from error
    if problems := [
        f"{quote_text(name)}: {why}" for name, entry in matrix.entries.items() for why in _wrong_values(entry)
    ]:
        raise ImportanceError(list_problems(path, problems) + "\ncollect it again with `moe2gguf imatrix`")
    return matrix


def _wrong_values(entry: Activity) -> list[str]:
    problems = []
    if not np.isfinite(entry.sums).all():
        problems.append("a sum of squares is NaN or infinite")
    elif (entry.sums < 0).any():
        problems.append(f"a sum of squares is negative ({entry.sums.min():g})")
    elif (entry.means() > LARGEST).any():
        problems.append(f"a mean square is {np.nanmax(entry.means()):g}, which no activation reaches")
    elif entry.sums.reshape(len(entry.counts), -1)[entry.counts == 0].any():
        problems.append("a sum of squares of no token at all")
    return problems


# --- the GGUF form ---


def _from_gguf(file: GGUFFile) -> ImportanceMatrix:
    """Read the GGUF form. Raises ImportanceError with everything that is missing, unpaired or of another kind."""
    names, problems = _find_pairs(file)
    datasets, (chunk_count, chunk_size) = _read_counts(file, problems)
    entries = {}
    for name in names if not problems else ():
        try:
            entries[name] = _entry(file, name)
        except ValueError as error:
            problems.append(f"{quote_text(name)}: {error}")
    if problems:
        raise ImportanceError(list_problems(file.path, problems))
    return ImportanceMatrix(entries, datasets, chunk_count, chunk_size, model=str(file.metadata.get(MODEL, "")))


def _find_pairs(file: GGUFFile) -> tuple[list[str], list[str]]:
    """Return the tensors that the file has sums of, and the problems: those that have only one of sums and counts."""
    sums = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    counts = [name.removesuffix(COUNTS) for name in file.tensors if name.endswith(COUNTS)]
    if not sums:
        raise ImportanceError(f"{file.path}: a GGUF file without importance data; make one with `moe2gguf imatrix`")
    return sums, [f"{quote_text(name)}: has only one of {SUMS} and {COUNTS}" for name in sorted({*sums} ^ {*counts})]


def _read_counts(file: GGUFFile, problems: list[str]) -> tuple[tuple[str, ...], tuple[int, int]]:
    """Return the names of the texts, the chunks and the tokens of a chunk; add what is none to the problems."""
    datasets = file.metadata.get(DATASETS)
    numbers = [file.metadata.get(key) for key in (CHUNK_COUNT, CHUNK_SIZE)]
    count, size = (n if type(n) is int and 0 <= n <= _MAX_CHUNKS else None for n in numbers)
    if not isinstance(datasets, list) or count is None or size is None:
        problems.append(
            f"{DATASETS}, {CHUNK_COUNT} or {CHUNK_SIZE} is missing or of another kind, llama.cpp wants them"
        )
        return (), (0, 0)
    return tuple(label(str(text)) for text in datasets), (count, size)


def _entry(file: GGUFFile, name: str) -> Activity:
    """Raises ValueError for what is wrong with one pair of tensors."""
    infos = [file.tensors[name + end] for end in (SUMS, COUNTS)]
    if any(info.type != GGMLType.F32 or not info.n_elements for info in infos):
        raise ValueError("sums and counts must be F32 and not empty")
    sums, counts = (file.read_tensor(info).reshape(-1).astype(np.float32, copy=False) for info in infos)
    if sums.size % counts.size:
        raise ValueError(f"{sums.size} sums cannot be shared by {counts.size} counts")
    if not (np.isfinite(counts).all() and (counts >= 0).all() and (counts <= _MAX_COUNT).all()):
        raise ValueError("a count is NaN, infinite, negative or absurd")
    return Activity(sums, np.rint(counts).astype(np.int64))


def write_imatrix(matrix: ImportanceMatrix, out: Path, sources: Sequence[Path] = (), *, force: bool = False) -> None:
    """Write the GGUF form, in llama.cpp's order and types; the file appears when it is complete.

    Raises:
        OutputError: `out` cannot be written, is one of `sources`, or exists and `force` is off.
    """
    check_target(out, sources, force=force)
    metadata: dict[str, MetadataValue] = {
        "general.type": "imatrix",
        DATASETS: [*matrix.datasets] or ["unknown"],
        CHUNK_COUNT: matrix.chunk_count,
        CHUNK_SIZE: matrix.chunk_size,
        **({MODEL: matrix.model} if matrix.model else {}),
    }
    tensors = [tensor for name in sorted(matrix.entries) for tensor in _pair(name, matrix.entries[name])]
    layout = lay_out(metadata, tensors)
    with replace_files(out, [out], layout.file_size) as (_, (part,)):
        write_tensors(part, layout, tensors, threads=1)
        read_imatrix(part)


def _pair(name: str, entry: Activity) -> list[OutputTensor]:
    def tensor(end: str, values: NDArray[np.float32]) -> OutputTensor:
        rows = values.reshape(len(entry.counts), -1)
        return OutputTensor(name + end, rows.shape, GGMLType.F32, blocks=lambda: iter([rows]))

    return [tensor(SUMS, entry.sums), tensor(COUNTS, entry.counts.astype(np.float32))]


# --- the older form ---


class _Legacy:
    """Reads a `.dat` front to back; no length is believed before the bytes that remain have been asked."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size, self.position = path, file, size, 0
        self.what = "header"

    def fail(self, problem: str) -> ImportanceError:
        return ImportanceError(f"{self.path}: {self.what}: {problem}; neither a GGUF nor a .dat importance matrix")

    def take(self, n: int) -> bytes:
        if not 0 <= n <= self.size - self.position:
            raise self.fail(f"needs {n} bytes where {self.size - self.position} remain")
        buffer = np.empty(n, np.uint8)
        read_into(self.file, self.position, buffer, self.path)
        self.position += n
        return buffer.tobytes()

    def i32(self) -> int:
        return int.from_bytes(self.take(4), "little", signed=True)

    def parse(self) -> ImportanceMatrix:
        n, entries = self.i32(), dict[str, Activity]()
        if not 0 < n <= self.size // 17:  # lengths, a name of a character, one value
            raise self.fail(f"{n} entries in {self.size} bytes")
        for i in range(n):
            self.what = f"entry {i + 1} of {n}"
            name, entry = self.entry()
            if name in entries:
                raise self.fail(f"{quote_text(name)} appears twice")
            entries[name] = entry
        self.what = "end"
        if self.position == self.size:  # older still: nothing after the entries
            return ImportanceMatrix(entries, (), 0, 0, legacy=True)
        chunks = self.i32()
        text = self.take(self.i32()) if self.position < self.size else b""
        if chunks < 0:
            raise self.fail(f"{chunks} chunks")
        return ImportanceMatrix(entries, (label(text.decode("utf-8", "replace")),) if text else (), chunks, 0, True)

    def entry(self) -> tuple[str, Activity]:
        try:
            name = self.take(self.i32()).rstrip(b"\0").decode()
        except UnicodeDecodeError as error:
            raise self.fail("its name is not UTF-8") from error
        self.what += f" {quote_text(name)}"
        n_call, n_value = self.i32(), self.i32()
        if not name or n_call < 0 or n_value < 1:
            raise self.fail(f"{n_call} calls, {n_value} values")
        sums = np.frombuffer(self.take(4 * n_value), "<f4").astype(np.float32)
        return name, Activity(sums, np.array([n_call], np.int64))


# --- merging ---


def merge(matrices: Sequence[ImportanceMatrix], chunk_size: int = 0) -> ImportanceMatrix:
    """Return the sum of several matrices; `chunk_size` (0: the first one's) is the tokens of a chunk in `.dat` files.

    Raises:
        ImportanceError: they do not belong to the same model, or a `.dat` does not say enough.
    """
    size = chunk_size or next((matrix.chunk_size for matrix in matrices if matrix.chunk_size), 512)
    entries, problems = _add_entries(matrices, size)
    tokens = sum(matrix.chunk_count * (matrix.chunk_size or size) for matrix in matrices)
    chunks = -(-tokens // size)
    if chunks > _MAX_CHUNKS:
        problems.append(f"  - {chunks:,} chunks of {size:,} tokens: one of their numbers is wrong")
    if problems:
        raise ImportanceError("\n".join(["these importance matrices cannot be merged:", *problems[:20]]))
    datasets = dict.fromkeys(name for matrix in matrices for name in matrix.datasets)
    return ImportanceMatrix(entries, tuple(datasets), chunks, size)


def _add_entries(matrices: Sequence[ImportanceMatrix], chunk_size: int) -> tuple[dict[str, Activity], list[str]]:
    """Return the sum of the entries of each name, and a line for each that cannot be added."""
    entries: dict[str, Activity] = {}
    problems = []
    for matrix in matrices:
        for name, entry in matrix.entries.items():
            try:
                known = _in_tokens(name, entry, chunk_size) if matrix.legacy else entry
                entries[name] = _sum(entries[name], known) if name in entries else known
            except ValueError as error:
                problems.append(f"  - {quote_text(name)}: {error}")
    return entries, problems


def _in_tokens(name: str, entry: Activity, chunk_size: int) -> Activity:
    """Return an entry of a `.dat`, which counts chunks, in tokens; how many each expert saw is lost."""
    if "_exps." in name:
        raise ValueError("a .dat file does not say how many tokens each expert saw; merge files of the GGUF form")
    return _check_counts(entry.sums * np.float32(chunk_size), entry.counts * chunk_size)


def _sum(a: Activity, b: Activity) -> Activity:
    if a.sums.shape != b.sums.shape or a.counts.shape != b.counts.shape:
        found = " and ".join(f"{one.sums.size} sums of {one.counts.size} matrices" for one in (a, b))
        raise ValueError(f"{found}: from different models")
    return _check_counts((a.sums.astype(np.float64) + b.sums).astype(np.float32), a.counts + b.counts)


def _check_counts(sums: NDArray[np.float32], counts: NDArray[np.int64]) -> Activity:
    if (counts > _MAX_COUNT).any():
        raise ValueError(f"{counts.max():,} tokens, more than any text has: a count, or the size of a chunk, is wrong")
    return Activity(sums, counts)


def label(text: str) -> str:
    """Return the last part of a path, Windows' included: the name of a text, without its place on somebody's disk."""
    name = PurePosixPath(text.replace("\\", "/")).name
    return "".join(c for c in name if c.isprintable())[:MAX_LABEL] or "unnamed"
