"""The tensors of a file to come that is made from a dense GGUF file: planned first, made in the second pass.

Whole rows move and whole blocks are cut as bytes. Numbers are decoded and quantized again only where another type was
chosen, or where a down projection's neurons leave their blocks.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import list_names, list_ways
from moe2gguf.experts import slicing as cut
from moe2gguf.gguf import blocks, types
from moe2gguf.gguf.dense_model import DenseFile
from moe2gguf.gguf.file import TensorType
from moe2gguf.gguf.kernels import NEEDS_IMPORTANCE
from moe2gguf.gguf.source_tensor import SourceTensor
from moe2gguf.graphs import GRAPHS, Graph, find_graph_of
from moe2gguf.hf.safetensors import SourceDigest
from moe2gguf.recipes.source import list_whole_cuts
from moe2gguf.recipes.tensors import (
    Copy,
    ExpertColumns,
    ExpertRows,
    ExpertSource,
    PlannedTensor,
    RotaryHalves,
    RotaryPairs,
    Router,
    Scales,
    SelectionBias,
    make_unsourced,
    plan_projection,
    plan_router,
)
from moe2gguf.recipes.tensors_hf import BLOCK_BYTES
from moe2gguf.spec import Slicing

Array = NDArray[np.generic]

_MLP = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.weight")


def plan_tensors(dense: DenseFile, slicing: Slicing | None) -> tuple[PlannedTensor, ...]:
    """Every tensor of the file, in file order. `slicing` None keeps the dense MLPs.

    Types are those in which tensors are stored, and finer ones where a calibration moves neurons (`_find_finer`).
    """
    tensors = list[PlannedTensor]()
    graph = GRAPHS[slicing.target] if slicing else find_graph_of(dense.model)
    routed = set()
    for name, source in dense.tensors.items():
        kind, part = source.info.type, _MLP.fullmatch(name)
        if slicing is None or not part or int(part[1]) < slicing.leading_dense:
            made = _plan_copy(dense, name, graph)
            tensors.append(PlannedTensor(graph.rename(name), source.shape, kind, made, (name,)))
            continue
        i, role, d_model = int(part[1]), part[2], dense.model.d_model
        if i not in routed:
            routed.add(i)
            tensors += plan_router(slicing, d_model, i)
        if role == "down" and slicing.method.needs_calibration:
            kind = _find_finer(kind, slicing.d_expert)
        tensors += [
            PlannedTensor(cut_name, shape, kind, made, (name,))
            for cut_name, shape, made in plan_projection(slicing, d_model, role, i)
        ]
    if graph.needs_output and dense.model.tied_embeddings:
        embedding = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
        tensors.append(replace(embedding, name="output.weight"))
    return tuple(tensors)


def _find_finer(kind: TensorType, width: int) -> TensorType:
    """The type of down projections of `width` columns that were stored in `kind` and are quantized a second time.

    The second rounding must not be felt, or the file would not be the dense one with all experts (docs/log/experts.md).
    """
    fitting = (name for name in ("Q6_K", "Q8_0") if width % types.block_size(types.find_type(name)) == 0)
    finer = types.find_type(next(fitting, kind.name))
    return max(kind, finer, key=types.bits_per_weight)


def _plan_copy(dense: DenseFile, name: str, graph: Graph) -> Copy | RotaryPairs:
    """A tensor outside of the MLPs: as it is, or with its rows in the graph's order."""
    part = re.fullmatch(r"blk\.\d+\.attn_(q|k|qkv)\.(weight|bias)", name)
    if dense.rotates_halves == graph.rotates_halves or not part:
        return Copy()
    n_head, n_head_kv = dense.model.n_head, dense.model.n_head_kv
    turned = RotaryHalves if graph.rotates_halves else RotaryPairs
    if part[1] == "qkv":
        return turned((n_head, n_head_kv), n_head_kv * dense.model.d_head)
    return turned((n_head if part[1] == "q" else n_head_kv,))


def mark_copied(dense: DenseFile, slicing: Slicing | None, tensors: Sequence[PlannedTensor]) -> list[PlannedTensor]:
    """The tensors with their final types, each marked if the blocks of its source are copied."""
    return [replace(tensor, copied=_keeps_blocks(dense, slicing, tensor, tensor.type)) for tensor in tensors]


def _keeps_blocks(dense: DenseFile, slicing: Slicing | None, tensor: PlannedTensor, kind: TensorType) -> bool:
    """Whether a tensor that gets the type `kind` is made of the blocks of its source as they are."""
    if not tensor.sources or kind in types.FLOATS or kind != dense.tensors[tensor.sources[0]].info.type:
        return False
    return slicing is None or not isinstance(tensor.operation, ExpertColumns) or not _moves_neurons(slicing, kind)


def _moves_neurons(slicing: Slicing, kind: TensorType) -> bool:
    """Whether neurons may leave the blocks in which a down projection of type `kind` stores them."""
    return slicing.method.needs_calibration or slicing.grain % types.block_size(kind) != 0


