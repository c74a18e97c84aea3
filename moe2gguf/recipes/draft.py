"""The tensors, types and metadata of a file to come, as far as the kind of its source decides them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from gguf import GGML_QUANT_VERSION

from moe2gguf.experts.slicing import Order
from moe2gguf.gguf.dense_model import DenseFile, carried_metadata
from moe2gguf.gguf.file import ValueType
from moe2gguf.gguf.metadata import expert_metadata, model_metadata, provenance, vocabulary_metadata
from moe2gguf.graphs import GRAPHS, find_graph_of
from moe2gguf.hf.folder import SOURCE_REPOSITORY, SOURCE_REVISION, Checkpoint
from moe2gguf.quant.assign import Assignment, assign
from moe2gguf.quant.imatrix import ImportanceMatrix
from moe2gguf.quant.imatrix_match import Guidance, Neurons, guide, record_imatrix
from moe2gguf.quant.presets import Network
from moe2gguf.quant.rules import Rule, TypeOptions
from moe2gguf.recipes import tensors_gguf, tensors_hf
from moe2gguf.recipes.file_plan import list_warnings
from moe2gguf.recipes.inputs import TypeInputs
from moe2gguf.recipes.source import Source, list_whole_cuts
from moe2gguf.recipes.tensors import PlannedTensor
from moe2gguf.spec import Calibration, Metadata, MetadataValue, Slicing


@dataclass(frozen=True)
class Draft:
    """`kinds` is how metadata is stored where it is kept from a GGUF file."""

    assigned: Assignment
    tensors: tuple[PlannedTensor, ...]
    metadata: Metadata
    kinds: Mapping[str, ValueType] = field(default_factory=dict)
    refusals: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What a draft is made for: the cut (None: none), the types, on what the experts are fitted.

    base  rules in place of those that the option `--type` stands for
    """

    slicing: Slicing | None
    options: TypeOptions
    inputs: TypeInputs
    calibration: Calibration | None = None
    base: Sequence[Rule] | None = None


def draft_file(source: Source, wanted: Wanted) -> Draft:
    """Every tensor and key of the file to come; nothing is read. Raises PlanError as `assign` does."""
    return _draft_from_folder(source, wanted) if isinstance(source, Checkpoint) else _draft_from_gguf(source, wanted)


def _draft_from_folder(source: Checkpoint, wanted: Wanted) -> Draft:
    slicing = wanted.slicing
    stored = tensors_hf.plan_tensors(source, slicing)
    guidance, assigned = _assign(source, wanted, stored)
    tensors = _mark_guided(guidance, assigned.set_types(stored))
    metadata: dict[str, MetadataValue] = {
        **model_metadata(source.model, slicing, assigned.file_type),
        **source.card,
        **vocabulary_metadata(source.vocabulary),
        **_inherit(source.provenance),
        **provenance(source.model, slicing, wanted.calibration),
        **record_imatrix(wanted.inputs.matrix, wanted.options),
    }
    return Draft(
        assigned,
        tensors,
        metadata,
        refusals=(*guidance.refusals(stored, assigned), *_refuse_experts_of(wanted.inputs.matrix, slicing)),
        warnings=tuple(list_warnings(guidance, tensors)),
    )


def _inherit(provenance: Metadata) -> Metadata:
    """Where a folder is from, and what one of ours says about how its experts were made."""
    kinds = ("moe2gguf.slicing.", "moe2gguf.calibration.", "moe2gguf.heal.", SOURCE_REPOSITORY, SOURCE_REVISION)
    return {key: value for key, value in provenance.items() if key.startswith(kinds)}


def _draft_from_gguf(source: DenseFile, wanted: Wanted) -> Draft:
    slicing, options = wanted.slicing, wanted.options
    stored = tensors_gguf.plan_tensors(source, slicing)
    guidance, assigned = _assign(source, wanted, stored)
    tensors = tensors_gguf.mark_copied(source, slicing, _mark_guided(guidance, assigned.set_types(stored)))
    changes: dict[str, MetadataValue] = expert_metadata(source.model, slicing) if slicing else {}
    if any(assigned.types[tensor.name] != tensor.type for tensor in stored):
        changes |= {"general.file_type": assigned.file_type, "general.quantization_version": int(GGML_QUANT_VERSION)}
    changes |= provenance(source.model, slicing, wanted.calibration) | record_imatrix(wanted.inputs.matrix, options)
    graph = GRAPHS[slicing.target] if slicing else find_graph_of(source.model)
    metadata, kinds = carried_metadata(source, changes, graph.architecture)
    refusals = [*guidance.refusals(stored, assigned), *_refuse_experts_of(wanted.inputs.matrix, slicing)]
    if options.has_target:
        refusals.append(
            "--target-size, --target-bpw: types are chosen for the weights of a folder; leave it out, then give it to "
            "`moe2gguf quantize OUT SMALLER --target-size SIZE --allow-requantize`"
        )
    refusals += tensors_gguf.refuse_blocks(source, slicing, tensors, allow=options.allow_fallback)
    warnings = [
        f"{len(names)} tensors are decoded and quantized again, {what}, such as {names[0]}"
        for what, names in tensors_gguf.find_requantized(source, slicing, tensors).items()
    ]
    return Draft(
        assigned, tuple(tensors), metadata, kinds, tuple(refusals), (*warnings, *list_warnings(guidance, tensors))
    )


def _assign(source: Source, wanted: Wanted, stored: Sequence[PlannedTensor]) -> tuple[Guidance, Assignment]:
    """What the importance matrix has for the tensors, and the type of each."""
    neurons = Neurons(source.model.d_ff, _raise_unknown_order) if wanted.slicing else None
    options, inputs = wanted.options, wanted.inputs
    guidance = guide(inputs.matrix, stored, neurons, options.imatrix_repair)
    network = _describe_network(source, wanted.slicing, importance=inputs.matrix is not None)

    def list_cuts(block: int) -> list[str]:
        return list_whole_cuts(source, wanted.slicing, block) if wanted.slicing else []

    arguments = (guidance.importance, wanted.base, inputs.rules)
    return guidance, assign(stored, options, network, *arguments, list_cuts=list_cuts)


def _mark_guided(guidance: Guidance, tensors: Sequence[PlannedTensor]) -> tuple[PlannedTensor, ...]:
    return tuple(replace(tensor, guided=tensor.name in guidance.importance) for tensor in tensors)


def _raise_unknown_order(i: int) -> Order:
    raise LookupError(f"which neurons the experts of layer {i} hold is not known before they are made")


def _refuse_experts_of(matrix: ImportanceMatrix | None, slicing: Slicing | None) -> list[str]:
    """Experts that this run groups anew need not be those of the matrix."""
    if slicing is None or slicing.method.group == "contiguous" or not (matrix and matrix.is_per_expert):
        return []
    return [
        "--imatrix: was collected from experts, and which neurons an expert gets is decided in this run; give one of "
        "the dense model, or write f16 first and quantize that file with it"
    ]


def _describe_network(source: Source, slicing: Slicing | None, *, importance: bool) -> Network:
    """What presets depend on, of the file to come."""
    model, graph = source.model, GRAPHS[slicing.target] if slicing else find_graph_of(source.model)
    return Network(
        "llama",
        model.n_layer,
        model.n_head,
        model.n_head_kv,
        model.d_model,
        model.tied_embeddings and not graph.needs_output,
        slicing.n_routed if slicing else model.n_expert,
        importance,
        with_values=tuple(range(model.n_layer)),
        n_empty=int(graph.empty_layer),
    )
