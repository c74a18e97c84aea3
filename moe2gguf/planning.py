"""The first pass: from a checkpoint's description to every tensor, byte and refusal of the file; no data is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as GGMLType

from moe2gguf.checkpoint.folder import Checkpoint, open_checkpoint
from moe2gguf.checkpoint.tensors import SourceDigest
from moe2gguf.errors import PlanError
from moe2gguf.experts.slicing import expert_width
from moe2gguf.export import types
from moe2gguf.export.layout import Layout, lay_out
from moe2gguf.export.metadata import model_metadata, provenance
from moe2gguf.export.vocabulary import vocabulary_metadata
from moe2gguf.export.writer import OutputTensor
from moe2gguf.limits import check_expert_counts, expert_count_warnings
from moe2gguf.outputs import output_tensors
from moe2gguf.spec import MetadataValue, Model, Slicing

DEFAULT_EXPERTS = 8


@dataclass(frozen=True)
class Options:
    """What the user chooses about the file; every default is the command line's.

    experts  how many experts each dense MLP is cut into (None: 8). A Mixtral checkpoint keeps its own.
    used     experts that run per token unless the program that runs the file says otherwise (None: all of them)
    align    every expert is padded with zero neurons to a multiple of this width (32 or 256 for block types)
    type     "auto" (as stored) or a name in `moe2gguf.export.types.NAMES`
    dense    write the ordinary dense file instead, the reference for every comparison
    name     the model's name in the metadata, instead of the model card's
    """

    experts: int | None = None
    used: int | None = None
    align: int = 1
    type: str = "auto"
    dense: bool = False
    name: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything about the file to come. `slicing` is None where the MLPs are not cut."""

    options: Options
    checkpoint: Checkpoint
    slicing: Slicing | None
    metadata: Mapping[str, MetadataValue]
    tensors: tuple[OutputTensor, ...]
    layout: Layout
    digest: SourceDigest
    warnings: tuple[str, ...]

    @property
    def file_size(self) -> int:
        """Bytes of the finished file, exactly."""
        return self.layout.file_size

    @property
    def n_expert(self) -> int:
        """Experts per layer in the file; 0 for a dense file."""
        return self.slicing.n_expert if self.slicing else self.checkpoint.model.n_expert

    @property
    def n_expert_used(self) -> int:
        """Experts that run per token unless the user says otherwise; 0 for a dense file."""
        return self.slicing.n_expert_used if self.slicing else self.checkpoint.model.n_expert_used

    @property
    def expert_bytes(self) -> int:
        """Bytes of all merged expert tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors if _is_expert(tensor.name))

    @property
    def padding_bytes(self) -> int:
        """Bytes that zero neurons add to the expert tensors."""
        if self.slicing is None:
            return 0
        places = self.slicing.n_expert * self.slicing.d_expert
        return self.expert_bytes - self.expert_bytes * self.checkpoint.model.d_ff // places

    def active_bytes(self, n_expert_used: int) -> int:
        """Bytes of weights read per generated token when `n_expert_used` experts run (ignored for a dense file).

        An embedding that is not also the output matrix is left out: one row of it is read.
        """
        active_experts = self.expert_bytes * n_expert_used // self.n_expert if self.n_expert else 0
        return self._always_read() + active_experts

    def speed_bound(self, n_expert_used: int) -> float:
        """Most that generation can gain over the dense model, were memory bandwidth the only limit."""
        routers = sum(tensor.n_bytes for tensor in self.tensors if tensor.name.endswith("ffn_gate_inp.weight"))
        dense = self._always_read() - routers + self.expert_bytes - self.padding_bytes
        return dense / self.active_bytes(n_expert_used)

    def _always_read(self) -> int:
        skipped = set() if self.checkpoint.model.tied_embeddings else {"token_embd.weight"}
        return sum(t.n_bytes for t in self.tensors if not _is_expert(t.name) and t.name not in skipped)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        k_range = range(1, self.n_expert + 1)
        return {
            "model": dataclasses.asdict(self.checkpoint.model),
            "slicing": dataclasses.asdict(self.slicing) if self.slicing else None,
            "file_size": self.file_size,
            "padding_bytes": self.padding_bytes,
            "expert_count": self.n_expert,
            "expert_used_count": self.n_expert_used,
            "active_bytes_per_token": {k: self.active_bytes(k) for k in k_range or (0,)},
            "speed_bound": {k: round(self.speed_bound(k), 4) for k in k_range},
            "metadata": {key: _short(value) for key, value in self.metadata.items()},
            "tensors": [
                {
                    "name": tensor.name,
                    "shape": list(tensor.shape),
                    "type": tensor.type.name,
                    "bytes": tensor.n_bytes,
                    "sources": list(tensor.sources),
                }
                for tensor in self.tensors
            ],
            "warnings": list(self.warnings),
            "refusals": [],
        }


def plan_conversion(model: Path, options: Options | None = None) -> Plan:
    """Plan the conversion of the Hugging Face folder `model`.

    Raises:
        PlanError: every reason, all at once, why this cannot be converted.
        CheckpointError: `model` is not a Hugging Face folder.
    """
    options = options or Options()
    checkpoint = open_checkpoint(model, name=options.name)
    if refusals := _refuse_options(checkpoint.model, options):
        raise PlanError(refusals)
    slicing = None
    if checkpoint.model.n_expert and options.used:
        hyper = dataclasses.replace(checkpoint.model, n_expert_used=options.used)
        checkpoint = dataclasses.replace(checkpoint, model=hyper)
    elif not checkpoint.model.n_expert and not options.dense:
        slicing = _slicing(checkpoint.model, options)
    digest = SourceDigest()
    tensors = output_tensors(checkpoint, slicing, digest, options.type)
    if refusals := _refuse_widths(tensors) + _refuse_counts(checkpoint.model, slicing, tensors):
        raise PlanError(refusals)
    metadata: dict[str, MetadataValue] = {
        **model_metadata(checkpoint.model, slicing, types.FILE_TYPES[_main_type(tensors)]),
        **checkpoint.card,
        **vocabulary_metadata(checkpoint.vocabulary),
        **provenance(checkpoint.model, slicing),
    }
    warnings = (*checkpoint.warnings, *_warnings(checkpoint.model, slicing, tensors))
    return Plan(options, checkpoint, slicing, metadata, tensors, lay_out(metadata, tensors), digest, warnings)


def _slicing(model: Model, options: Options) -> Slicing:
    n_expert = options.experts or DEFAULT_EXPERTS
    return Slicing(
        n_expert=n_expert,
        n_expert_used=options.used or n_expert,
        d_expert=expert_width(model.d_ff, n_expert, options.align),
        amplification=float(n_expert),
        align=options.align,
    )


def _refuse_options(model: Model, options: Options) -> list[str]:
    refusals = []
    experts, used, kind = options.experts, options.used, options.type
    n = model.n_expert or (DEFAULT_EXPERTS if experts is None else experts)
    if model.n_expert and experts not in (None, n):
        refusals.append(f"--experts {experts}: the checkpoint has {n} experts already, which are kept; leave it out")
    if model.n_expert and options.dense:
        refusals.append(f"--dense: the checkpoint has {n} experts already; leave it out")
    if not model.n_expert and not 1 <= n <= model.d_ff:
        refusals.append(f"--experts {n}: must lie between 1 and the MLP's width, {model.d_ff}")
    if used is not None and not 1 <= used <= n:
        refusals.append(f"--used {used}: must lie between 1 and the number of experts, {n}")
    if options.align < 1:
        refusals.append(f"--align {options.align}: must be at least 1; 32 and 256 are the quantization blocks")
    if kind != "auto" and kind not in types.NAMES:
        refusals.append(f"--type {kind}: unknown; choose auto, {', '.join(types.NAMES)}")
    return refusals


def _warnings(model: Model, slicing: Slicing | None, tensors: Sequence[OutputTensor]) -> list[str]:
    k = (slicing or model).n_expert_used
    warnings = expert_count_warnings(k, n_layer=model.n_layer, n_tensor=len(tensors)) if k else []
    return warnings + (_slicing_warnings(slicing) if slicing else [])


def _slicing_warnings(slicing: Slicing) -> list[str]:
    warnings = []
    n, k = slicing.n_expert, slicing.n_expert_used
    if k < n and slicing.router == "zero":
        warnings.append(
            f"--used {k} of {n} with a zero router: llama.cpp runs a fixed, arbitrary choice of experts, and the "
            "output will not be coherent"
        )
    if n & (n - 1):
        warnings.append(f"{n} is not a power of two: amplified weights are rounded once more to the file's type")
    return warnings


def _refuse_widths(tensors: Sequence[OutputTensor]) -> list[str]:
    """Rows that do not fit a block type: one sentence per type and width, with the tensors and the ways out."""
    misfits: dict[tuple[GGMLType, int], list[str]] = {}
    for tensor in tensors:
        if tensor.shape[-1] % types.block_size(tensor.type):
            misfits.setdefault((tensor.type, tensor.shape[-1]), []).append(tensor.name)
    return [_misfit(kind, width, names) for (kind, width), names in misfits.items()]


def _misfit(kind: GGMLType, width: int, names: Sequence[str]) -> str:
    block = types.block_size(kind)
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    pad = f"pad the experts with --align {block}, choose another --experts, or " if _is_expert(names[0]) else ""
    return (
        f"{kind.name} needs rows whose width is a multiple of {block}, but {width} is the width of {listed}; "
        f"{pad}use --type f16"
    )


def _refuse_counts(model: Model, slicing: Slicing | None, tensors: Sequence[OutputTensor]) -> list[str]:
    source = slicing or model
    if not source.n_expert:
        return []
    return check_expert_counts(source.n_expert, source.n_expert_used, n_layer=model.n_layer, n_tensor=len(tensors))


def _main_type(tensors: Sequence[OutputTensor]) -> GGMLType:
    """The type of most of the bytes, which names the file's type."""
    size: dict[GGMLType, int] = {}
    for tensor in tensors:
        size[tensor.type] = size.get(tensor.type, 0) + tensor.n_bytes
    return max(size, key=lambda kind: size[kind])


def _is_expert(name: str) -> bool:
    return "_exps." in name


def _short(value: MetadataValue) -> Any:
    """Long arrays (the vocabulary) as their length, everything else as it is."""
    return f"[{len(value)} values]" if isinstance(value, list) and len(value) > 16 else value