def make_blocks(
    tensor: PlannedTensor, dense: DenseFile, experts: ExpertSource, digest: SourceDigest
) -> Iterator[Array]:
    """The arrays of which the tensor consists, one after the other; `digest` hashes the sources as they are read.

    Numbers, or where `tensor.type` is the block type of the source its blocks.

    Raises:
        GGUFError: the file became shorter.
        HarnessError: a type needs llama.cpp to be decoded, which is not installed.
    """
    if isinstance(tensor.operation, Router | SelectionBias | Scales):
        yield make_unsourced(tensor.operation, experts)
        return
    source = dense.tensors[tensor.sources[0]]
    keeps_type = tensor.type == source.info.type
    match tensor.operation:
        case Copy():
            yield from (piece if keeps_type else source.decode(piece) for piece in digest.blocks(source, BLOCK_BYTES))
        case RotaryPairs() as pairs:
            rows = digest.read(source)[pairs.order(dense.model.d_head)]
            yield rows if keeps_type else source.decode(rows)
        case ExpertRows(i, part):
            for rows in cut.slice_rows(digest.read(source), part.select(experts.layer(i).order)):
                yield rows if keeps_type else source.decode(rows)
        case ExpertColumns():
            yield from _make_columns(tensor, tensor.operation, source, experts, digest.read(source))


def _make_columns(
    tensor: PlannedTensor, operation: ExpertColumns, source: SourceTensor, experts: ExpertSource, stored: Array
) -> Iterator[Array]:
    """The down projection (d_model, d_ff), cut between its columns: as blocks where they stay whole."""
    layer = experts.layer(operation.layer)
    order, factors = operation.part.select(layer.order), operation.choose_factors(layer)
    if layer.down is not None:
        yield from cut.slice_columns(layer.down, order, factors)
    elif tensor.copied:
        chosen = blocks.find_block_order(order, source.block)
        assert chosen is not None, "the plan keeps blocks only where the slices do"  # noqa: S101 -- ours, not the user's
        yield from blocks.slice_blocks(stored.view(np.uint8), tensor.type, chosen, factors, source.name)
    else:
        yield from cut.slice_columns(source.decode(stored), order, factors)


def find_requantized(
    dense: DenseFile, slicing: Slicing | None, tensors: Sequence[PlannedTensor]
) -> dict[str, list[str]]:
    """Quantized tensors that are decoded and quantized again: "Q4_1 to Q8_0" -> names, file order.

    Where both types are the same, the neurons move.
    """
    groups: dict[str, list[str]] = {}
    for tensor in tensors:
        stored = dense.tensors[tensor.sources[0]].info.type if tensor.sources else types.find_type("F32")
        if stored not in types.FLOATS and not _keeps_blocks(dense, slicing, tensor, tensor.type):
            groups.setdefault(f"{stored.name} to {tensor.type.name}", []).append(tensor.name)
    return groups


def refuse_blocks(
    dense: DenseFile, slicing: Slicing | None, tensors: Sequence[PlannedTensor], *, allow: bool
) -> list[str]:
    """Down projections whose contiguous slices end inside blocks (unless `allow`), or that cannot be encoded again.

    And those whose blocks would have to be multiplied by what is no power of two.
    """
    if slicing is None:
        return []
    found = [*_refuse_factor(dense, slicing, tensors)]
    again = [
        tensor
        for tensor in tensors
        if isinstance(tensor.operation, ExpertColumns)
        and tensor.type == dense.tensors[tensor.sources[0]].info.type
        and tensor.type not in types.FLOATS
        and _moves_neurons(slicing, tensor.type)
        and slicing.d_expert % types.block_size(tensor.type) == 0  # others were refused with their types
    ]
    if again and not allow and not slicing.method.needs_calibration:
        found.append(_split_blocks(dense, slicing, again))
    if hopeless := [tensor for tensor in again if tensor.type in NEEDS_IMPORTANCE]:
        found.append(
            f"{hopeless[0].type.name} needs an importance matrix to be quantized again, for {_list_names(hopeless)}; "
            "give them another type with --tensor-type"
        )
    return found


def _refuse_factor(dense: DenseFile, slicing: Slicing, tensors: Sequence[PlannedTensor]) -> Iterator[str]:
    factor = float(cut.plain_scale(slicing)[-1])
    kept = [
        tensor
        for tensor in tensors
        if isinstance(tensor.operation, ExpertColumns) and _keeps_blocks(dense, slicing, tensor, tensor.type)
    ]
    if kept and not slicing.scale_tensor and not blocks.is_power_of_two(factor):
        yield (
            f"--target {slicing.target}: the {slicing.n_routed} routed experts are multiplied by {factor:g}, and the "
            f"blocks of {_list_names(kept)} only by powers of two; let --experts less --shared be one, or choose "
            "--target glm4moe"
        )


def _split_blocks(dense: DenseFile, slicing: Slicing, again: Sequence[PlannedTensor]) -> str:
    block = max(types.block_size(tensor.type) for tensor in again)
    ways = [
        *list_whole_cuts(dense, slicing, block),
        "quantize these tensors again with --allow-fallback",
        "give them another type with --tensor-type",
    ]
    return (
        f"{slicing.n_expert} experts of {slicing.d_expert} neurons cut through the blocks of {block} in which "
        f"{_list_names(again)} are stored:" + list_ways(ways)
    )


def _list_names(tensors: Sequence[PlannedTensor]) -> str:
    return list_names([tensor.name for tensor in tensors], 2)
