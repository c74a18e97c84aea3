"""The tensors of a file to come that is made from a Hugging Face folder: planned first, made in the second pass."""

from collections.abc import Iterator, Sequence

import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from numpy.typing import NDArray

from moe2gguf.experts import slicing as cut
from moe2gguf.gguf.metadata import rope_frequencies
from moe2gguf.graphs import GRAPHS, find_graph_of
from moe2gguf.hf.families import DENSE, EMBEDDING, MIXTRAL_FUSED, MLPPlace, find_layout, lay_out_tensors
from moe2gguf.hf.folder import Checkpoint
from moe2gguf.hf.safetensors import DTYPES, SourceDigest, StoredTensor
from moe2gguf.quant.assign import find_stored_type
from moe2gguf.recipes.tensors import (
    Copy,
    ExpertColumns,
    ExpertRows,
    ExpertSource,
    Half,
    Operation,
    PlannedTensor,
    RopeDivisors,
    RotaryPairs,
    Router,
    Scales,
    SelectionBias,
    Stack,
    make_unsourced,
    plan_projection,
    plan_router,
)
from moe2gguf.spec import Slicing

Array = NDArray[np.generic]

ROLES = {
    "ffn_gate_inp": "router",
    "exp_probs_b": "bias",
    **{f"ffn_{role}_exps": role for role in ("gate", "up", "down")},
    **{f"ffn_{role}_shexp": f"shared_{role}" for role in ("gate", "up", "down")},
}
"""What a tensor of an MLP is called in a GGUF file -> its role in a folder."""

BLOCK_BYTES = 1 << 20
"""Row-wise tensors (the embedding, the output matrix) pass through memory in pieces of this size, which stay in the
cache while they are hashed, checked and written."""


