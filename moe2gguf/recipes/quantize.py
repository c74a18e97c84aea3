"""A GGUF file becomes the same file with other tensor types: `quantize`, from top to bottom."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION
from gguf import GGUFValueType as Kind
from numpy.typing import NDArray

from moe2gguf.errors import GGUFError, PlanError
from moe2gguf.gguf import kernels, types
from moe2gguf.gguf.counts import find_graph
from moe2gguf.gguf.expected import check_architecture, is_sliced
from moe2gguf.gguf.file import Findings, GGUFFile, ValueType, refuse_alignment
from moe2gguf.gguf.layout import lay_out
from moe2gguf.gguf.outputs import check_model_target, require_room
from moe2gguf.gguf.resume import describe_job
from moe2gguf.gguf.shards import lay_out_files, read_model
from moe2gguf.gguf.source_tensor import SourceTensor
from moe2gguf.gguf.writer import OutputTensor, write_model
from moe2gguf.progress import Progress, silent
from moe2gguf.quant.assign import Assignment, assign, may_quantize
from moe2gguf.quant.imatrix_match import KEYS, find_neurons, guide, note_other_model, record_imatrix
from moe2gguf.quant.presets import Network
from moe2gguf.quant.rules import Rule, TypeOptions
from moe2gguf.quant.target import choose_types, refuse_target
from moe2gguf.recipes.file_plan import FilePlan, list_warnings
from moe2gguf.recipes.inputs import TypeInputs, read_type_inputs
from moe2gguf.recipes.tensors import Copy, PlannedTensor
from moe2gguf.spec import MetadataValue

BLOCK = 4 << 20
"""Elements of a tensor that are in memory together."""

PREFIX = "moe2gguf.quantize."

_WITH_VALUES = re.compile(r"blk\.(\d{1,9})\.attn_(?:v|qkv|kv_b)\.weight")


@dataclass(frozen=True, kw_only=True)
class QuantizationPlan(FilePlan):
    """The plan of a quantization, a value.

    has_open_types  the types for a target size are not chosen yet: see `fit_types`
    """

    source: GGUFFile
    options: TypeOptions
    allow_requantize: bool = False
    shard_size: int | None = None
    has_open_types: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        common = super().to_dict()
        for tensor in common["tensors"]:
            tensor["stored"] = self.source.tensors[tensor["name"]].type.name
        return {"source": str(self.source.path), "source_size": self.source.file_size, **common}


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
    source: str | Path,
    out: str | Path,
    options: TypeOptions,
    *,
    allow_requantize: bool = False,
    shard_size: int | None = None,
    force: bool = False,
    resume: bool = True,
    threads: int | None = None,
    progress: Progress = silent,
    on_plan: Callable[[QuantizationPlan], None] = lambda _: None,
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
        progress: receives stages ("choose types", "write", "verify") and the units done.
        on_plan: is given the plan before anything is written.

    Raises:
        PlanError: the options do not fit the file; every reason is listed.
        ImportanceError: the importance matrix is broken.
        GGUFError: `source` is not a sound GGUF file, or the written file did not verify.
        CorruptWeightError: a weight is NaN, infinite, or too large for its type.
        HarnessError: a type needs llama.cpp's kernels, and they are not installed.
        OutputError: `out` cannot be written, must not be replaced, or is unfinished from another job.
    """
    out = Path(out)

    # Open the file, read what the options name, and plan every tensor and byte.
    file = read_model(Path(source))
    inputs = read_type_inputs(options)
    plan = make_plan(file, options, inputs, allow_requantize=allow_requantize, shard_size=shard_size)
    plan = fit_types(plan, inputs, progress, functools.partial(require_room, out))
    stored = {name: SourceTensor(file, info) for name, info in file.tensors.items()}
    plan = dataclasses.replace(plan, warnings=(*plan.warnings, *note_other_model(inputs.matrix, stored)))
    on_plan(plan)
    _require_kernels(plan)
    check_model_target(out, len(plan.files), [*file.files, *options.files], force=force, size=plan.file_size)

    # Decode, encode, write, verify and name the files.
    kinds = {tensor.type for tensor in plan.tensors}
    manifest = describe_job("quantize", options, file.files, plan.header, kinds)
    tensors = {tensor.name: tensor for tensor in _make_outputs(plan, plan.tensors, inputs)}
    path, n_reused = write_model(
        out,
        [([tensors[tensor.name] for tensor in planned], layout) for planned, layout in plan.files],
        {**manifest, "shard size": str(shard_size or "")},
        resume=resume,
        threads=threads,
        progress=progress,
    )
    return Quantization(path, plan, n_reused)


