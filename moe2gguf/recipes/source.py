"""What a conversion may start from, behind one interface: a Hugging Face folder, or a dense GGUF file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from gguf import GGML_QUANT_VERSION

from moe2gguf.experts.layer import LayerExperts
from moe2gguf.gguf.blocks import is_power_of_two
from moe2gguf.gguf.dense_model import DenseFile, carried_metadata, largest_block, open_dense
from moe2gguf.gguf.file import ValueType
from moe2gguf.gguf.layout import Entry, lay_out
from moe2gguf.gguf.metadata import expert_metadata, model_metadata, provenance
from moe2gguf.gguf.vocabulary import vocabulary_metadata
from moe2gguf.gguf.writer import OutputTensor
from moe2gguf.hf.folder import Checkpoint, open_checkpoint
from moe2gguf.hf.safetensors import SourceDigest
from moe2gguf.quant.assign import Assignment, assign
from moe2gguf.quant.imatrix_match import Neurons
from moe2gguf.quant.imatrix_use import Consulted, consult
from moe2gguf.quant.presets import Network
from moe2gguf.quant.rules import Rule, TypeOptions
from moe2gguf.quant.target import target_rules
from moe2gguf.recipes import tensors_gguf as outputs_gguf
from moe2gguf.recipes import tensors_hf as outputs
from moe2gguf.recipes.tensors_hf import Experts
from moe2gguf.spec import Calibration, Metadata, MetadataValue, Slicing

Source: TypeAlias = Checkpoint | DenseFile
"""Both have `path`, `model`, `tensors`, `files`, `own_files` and `warnings`."""


@dataclass(frozen=True)
class Draft:
    """The file to come as far as the kind of source decides it; `kinds` is how metadata is stored where it is kept."""

    assigned: Assignment
    tensors: tuple[OutputTensor, ...]
    metadata: Mapping[str, MetadataValue]
    kinds: Mapping[str, ValueType] = field(default_factory=dict)
    refusals: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def open_source(path: Path, *, name: str | None = None) -> Source:
    """Open the model at `path`; `name` replaces its name in the metadata.

    Raises:
        CheckpointError: there is no model.
        GGUFError: a file that is no sound GGUF file, or a set of shards that is not whole.
        PlanError: every reason why the model cannot be converted.
    """
    return open_dense(path, name=name) if path.is_file() else open_checkpoint(path, name=name)


def fitted(source: Source, slicing: Slicing) -> Slicing:
    """`slicing` for this source: blocks of a GGUF file stay whole, and are amplified only by powers of two."""
    if isinstance(source, Checkpoint):
        return slicing
    exact = is_power_of_two(slicing.n_expert if slicing.method.amplify == "exact" else slicing.n_expert_used)
    grain = largest_block(source, slicing.d_expert, slicing.n_expert)
    scale_tensor = slicing.scale_tensor or not (exact or slicing.method.needs_calibration)
    return dataclasses.replace(slicing, grain=grain, scale_tensor=scale_tensor)


def draft(
    source: Source,
    slicing: Slicing | None,
    experts: Experts,
    digest: SourceDigest,
    options: TypeOptions,
    calibration: Calibration | None,
) -> Draft:
    """Every tensor and key of the file to come; no tensor is read. Raises PlanError as `assign` does."""
    if isinstance(source, Checkpoint):
        return _from_folder(source, slicing, experts, digest, options, calibration)
    return _from_gguf(source, slicing, experts, digest, options, calibration)


def _from_folder(
    source: Checkpoint,
    slicing: Slicing | None,
    experts: Experts,
    digest: SourceDigest,
    options: TypeOptions,
    calibration: Calibration | None,
) -> Draft:
    stored = outputs.output_tensors(source, slicing, experts, digest)
    guided, assigned = _assigned(source, slicing, experts, options, stored)
    metadata: dict[str, MetadataValue] = {
        **model_metadata(source.model, slicing, assigned.file_type),
        **source.card,
        **vocabulary_metadata(source.vocabulary),
        **_inherited(source.provenance),
        **provenance(source.model, slicing, calibration),
        **guided.metadata,
    }
    tensors = guided.guidance.attached(assigned.typed(stored))
    refusals = (*guided.refusals(stored, assigned), *_refuse_experts_of(guided, slicing))
    return Draft(assigned, tensors, metadata, refusals=refusals, warnings=tuple(guided.guidance.warnings))


def _inherited(provenance: Metadata) -> Metadata:
    """What a folder of ours says about how its experts were made; version and source are those of this conversion."""
    kinds = ("moe2gguf.slicing.", "moe2gguf.calibration.", "moe2gguf.heal.")
    return {key: value for key, value in provenance.items() if key.startswith(kinds)}


def _from_gguf(
    source: DenseFile,
    slicing: Slicing | None,
    experts: Experts,
    digest: SourceDigest,
    options: TypeOptions,
    calibration: Calibration | None,
) -> Draft:
    stored = outputs_gguf.stored_tensors(source, slicing)
    guided, assigned = _assigned(source, slicing, experts, options, stored)
    chosen = assigned.types
    tensors = guided.guidance.attached(outputs_gguf.output_tensors(source, slicing, experts, digest, chosen))
    changes: dict[str, MetadataValue] = expert_metadata(slicing) if slicing else {}
    if any(chosen[entry.name] != entry.type for entry in stored):
        changes |= {"general.file_type": assigned.file_type, "general.quantization_version": int(GGML_QUANT_VERSION)}
    changes |= provenance(source.model, slicing, calibration) | guided.metadata
    metadata, kinds = carried_metadata(source, changes)
    refusals = [*guided.refusals(stored, assigned), *_refuse_experts_of(guided, slicing)]
    if options.has_target:
        refusals.append(
            "--target-size, --target-bpw: types are chosen from unquantized weights; convert the model's folder"
        )
    refusals += outputs_gguf.refusals(source, slicing, chosen, allow=options.allow_fallback)
    again = outputs_gguf.requantized(source, slicing, chosen)
    warnings = [
        f"{len(names)} tensors are decoded and quantized again, {what}, such as {names[0]}"
        for what, names in again.items()
    ]
    return Draft(assigned, tensors, metadata, kinds, tuple(refusals), (*warnings, *guided.guidance.warnings))


def _assigned(
    source: Source, slicing: Slicing | None, experts: Experts, options: TypeOptions, stored: Sequence[Entry]
) -> tuple[Consulted, Assignment]:
    """What the importance matrix says about the tensors, and the type of each."""
    guided = consult(options, stored, _neurons(source, slicing, experts))
    network = _network(source, slicing, importance=guided.matrix is not None)
    rules = None
    if isinstance(source, Checkpoint) and options.has_target:
        rules = _target(source, slicing, guided, options)
    return guided, assign(stored, options, network, guided.guidance.complete, rules)


def _target(
    source: Checkpoint, slicing: Slicing | None, guided: Consulted, options: TypeOptions
) -> tuple[Rule, ...] | None:
    """Rules that fill the user's target; weights are measured in contiguous experts, whatever the grouping will be."""
    model = source.model
    plain = LayerExperts.plain(model.d_ff, model.d_model, slicing.n_expert, slicing.align, 1) if slicing else None
    experts = Experts(plain)
    tensors = outputs.output_tensors(source, slicing, experts, SourceDigest())
    guidance = guided.again(tensors, _neurons(source, slicing, experts))
    metadata = {**source.card, **vocabulary_metadata(source.vocabulary)}
    metadata |= {**model_metadata(model, slicing, 0), **provenance(model, slicing)}
    return target_rules(options, guidance.attached(tensors), guidance.complete, lay_out(metadata, tensors))


def _neurons(source: Source, slicing: Slicing | None, experts: Experts) -> Neurons | None:
    """How a matrix of the dense model maps to the experts; their order may be known only once they are made."""
    if slicing is None:
        return None
    return Neurons(source.model.d_ff, lambda i: experts.layer(i).order)


def _refuse_experts_of(guided: Consulted, slicing: Slicing | None) -> list[str]:
    """Experts that this run groups anew need not be those of the matrix."""
    if slicing is None or slicing.method.group == "contiguous" or not guided.per_expert:
        return []
    return [
        "--imatrix: was collected from experts, and which neurons an expert gets is decided in this run; give one of "
        "the dense model, or write f16 first and quantize that file with it"
    ]


def _network(source: Source, slicing: Slicing | None, *, importance: bool) -> Network:
    """What presets depend on, of the file to come."""
    model = source.model
    n_expert, tied = slicing.n_expert if slicing else model.n_expert, model.tied_embeddings
    return Network("llama", model.n_layer, model.n_head, model.n_head_kv, model.d_model, tied, n_expert, importance)
