"""What a GGUF file contains, from its header alone: as a record for programs and as tables for people."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe2gguf.gguf import types
from moe2gguf.gguf.counts import read_counts
from moe2gguf.gguf.file import BLOCK_SIZES, GGUFFile, TensorInfo
from moe2gguf.gguf.layout import EACH_EXPERT, mean_bits_per_weight
from moe2gguf.gguf.made_for import read_made_for
from moe2gguf.gguf.shards import read_model
from moe2gguf.spec import MetadataValue

FIRST = 8  # elements shown of an array
LONGEST = 120  # characters shown of a value in a table
_NOT_A_TERMINAL = 100_000  # columns: nothing wraps in a file or a pipe


@dataclass(frozen=True)
class Experts:
    """The experts of a file; `count` and `used` contain the shared ones.

    used      None where the file gives no single number
    d_expert  width of one, padding included
    note      why the file serves one count only; empty where it serves all
    shared    how many of them are one wide expert beside those that the router chooses from
    """

    count: int
    used: int | None
    d_expert: int | None
    note: str = ""
    shared: int = 0


@dataclass(frozen=True)
class TypeUse:
    """What one tensor type is used for."""

    type: str
    n_tensors: int
    n_parameters: int
    n_bytes: int


@dataclass(frozen=True)
class TensorRow:
    """One tensor; `shape` in numpy order, `offset` in bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int
    offset: int
    bits_per_weight: float


@dataclass(frozen=True)
class MetadataRow:
    """One key; of an array, `value` holds the first elements and `length` the number of all."""

    key: str
    type: str
    value: MetadataValue
    length: int | None = None