def plan_quantization(
    source: str | Path,
    options: TypeOptions,
    *,
    allow_requantize: bool = False,
    shard_size: int | None = None,
    progress: Progress = silent,
) -> QuantizationPlan:
    """The plan of what `quantize` would write. No weight is read, but for a target size; errors as in `quantize`."""
    file, inputs = read_model(Path(source)), read_type_inputs(options)
    plan = make_plan(file, options, inputs, allow_requantize=allow_requantize, shard_size=shard_size)
    return fit_types(plan, inputs, progress)


def make_plan(
    file: GGUFFile,
    options: TypeOptions,
    inputs: TypeInputs,
    base: Sequence[Rule] | None = None,
    *,
    allow_requantize: bool = False,
    shard_size: int | None = None,
) -> QuantizationPlan:
    """Plan the quantization of `file`; `base` are rules for types in place of those that `options.type` stands for.

    Raises:
        PlanError: the options do not fit the file; every reason is listed.
    """
    if refusals := [*_refuse_file(file), *refuse_target(options)]:
        raise PlanError(refusals)
    open_types = options.has_target and base is None
    stored = _list_stored(file)
    guidance = guide(inputs.matrix, stored, find_neurons(file), options.imatrix_repair)
    network = dataclasses.replace(describe_network(file), importance=inputs.matrix is not None)
    assigned = assign(stored, options, network, guidance.importance, base, inputs.rules)
    refusals = [*assigned.refusals, *_refuse_sources(file, assigned, allow_requantize)]
    if refusals := [*refusals, *guidance.refusals(stored, assigned)]:
        raise PlanError(refusals, _join_ways(refusals))
    tensors = tuple(
        dataclasses.replace(
            tensor,
            copied=tensor.type in types.BLOCKS and tensor.type == file.tensors[tensor.name].type,
            guided=tensor.name in guidance.importance,
        )
        for tensor in assigned.set_types(stored)
    )
    metadata = {**_make_metadata(file, assigned, options, inputs.rules), **record_imatrix(inputs.matrix, options)}
    kinds = file.kinds_of(metadata)
    return QuantizationPlan(
        source=file,
        options=options,
        assigned=assigned,
        metadata=metadata,
        tensors=tensors,
        files=lay_out_files(metadata, tensors, kinds, None if open_types else shard_size),
        warnings=(*assigned.warnings, *list_warnings(guidance, tensors)),
        allow_requantize=allow_requantize,
        shard_size=shard_size,
        has_open_types=open_types,
    )


def fit_types(
    plan: QuantizationPlan,
    inputs: TypeInputs,
    progress: Progress = silent,
    on_size: Callable[[int], None] = lambda _: None,
) -> QuantizationPlan:
    """The plan with the types that have the least error under its target, for which weights are read.

    A plan without a target stays as it is. `on_size` is given the bytes of the file to come before that. Errors as in
    `moe2gguf.quant.target.choose_types`.
    """
    if not plan.has_open_types:
        return plan
    file, options = plan.source, plan.options
    tensors = _make_outputs(plan, _list_stored(file), inputs, decode=True)
    guidance = guide(inputs.matrix, tensors, find_neurons(file), options.imatrix_repair)
    header_size = len(lay_out(_keep_metadata(file), tensors, file.types).header)
    rules = choose_types(options, inputs.rules, tensors, guidance.importance, header_size, progress, on_size)
    return make_plan(file, options, inputs, rules, allow_requantize=plan.allow_requantize, shard_size=plan.shard_size)


def _require_kernels(plan: QuantizationPlan) -> None:
    """Raise HarnessError, before anything is written, where a type to read or to write needs a missing kernel."""
    changed = [tensor for tensor in plan.tensors if plan.source.tensors[tensor.name].type != tensor.type]
    types.require_kernels((tensor.type for tensor in changed), importance=any(tensor.guided for tensor in changed))
    kernels.require({plan.source.tensors[tensor.name].type for tensor in changed} & {*types.BLOCKS})


def _list_stored(file: GGUFFile) -> list[PlannedTensor]:
    return [PlannedTensor(info.name, info.shape, info.type, Copy(), (info.name,)) for info in file.tensors.values()]


def _make_outputs(
    plan: QuantizationPlan, tensors: Sequence[PlannedTensor], inputs: TypeInputs, *, decode: bool = False
) -> list[OutputTensor]:
    """The tensors with what makes their arrays; `decode`: as numbers, whatever their type is."""
    file = plan.source
    importance = guide(inputs.matrix, tensors, find_neurons(file), plan.options.imatrix_repair).importance
    return [
        OutputTensor(
            tensor.name,
            tensor.shape,
            tensor.type,
            (file.path.name,),
            functools.partial(_make_blocks, SourceTensor(file, stored), decode or tensor.type != stored.type),
            copied=tensor.copied,
            importance=importance.get(tensor.name),
        )
        for tensor in tensors
        for stored in (file.tensors[tensor.name],)
    ]


