"""The importance matrix given to `convert` and `quantize`: read, matched with the file, and recorded in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moe2gguf.experts.slicing import contiguous_order
from moe2gguf.gguf import types
from moe2gguf.gguf.file import GGUFFile
from moe2gguf.gguf.layout import Entry
from moe2gguf.quant.assign import Assignment
from moe2gguf.quant.imatrix import ImportanceMatrix, label
from moe2gguf.quant.imatrix_match import Guidance, Neurons, guide
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.spec import MetadataValue

KEYS = "quantize.imatrix."
"""What llama.cpp's tool writes: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/tools/quantize/quantize.cpp#L77"""

REPAIR = "moe2gguf.quantize.imatrix_repair"


@dataclass(frozen=True)
class Consulted:
    """The matrix (None: no `--imatrix`), what it says about each tensor, and the keys that record it."""

    matrix: ImportanceMatrix | None = None
    guidance: Guidance = field(default_factory=Guidance)
    metadata: dict[str, MetadataValue] = field(default_factory=dict)

    @property
    def per_expert(self) -> bool:
        """Whether it was collected from a file with experts."""
        return self.matrix is not None and any("_exps." in name for name in self.matrix.entries)

    def refusals(self, stored: Sequence[Entry], assigned: Assignment) -> list[str]:
        """What it lacks for the tensors that are to be quantized."""
        return self.guidance.refusals(
            t.name for t in stored if assigned.types[t.name] in types.BLOCKS and assigned.types[t.name] != t.type
        )


def consult(
    matrix: ImportanceMatrix | None, options: TypeOptions, stored: Sequence[Entry], neurons: Neurons | None
) -> Consulted:
    """Look up these tensors in the importance matrix that `options` name, if any."""
    if matrix is None:
        return Consulted()
    metadata: dict[str, MetadataValue] = {KEYS + "file": label(str(options.imatrix))}
    if matrix.datasets:
        metadata[KEYS + "dataset"] = matrix.datasets[0]
    metadata[KEYS + "entries_count"] = len(matrix.entries)
    if matrix.chunk_count:
        metadata[KEYS + "chunks_count"] = matrix.chunk_count
    if options.imatrix_repair != "none":
        metadata[REPAIR] = options.imatrix_repair
    guidance = guide(matrix, stored, neurons, options.imatrix_repair)
    return Consulted(matrix, guidance, metadata)


def neurons_of(file: GGUFFile) -> Neurons | None:
    """Which neurons the experts of a finished file hold: known only where we cut them one after the other."""
    n, d_ff, align = (
        file.metadata.get(f"moe2gguf.slicing.{key}") for key in ("expert_count", "dense_feed_forward_length", "align")
    )
    if file.metadata.get("moe2gguf.slicing.group") != "contiguous":
        return None
    stacks = {tensor.shape for tensor in file.tensors.values() if tensor.name.endswith(".ffn_down_exps.weight")}
    shape = stacks.pop() if len(stacks) == 1 else ()
    if not (isinstance(n, int) and isinstance(d_ff, int) and isinstance(align, int) and len(shape) == 3):
        return None
    if not (shape[0] == n > 0 and 0 < d_ff <= n * shape[2] and 0 < align <= shape[2]):
        return None
    order = contiguous_order(d_ff, n, align)
    return Neurons(d_ff, lambda _: order) if order.shape == (n, shape[2]) else None
