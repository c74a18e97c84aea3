"""The recipe: a GGUF file becomes the same file with other tensor types."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION
from numpy.typing import NDArray

from moe2gguf.errors import GGUFError, PlanError
from moe2gguf.gguf import kernels, types
from moe2gguf.gguf.file import GGUFFile, TensorInfo
from moe2gguf.gguf.layout import Layout, lay_out, mean_bits_per_weight
from moe2gguf.gguf.resume import describe_job
from moe2gguf.gguf.shards import lay_out_shards, read_model
from moe2gguf.gguf.source_tensor import SourceTensor
from moe2gguf.gguf.writer import OutputTensor, check_model_target, write_model
from moe2gguf.progress import Progress, silent
from moe2gguf.quant.assign import Assignment, assign, may_quantize
from moe2gguf.quant.imatrix_use import KEYS, Consulted, consult, neurons_of
from moe2gguf.quant.presets import ARCHITECTURES, Network
from moe2gguf.quant.rules import Rule, TypeOptions, own_rules
from moe2gguf.quant.target import target_rules
from moe2gguf.spec import MetadataValue

BLOCK = 4 << 20
"""Elements of a tensor that are in memory together."""

MAX_ALIGNMENT = 1 << 20
PREFIX = "moe2gguf.quantize."


@dataclass(frozen=True)
class QuantizationPlan:
    """Everything about the file to come; no tensor of the source has been read.

    `layout` is of one file; `shards`, unless empty, are what is written instead, none larger than `shard_size`.
    """

    source: GGUFFile
    options: TypeOptions
    assigned: Assignment
    metadata: Mapping[str, MetadataValue]
    tensors: tuple[OutputTensor, ...]
    layout: Layout
    warnings: tuple[str, ...]
    shards: tuple[tuple[tuple[OutputTensor, ...], Layout], ...] = ()
    shard_size: int | None = None

    @property
    def file_size(self) -> int:
        """Bytes of the finished file, or of all its shards, exactly."""
        return sum(layout.file_size for _, layout in self.shards) or self.layout.file_size

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors together."""
        return mean_bits_per_weight(self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        return {
            "source": str(self.source.path),
            "source_size": self.source.file_size,
            "file_size": self.file_size,
            "shards": [{"tensors": len(tensors), "bytes": layout.file_size} for tensors, layout in self.shards],
            "bits_per_weight": round(self.bits_per_weight, 4),
            **self.assigned.to_dict(),
            "tensors": [
                {
                    "name": tensor.name,
                    "shape": list(tensor.shape),
                    "stored": self.source.tensors[tensor.name].type.name,
                    "type": tensor.type.name,
                    "bytes": tensor.n_bytes,
                    "bits_per_weight": types.bits_per_weight(tensor.type),
                    "importance": tensor.importance is not None,
                }
                for tensor in self.tensors
            ],
            "warnings": list(self.warnings),
            "refusals": [],
        }


@dataclass(frozen=True)
class Quantization:
    """What `quantize` did; `reused` tensors were there already, from a run that was stopped."""

    path: Path
    plan: QuantizationPlan
    reused: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return {"path": str(self.path), "reused_tensors": self.reused, **self.plan.to_dict()}


def quantize(
    source: Path,
    out: Path,
    options: TypeOptions,
    *,
    allow_requantize: bool = False,
    shard_size: int | None = None,
    force: bool = False,
    resume: bool = True,
    threads: int | None = None,
    progress: Progress = silent,
) -> Quantization:
    """Write the GGUF file `source` again as `out`, with the types that `options` choose.

    Args:
        source: a GGUF file of f32, f16 or bf16 weights, or a shard of one.
        out: the file to write; it appears only when it is complete and verified.
        options: a preset or a type, rules for single tensors, and an importance matrix.
        allow_requantize: also change tensors that are quantized already, which loses twice.
        shard_size: write a larger file as a set of shards of at most so many bytes; the result names the first.
        force: replace `out` if it exists.
        resume: continue an unfinished `out` of the same job, and refuse one of another; False replaces either.
        threads: threads that quantize (None: one per core).
        progress: receives stages ("write", "verify") and the bytes done.

    Raises:
        PlanError: the options do not fit the file; every reason is listed.
        ImportanceError: the importance matrix is broken.
        GGUFError: `source` is not a sound GGUF file, or the written file did not verify.
        CorruptWeightError: a weight is NaN, infinite, or too large for its type.
        HarnessError: a type needs llama.cpp's kernels, and they are not installed.
        OutputError: `out` cannot be written, must not be replaced, or is unfinished from another job.
    """
    plan = plan_quantization(source, options, allow_requantize=allow_requantize, shard_size=shard_size)
    return write_quantization(plan, out, force=force, resume=resume, threads=threads, progress=progress)


def plan_quantization(
    source: Path, options: TypeOptions, *, allow_requantize: bool = False, shard_size: int | None = None
) -> QuantizationPlan:
    """The first pass of `quantize`: every tensor's type and place; arguments and errors as there."""
    file = read_model(source)
    if refusals := _refuse_file(file):
        raise PlanError(refusals)
    stored = [OutputTensor(t.name, t.shape, t.type) for t in file.tensors.values()]
    guided = consult(options, stored, neurons_of(file))
    network = dataclasses.replace(network_of(file), importance=guided.matrix is not None)
    assigned = assign(stored, options, network, guided.guidance.complete, _target(file, options, guided))
    refusals = [*assigned.refusals, *_refuse_sources(file, assigned, allow_requantize)]
    refusals += guided.refusals(stored, assigned)
    if refusals:
        raise PlanError(refusals)
    tensors = guided.guidance.attached([_output(file, info, assigned) for info in file.tensors.values()])
    metadata = {**_metadata(file, assigned, options), **guided.metadata}
    kinds = {key: kind for key, kind in file.types.items() if metadata.get(key) is file.metadata[key]}
    layout = lay_out(metadata, tensors, kinds)
    warnings = (*assigned.warnings, *guided.guidance.warnings)
    shards = lay_out_shards(metadata, tensors, kinds, shard_size)
    return QuantizationPlan(file, options, assigned, metadata, tensors, layout, warnings, shards, shard_size)


def write_quantization(
    plan: QuantizationPlan,
    out: Path,
    *,
    force: bool = False,
    resume: bool = True,
    threads: int | None = None,
    progress: Progress = silent,
) -> Quantization:
    """The second pass: write, verify and name the file that `plan` describes; arguments and errors as in `quantize`."""
    changed = [tensor for tensor in plan.tensors if _changes(plan, tensor)]
    types.require_kernels((t.type for t in changed), importance=any(t.importance for t in changed))
    kernels.require({plan.source.tensors[t.name].type for t in changed} & {*types.BLOCKS})
    shards = plan.shards or ((plan.tensors, plan.layout),)
    check_model_target(out, len(shards), plan.source.files, force=force)
    kinds = {tensor.type for tensor in plan.tensors}
    job = describe_job("quantize", plan.options, plan.source.files, plan.layout.header, kinds)
    manifest = {**job, "shard size": str(plan.shard_size or "")}
    path, n_reused = write_model(out, shards, manifest, resume=resume, threads=threads, progress=progress)
    return Quantization(path, plan, n_reused)


def network_of(file: GGUFFile) -> Network:
    """What presets depend on, from the file's metadata.

    Raises:
        GGUFError: a number is missing, or there are more layers than tensors.
    """
    architecture = str(file.metadata.get("general.architecture", "unknown"))
    tied = "output.weight" not in file.tensors
    if architecture not in ARCHITECTURES:
        return Network(architecture, 0, 0, 0, 0, tied)

    def number(key: str, default: int | None = None) -> int:
        value = file.metadata.get(f"{architecture}.{key}", default)
        value = value[0] if isinstance(value, list) and value else value  # per layer: llama.cpp asks the first one
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise GGUFError(f"{file.path}: metadata {architecture}.{key} is missing or not a whole number")
        return value

    n_layer, n_head = number("block_count"), number("attention.head_count")
    if n_layer > len(file.tensors):
        raise GGUFError(f"{file.path}: {n_layer} layers, but only {len(file.tensors)} tensors")
    n_head_kv, d_model = number("attention.head_count_kv", n_head), number("embedding_length")
    return Network(architecture, n_layer, n_head, n_head_kv, d_model, tied, number("expert_count", 0))


def _refuse_file(file: GGUFFile) -> list[str]:
    refusals = []
    if not file.tensors:
        refusals.append(f"{file.path}: holds no tensors")
    if file.alignment > MAX_ALIGNMENT:
        refusals.append(f"{file.path}: aligns tensors to {file.alignment} bytes; at most {MAX_ALIGNMENT} make sense")
    return refusals


def _refuse_sources(file: GGUFFile, assigned: Assignment, allow_requantize: bool) -> list[str]:
    """Tensors to change whose stored type forbids it, one sentence per type."""
    groups: dict[str, list[str]] = {}
    for tensor in file.tensors.values():
        readable = tensor.type in types.FLOATS or (allow_requantize and tensor.type in types.BLOCKS)
        if tensor.type != assigned.types[tensor.name] and not readable:
            groups.setdefault(tensor.type.name, []).append(tensor.name)
    return [
        f"{len(names)} tensors are {name} already, such as {names[0]}; start from the f16 or bf16 file, or lose twice "
        "with --allow-requantize"
        for name, names in groups.items()
    ]


def _output(file: GGUFFile, info: TensorInfo, assigned: Assignment) -> OutputTensor:
    kind = assigned.types[info.name]
    return OutputTensor(
        info.name, info.shape, kind, (file.path.name,), lambda: _blocks(file, info, decode=kind != info.type)
    )


def _blocks(file: GGUFFile, info: TensorInfo, *, decode: bool) -> Iterator[NDArray[np.generic]]:
    """The tensor in pieces of whole rows (n, width): numbers, or (not `decode`) a block type's bytes as they are."""
    source, width = SourceTensor(file, info), info.shape[-1] if info.shape else 1
    for rows in source.blocks(max(1, BLOCK // max(width, 1)) * info.row_bytes):
        yield source.decode(rows) if decode else rows


def _target(file: GGUFFile, options: TypeOptions, guided: Consulted) -> tuple[Rule, ...] | None:
    """Rules that fill the user's target, from weights as numbers."""
    tensors = [
        OutputTensor(i.name, i.shape, i.type, (file.path.name,), functools.partial(_blocks, file, i, decode=True))
        for i in file.tensors.values()
    ]
    layout = lay_out(_metadata_kept(file), tensors, file.types)
    return target_rules(options, guided.guidance.attached(tensors), guided.guidance.complete, layout)


def _changes(plan: QuantizationPlan, tensor: OutputTensor) -> bool:
    return plan.source.tensors[tensor.name].type != tensor.type


def _metadata_kept(file: GGUFFile) -> dict[str, MetadataValue]:
    return {key: value for key, value in file.metadata.items() if not key.startswith((PREFIX, KEYS))}


def _metadata(file: GGUFFile, assigned: Assignment, options: TypeOptions) -> dict[str, MetadataValue]:
    """The source's keys in their order, the file type renewed, and how this file was made; no path, no time."""
    result: dict[str, MetadataValue] = {
        **_metadata_kept(file),
        "general.quantization_version": int(GGML_QUANT_VERSION),
        "general.file_type": assigned.file_type,
        PREFIX + "version": version("moe2gguf"),
        PREFIX + "type": options.type.lower(),
    }
    if rules := own_rules(options):
        result[PREFIX + "rules"] = [f"{rule.pattern}={rule.type.name}" for rule in rules]
    targets = {"target_size": options.target_size, "target_bpw": options.target_bpw}
    result |= {PREFIX + name: float(value) for name, value in targets.items() if value is not None}
    before = file.metadata.get("general.file_type")
    if isinstance(before, int):
        result[PREFIX + "source_file_type"] = before
    switches = {"pure": options.pure, "llama_cpp_mix": options.llama_cpp_mix, "fallback": bool(assigned.fallbacks)}
    switches["requantized"] = any(
        tensor.type not in types.FLOATS
        and may_quantize(tensor.name, tensor.shape)
        and assigned.types[name] != tensor.type
        for name, tensor in file.tensors.items()
    )
    return {**result, **{PREFIX + name: True for name, is_set in switches.items() if is_set}}