def _make_blocks(source: SourceTensor, decode: bool) -> Iterator[NDArray[np.generic]]:
    """The tensor in pieces of whole rows (n, width): numbers, or (not `decode`) a block type's bytes as they are."""
    width = source.shape[-1] if source.shape else 1
    for rows in source.blocks(max(1, BLOCK // max(width, 1)) * source.info.row_bytes):
        yield source.decode(rows) if decode else rows


def describe_network(file: GGUFFile) -> Network:
    """What presets depend on, from the file's metadata.

    Raises:
        GGUFError: a number is missing, or there are more layers than tensors.
    """
    architecture = str(file.metadata.get("general.architecture", "unknown"))
    tied = "output.weight" not in file.tensors

    graph = find_graph(architecture)
    missing = None if graph else 0  # of others `make_base_rules` refuses what needs a number

    def number(key: str, default: int | None = missing) -> int:
        value = file.metadata.get(f"{architecture}.{key}", default)
        value = value[0] if isinstance(value, list) and value else value  # per layer: llama.cpp asks the first one
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise GGUFError(f"{file.path}: metadata {architecture}.{key} is missing or not a whole number")
        return value

    n_layer, n_head = number("block_count"), number("attention.head_count")
    if n_layer > len(file.tensors):
        raise GGUFError(f"{file.path}: {n_layer} layers, but only {len(file.tensors)} tensors")
    n_head_kv, d_model = number("attention.head_count_kv", n_head), number("embedding_length")
    n_expert, found = number("expert_count", 0), (_WITH_VALUES.fullmatch(name) for name in file.tensors)
    values = sorted(int(match[1]) for match in found if match)
    n_empty = int(graph is not None and graph.empty_layer and is_sliced(file))
    sizes = (n_layer - n_empty, n_head, n_head_kv, d_model)
    return Network(architecture, *sizes, tied, n_expert, with_values=tuple(values), n_empty=n_empty)


def _refuse_file(file: GGUFFile) -> list[str]:
    """What `verify` would say of the keys and names of the file to come, which are those of this one."""
    if not file.tensors:
        return [f"{file.path}: holds no tensors"]
    check_architecture(file, found := Findings())
    return [f"{file.path}: {problem}" for problem in found.problems] + refuse_alignment(file)


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


def _join_ways(refusals: Sequence[str]) -> str:
    """The options that allow all of this, where it takes more than one."""
    text = " ".join(refusals)
    needed = [
        option for option in ("--allow-fallback", "--allow-requantize", "--imatrix-repair ones") if option in text
    ]
    return f"to allow all of it: {' '.join(needed)}" if len(needed) > 1 else ""


def _keep_metadata(file: GGUFFile) -> dict[str, MetadataValue]:
    return {key: value for key, value in file.metadata.items() if not key.startswith((PREFIX, KEYS))}


def _make_metadata(
    file: GGUFFile, assigned: Assignment, options: TypeOptions, rules: Sequence[Rule]
) -> dict[str, MetadataValue]:
    """The source's keys in their order, the file type renewed, and how this file was made; no path, no time."""
    result: dict[str, MetadataValue] = {
        **_keep_metadata(file),
        "general.quantization_version": int(GGML_QUANT_VERSION),
        "general.file_type": assigned.file_type,
        PREFIX + "version": version("moe2gguf"),
        PREFIX + "type": options.type.lower(),
    }
    if rules:
        result[PREFIX + "rules"] = [f"{rule.pattern}={rule.type.name}" for rule in rules]
    targets = {"target_size": options.target_size, "target_bpw": options.target_bpw}
    result |= {PREFIX + name: float(value) for name, value in targets.items() if value is not None}
    before = file.metadata.get("general.file_type")
    if isinstance(before, int) and file.types["general.file_type"] == ValueType(Kind.UINT32):
        result[PREFIX + "source_file_type"] = before
    switches = {"pure": options.pure, "llama_cpp_mix": options.llama_cpp_mix, "fallback": bool(assigned.fallbacks)}
    switches["requantized"] = any(
        tensor.type not in types.FLOATS
        and may_quantize(tensor.name, tensor.shape)
        and assigned.types[name] != tensor.type
        for name, tensor in file.tensors.items()
    )
    return {**result, **{PREFIX + name: True for name, is_set in switches.items() if is_set}}