@dataclass(frozen=True)
class Inspection:
    """Everything `inspect` tells about a file.

    `n_active` counts the parameters a token passes through: all but the experts that are not used (embedding and
    output included, as is the habit), None where the used count is unknown. `bits_per_weight` is of the tensors'
    bytes; None in a file without tensors.
    """

    path: Path
    file_size: int
    version: int
    alignment: int
    architecture: str | None
    name: str | None
    file_type: str | None  # as in `general.file_type`, such as "Q4_K_M"
    n_layer: int | None
    d_model: int | None
    experts: Experts | None
    provenance: dict[str, MetadataValue]  # the `moe2gguf.*` keys
    n_parameters: int
    n_active: int | None
    bits_per_weight: float | None
    types: tuple[TypeUse, ...]  # largest first
    metadata: tuple[MetadataRow, ...]
    tensors: tuple[TensorRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """The record for JSON: bytes that are not UTF-8 are written `\\xff`, numbers that JSON lacks as strings."""
        plain = _plain(asdict(self) | {"path": str(self.path)})
        return dict(plain)


def inspect(path: str | Path) -> Inspection:
    """Read the header of a file, or of all shards of a set; no tensor byte. Raises GGUFError as `read_model` does."""
    path = Path(path)
    file = read_model(path)
    tensors = list(file.tensors.values())
    architecture = _as(str, file.metadata.get("general.architecture"))
    experts = _experts(file)
    n_parameters = sum(tensor.n_elements for tensor in tensors)
    return Inspection(
        path=file.path,
        file_size=file.file_size,
        version=file.version,
        alignment=file.alignment,
        architecture=architecture,
        name=_as(str, file.metadata.get("general.name")),
        file_type=types.name_file_type(file.metadata.get("general.file_type")),
        n_layer=_count_layers(file),
        d_model=_as(int, file.metadata.get(f"{architecture}.embedding_length")),
        experts=experts,
        provenance={key: value for key, value in file.metadata.items() if key.startswith("moe2gguf.")},
        n_parameters=n_parameters,
        n_active=_n_active(tensors, n_parameters, experts),
        bits_per_weight=mean_bits_per_weight(tensors) if n_parameters else None,
        types=_types(tensors),
        metadata=tuple(_metadata_row(file, key) for key in file.metadata),
        tensors=tuple(_tensor_row(tensor) for tensor in tensors),
    )


def _as(kind: type, value: MetadataValue | None) -> Any:
    return value if type(value) is kind else None


def _count_layers(file: GGUFFile) -> int | None:
    """The layers that are computed, where the file declares some."""
    declared = _as(int, file.metadata.get(f"{file.metadata.get('general.architecture')}.block_count"))
    size = read_counts(file).size
    return size.n_layer if declared and size.graph.empty_layer else declared


def _experts(file: GGUFFile) -> Experts | None:
    counts = read_counts(file)
    if not counts.n_expert:
        return None
    stacks = (t.shape for t in file.tensors.values() if t.name.endswith(".ffn_down_exps.weight") and len(t.shape) == 3)
    d_expert = next((shape[2] for shape in stacks), None)
    note = made_for.summary if (made_for := read_made_for(file.metadata)) else ""
    return Experts(counts.n_expert, counts.n_used or None, d_expert, note, counts.n_shared)


def _n_active(tensors: Sequence[TensorInfo], n_parameters: int, experts: Experts | None) -> int | None:
    if experts is None:
        return n_parameters
    if experts.used is None or not 0 <= experts.used <= experts.count:
        return None
    in_experts = sum(tensor.n_elements for tensor in tensors if EACH_EXPERT.search(tensor.name))
    return n_parameters - in_experts * (experts.count - experts.used) // (experts.count - experts.shared)


def _types(tensors: Sequence[TensorInfo]) -> tuple[TypeUse, ...]:
    groups: dict[str, list[TensorInfo]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.type.name].append(tensor)
    uses = [
        TypeUse(name, len(group), sum(t.n_elements for t in group), sum(t.n_bytes for t in group))
        for name, group in groups.items()
    ]
    return tuple(sorted(uses, key=lambda use: (-use.n_bytes, use.type)))


def _metadata_row(file: GGUFFile, key: str) -> MetadataRow:
    value, kind = file.metadata[key], str(file.types[key])
    if isinstance(value, list):
        return MetadataRow(key, kind, value[:FIRST], len(value))
    return MetadataRow(key, kind, value)


def _tensor_row(tensor: TensorInfo) -> TensorRow:
    n, n_bytes = BLOCK_SIZES[tensor.type]
    return TensorRow(tensor.name, tensor.shape, tensor.type.name, tensor.n_bytes, tensor.offset, 8 * n_bytes / n)


def _plain(value: Any) -> Any:
    """The same for JSON: every string valid Unicode, every number finite, tuples as lists."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def print_inspection(inspection: Inspection, console: Console, *, tensors: bool = False) -> None:
    """Print the summary, the metadata in a line each, and tables of tensor types, and with `tensors` of every tensor.

    Whatever the file holds, only printable characters reach the console. Nothing is cut off in a file or a pipe;
    a terminal folds what is too wide.
    """
    _print(console, "", ("", ""), _summarize(inspection))
    console.print("Metadata", style="italic")
    for row in inspection.metadata:
        line = _printable(f"{row.key} ({row.type}): {_value_text(row)}", console.encoding)
        console.print(line.rstrip(), markup=False, highlight=False, emoji=False, soft_wrap=True)
    console.print()
    uses = [(use.type, f"{use.n_tensors:,}", f"{use.n_parameters:,}", f"{use.n_bytes:,}") for use in inspection.types]
    _print(console, "Tensor types", ("type", "tensors", "parameters", "bytes"), uses)
    if tensors:
        lines = [
            (t.name, " x ".join(map(str, t.shape)), t.type, f"{t.n_bytes:,}", f"{t.bits_per_weight:g}")
            for t in inspection.tensors
        ]
        _print(console, "Tensors", ("name", "shape", "type", "bytes", "bits per weight"), lines)


def _summarize(it: Inspection) -> list[tuple[str, str]]:
    rows = [("file", str(it.path)), ("size", f"{it.file_size:,} bytes"), ("GGUF version", str(it.version))]
    rows += [("architecture", _short(it.architecture or "not given")), ("name", _short(it.name or "not given"))]
    rows += [("file type", it.file_type)] if it.file_type else []
    rows += [("layers", f"{it.n_layer:,}")] if it.n_layer is not None else []
    rows += [("width", f"{it.d_model:,}")] if it.d_model is not None else []
    rows += _summarize_experts(it.experts) if it.experts else []
    rows.append(("parameters", f"{it.n_parameters:,}"))
    if it.experts and it.n_active is not None:
        rows.append(("active per token", f"{it.n_active:,} ({it.n_active / max(it.n_parameters, 1):.1%})"))
    if it.bits_per_weight is not None:
        rows.append(("bits per weight", f"{it.bits_per_weight:.3f}"))
    return rows


def _summarize_experts(experts: Experts) -> list[tuple[str, str]]:
    used = "an unclear number" if experts.used is None else str(experts.used)
    shared = f", {experts.shared} of these shared" if experts.shared else ""
    width = f", each {experts.d_expert:,} wide" if experts.d_expert else ""
    note = [("", experts.note)] if experts.note else []
    return [("experts", f"{experts.count}, of which a token uses {used}{shared}{width}"), *note]


def _value_text(row: MetadataRow) -> str:
    if not isinstance(row.value, list):
        return _short(_item_text(row.value))
    more = ", ..." if row.length is not None and row.length > len(row.value) else ""
    return f"{row.length:,}: [{', '.join(_short(_item_text(item), 24) for item in row.value)}{more}]"


def _item_text(item: str | bool | int | float) -> str:
    return f"{item:.7g}" if isinstance(item, float) else str(item)


def _short(text: str, limit: int = LONGEST) -> str:
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def _print(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table; numbers of bytes and the like are right-aligned."""
    table = Table(title=title or None, box=None, title_justify="left", show_header=any(columns), pad_edge=False)
    for column in columns:
        right = column in ("tensors", "parameters", "bytes", "bits per weight")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_printable(cell, console.encoding)) for cell in row))
    if console.is_terminal:
        console.print(table)
    else:
        wide = Console(file=StringIO(), width=_NOT_A_TERMINAL, color_system=None)
        with wide.capture() as captured:
            wide.print(table)
        lines = [line.rstrip() for line in captured.get().rstrip().split("\n")]
        console.print("\n".join(lines), markup=False, highlight=False, emoji=False, soft_wrap=True)
    console.print()


def _printable(text: str, encoding: str) -> str:
    """Control characters, line ends, direction marks and what the encoding lacks, as backslash escapes."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)