def plan_tensors(checkpoint: Checkpoint, slicing: Slicing | None) -> tuple[PlannedTensor, ...]:
    """Every tensor of the file, in file order, typed as stored. `slicing` None keeps the checkpoint's MLPs."""
    model, tensors = checkpoint.model, list[PlannedTensor]()
    graph = GRAPHS[slicing.target] if slicing else find_graph_of(model)
    if model.rope.kind == "llama3":
        tensors.append(PlannedTensor("rope_freqs.weight", (model.d_head // 2,), GGMLType.F32, RopeDivisors()))
    for place in lay_out_tensors(model):
        if isinstance(place, MLPPlace):
            tensors += _plan_mlp(checkpoint, slicing, place.i)
            continue
        rule, i = place
        source = checkpoint.tensors[rule.source.format(i=i)]
        pairs = rule.permute and not graph.rotates_halves
        made = RotaryPairs((getattr(model, rule.permute),)) if pairs else Copy()
        tensors.append(_plan(graph.rename(rule.target).format(i=i), source.shape, made, [source]))
    if graph.needs_output and model.tied_embeddings:
        embedding = checkpoint.tensors[EMBEDDING]
        tensors.append(_plan("output.weight", embedding.shape, Copy(), [embedding]))
    return tuple(tensors)


def _plan_mlp(checkpoint: Checkpoint, slicing: Slicing | None, i: int) -> list[PlannedTensor]:
    """The MLP of layer `i`: experts that are there already, the dense one, or one that is cut."""
    if find_layout(checkpoint.mlp, checkpoint.model, i) is not DENSE:
        return _plan_existing_experts(checkpoint, i)
    if slicing is not None and i >= slicing.leading_dense:
        return plan_sliced_mlp(checkpoint, slicing, i)
    sources = {role: _find_sources(checkpoint, role, i) for role in ("gate", "up", "down")}
    return [_plan(f"blk.{i}.ffn_{role}.weight", one[0].shape, Copy(), one) for role, one in sources.items()]


def plan_sliced_mlp(checkpoint: Checkpoint, slicing: Slicing, i: int) -> list[PlannedTensor]:
    """One MLP, cut into experts: the router, then gate, up, down, each with the shared expert's where there is one."""
    d_model = checkpoint.model.d_model
    return plan_router(slicing, d_model, i) + [
        _plan(name, shape, made, _find_sources(checkpoint, role, i))
        for role in ("gate", "up", "down")
        for name, shape, made in plan_projection(slicing, d_model, role, i)
    ]


def _plan_existing_experts(checkpoint: Checkpoint, i: int) -> list[PlannedTensor]:
    """The router, the experts of a checkpoint that has them, stacked, and the shared one if there is one."""
    tensors, stored = [], checkpoint.mlp.tensors
    for part, role in ROLES.items():
        name = f"blk.{i}.{part}.{'bias' if role == 'bias' else 'weight'}"
        if role in stored:
            sources = _find_sources(checkpoint, role, i)
            stacked, shape = "{e}" in stored[role][0], sources[0].shape
            made: Operation = Stack() if stacked else Copy()
            tensors.append(_plan(name, (len(sources), *shape) if stacked else shape, made, sources))
        elif role in ("gate", "up") and "gate_up" in stored:
            sources = _find_sources(checkpoint, "gate_up", i)
            n_expert, height, d_model = sources[0].shape
            tensors.append(_plan(name, (n_expert, height // 2, d_model), Half(int(role == "up")), sources))
    return tensors


def _plan(name: str, shape: tuple[int, ...], made: Operation, sources: Sequence[StoredTensor]) -> PlannedTensor:
    """A tensor of the type in which its sources are stored."""
    kind = find_stored_type(name, shape, DTYPES[sources[0].dtype])
    return PlannedTensor(name, shape, kind, made, tuple(source.name for source in sources))


def _find_sources(checkpoint: Checkpoint, role: str, i: int) -> list[StoredTensor]:
    """The stored tensors of one role of layer `i`'s MLP: one, or one per expert."""
    name = find_layout(checkpoint.mlp, checkpoint.model, i).tensors[role][0]
    experts = range(checkpoint.model.n_expert) if "{e}" in name else range(1)
    return [checkpoint.tensors[name.format(i=i, e=e)] for e in experts]


def make_blocks(
    tensor: PlannedTensor, checkpoint: Checkpoint, experts: ExpertSource, digest: SourceDigest
) -> Iterator[Array]:
    """The arrays of which the tensor consists, one after the other; `digest` hashes the sources as they are read.

    Raises:
        CheckpointError: a file ends before a tensor does.
    """
    sources = [checkpoint.tensors[name] for name in tensor.sources]
    match tensor.operation:
        case Copy():
            yield from digest.blocks(sources[0], BLOCK_BYTES)
        case RotaryPairs() as pairs:
            yield digest.read(sources[0])[pairs.order(checkpoint.model.d_head)]
        case Stack():
            yield from (digest.read(source) for source in sources)
        case Half(which):
            for expert in digest.blocks(sources[0], sources[0].n_bytes // tensor.shape[0]):
                yield np.split(expert, 2, axis=1)[which]
        case ExpertRows(i, part):
            yield from cut.slice_rows(digest.read(sources[0]), part.select(experts.layer(i).order))
        case ExpertColumns(i, part):
            layer, stored = experts.layer(i), digest.read(sources[0])
            factors = tensor.operation.choose_factors(layer)
            yield from cut.slice_columns(
                stored if layer.down is None else layer.down, part.select(layer.order), factors
            )
        case Router() | SelectionBias() | Scales() as made:
            yield make_unsourced(made, experts)
        case RopeDivisors():
            yield rope_frequencies(checkpoint.model.rope, checkpoint.model.d_head)


def expert_stacks(checkpoint: Checkpoint, i: int) -> dict[str, NDArray[np.float32]]:
    """The MLP of layer `i` of a checkpoint with experts by role as float32, experts stacked, whatever its layout.

    Shapes: router (n_expert, d_model), gate and up (n_expert, d_expert, d_model), down (n_expert, d_model, d_expert);
    where there is a shared expert, also its shared_gate and shared_up (d_shared, d_model), shared_down
    (d_model, d_shared), and the bias (n_expert,) of the choice.
    """

    def read(role: str) -> NDArray[np.float32]:
        arrays = [source.read().astype(np.float32) for source in _find_sources(checkpoint, role, i)]
        return np.stack(arrays) if "{e}" in checkpoint.mlp.tensors[role][0] else arrays[0]

    found = {role: read(role) for role in checkpoint.mlp.tensors}
    if checkpoint.mlp is MIXTRAL_FUSED:
        found["gate"], found["up"] = np.split(found.pop("gate_up"), 2, axis=1)
    return found
