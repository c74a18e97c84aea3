"""A GGUF file (or set of shards) to come, as a value: what the plans of `convert` and of `quantize` have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe2gguf.gguf import types
from moe2gguf.gguf.kernels import IGNORES_IMPORTANCE
from moe2gguf.gguf.layout import Layout, mean_bits_per_weight
from moe2gguf.quant.assign import Assignment
from moe2gguf.quant.imatrix_match import Guidance
from moe2gguf.recipes.tensors import PlannedTensor
from moe2gguf.spec import Metadata

PlannedFile = tuple[tuple[PlannedTensor, ...], Layout]
"""The tensors of one file, and where they stand."""


@dataclass(frozen=True, kw_only=True)
class FilePlan:
    """Everything about a model to come; no weight has been read.

    assigned  why every tensor has its type
    files     what is written: one file, or a set of shards
    """

    assigned: Assignment
    metadata: Metadata
    tensors: tuple[PlannedTensor, ...]
    files: tuple[PlannedFile, ...]
    warnings: tuple[str, ...]

    @property
    def file_size(self) -> int:
        """Bytes of the finished file, or of all its shards, exactly."""
        return sum(layout.file_size for _, layout in self.files)

    @property
    def header(self) -> bytes:
        """The headers of all files, one behind the other: they tell this plan from others."""
        return b"".join(layout.header for _, layout in self.files)

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors together, zero neurons included."""
        return mean_bits_per_weight(self.tensors)

    @property
    def shards(self) -> tuple[PlannedFile, ...]:
        """The files of a set; empty for a model in one file."""
        return self.files if len(self.files) > 1 else ()

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        return {
            "file_size": self.file_size,
            "shards": [{"tensors": len(tensors), "bytes": layout.file_size} for tensors, layout in self.shards],
            "bits_per_weight": round(self.bits_per_weight, 4),
            **self.assigned.to_dict(),
            "tensors": [_describe_tensor(tensor) for tensor in self.tensors],
            "warnings": list(self.warnings),
            "refusals": [],
        }


def list_warnings(guidance: Guidance, tensors: Sequence[PlannedTensor]) -> list[str]:
    """What is to be said of an importance matrix: too little in it, or nothing to use it for."""
    weighed = {*types.BLOCKS} - {types.find_type(name) for name in IGNORES_IMPORTANCE}
    is_used = any(one.guided and not one.copied and one.type in weighed for one in tensors)
    idle = "--imatrix: no effect, for no tensor is quantized to a type that weighs the errors of columns"
    return [*guidance.warnings, *([] if is_used or not guidance.importance else [idle])]


def _describe_tensor(tensor: PlannedTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "type": tensor.type.name,
        "bytes": tensor.n_bytes,
        "bits_per_weight": types.bits_per_weight(tensor.type),
        "importance": tensor.guided,
        "sources": list(tensor.sources),
        "copied": tensor.copied,
    }
