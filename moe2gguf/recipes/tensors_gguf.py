"""Every tensor of the file to come, made from a dense GGUF file.

Whole rows move and whole blocks are cut as bytes. Numbers are decoded and quantized again only where another type was
chosen, or where a down projection's neurons leave their blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import list_names
from moe2gguf.experts import slicing as cut
from moe2gguf.experts.layer import LayerExperts
from moe2gguf.gguf import blocks, types
from moe2gguf.gguf.dense_model import DenseFile
from moe2gguf.gguf.file import TensorType
from moe2gguf.gguf.kernels import NEEDS_IMPORTANCE
from moe2gguf.gguf.layout import Entry
from moe2gguf.gguf.source_tensor import SourceTensor
from moe2gguf.gguf.writer import Blocks, OutputTensor
from moe2gguf.hf.safetensors import SourceDigest
from moe2gguf.recipes.tensors_hf import BLOCK_BYTES, Experts, made
from moe2gguf.spec import Slicing

Array = NDArray[np.generic]

_MLP = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.weight")


def stored_tensors(dense: DenseFile, slicing: Slicing | None) -> list[Entry]:
    """Every tensor of the file to come, in file order, with the type in which it is stored."""
    entries: list[Entry] = []
    routed = set()
    for name, source in dense.tensors.items():
        part = _MLP.fullmatch(name)
        if slicing is None or not part:
            entries.append(Entry(name, source.shape, source.info.type))
            continue
        layer, role = f"blk.{part[1]}", part[2]
        n, d_model, d_expert = slicing.n_expert, dense.model.d_model, slicing.d_expert
        if layer not in routed:
            routed.add(layer)
            entries.append(Entry(f"{layer}.ffn_gate_inp.weight", (n, d_model), types.named("F32")))
            if slicing.scale_tensor:
                entries.append(Entry(f"{layer}.ffn_down_exps.scale", (n,), types.named("F32")))
        shape = (d_model, d_expert) if role == "down" else (d_expert, d_model)
        entries.append(Entry(f"{layer}.ffn_{role}_exps.weight", (n, *shape), source.info.type))
    return entries


def output_tensors(
    dense: DenseFile,
    slicing: Slicing | None,
    experts: Experts,
    digest: SourceDigest,
    chosen: Mapping[str, TensorType],
) -> tuple[OutputTensor, ...]:
    """The tensors of `stored_tensors` with their `chosen` types, and how each is made."""
    tensors = []
    for entry in stored_tensors(dense, slicing):
        kind = chosen[entry.name]
        source = dense.tensors.get(entry.name.replace("_exps.weight", ".weight"))
        if source is None:
            tensors.append(_ours(entry, experts))
            continue
        make, copied = _maker(dense, source, kind, slicing, experts, digest)
        tensors.append(OutputTensor(entry.name, entry.shape, kind, (source.name,), make, copied=copied))
    return tuple(tensors)


def _ours(entry: Entry, experts: Experts) -> OutputTensor:
    """A router, or the experts' scales."""
    i = int(entry.name.split(".")[1])
    if entry.name.endswith(".scale"):
        return made(entry.name, entry.shape, lambda: experts.layer(i).scale)
    return made(entry.name, entry.shape, lambda: experts.layer(i).router)


def _maker(
    dense: DenseFile,
    source: SourceTensor,
    kind: TensorType,
    slicing: Slicing | None,
    experts: Experts,
    digest: SourceDigest,
) -> tuple[Blocks, bool]:
    """What makes the tensor, and whether its blocks are copied rather than quantized."""
    keeps = kind == source.info.type and source.info.type not in types.FLOATS
    part = _MLP.fullmatch(source.name)
    if slicing is None or not part:
        order = dense.row_order(source.name)
        if order is None:
            return lambda: (_as(kind, source, piece) for piece in digest.blocks(source, BLOCK_BYTES)), keeps
        return lambda: iter([_as(kind, source, digest.read(source)[order])]), keeps
    layer = _layer(experts, int(part[1]))
    if part[2] != "down":
        return lambda: _rows(source, kind, layer(), digest.read(source)), keeps
    keeps = keeps and not moves_neurons(slicing, source.block)
    return lambda: _down(source, kind, slicing, layer(), digest.read(source)), keeps


def _layer(experts: Experts, i: int) -> Callable[[], LayerExperts]:
    return lambda: experts.layer(i)


def _rows(source: SourceTensor, kind: TensorType, layer: LayerExperts, weight: Array) -> Iterator[Array]:
    """The gate or up projection (d_ff, d_model), cut between its rows."""
    return (_as(kind, source, rows) for rows in cut.slice_rows(weight, layer.order))


def _as(kind: TensorType, source: SourceTensor, rows: Array) -> Array:
    """Stored rows as the writer wants them: as they are, or decoded where blocks become another type."""
    return rows if kind == source.info.type else source.decode(rows)


def _down(
    source: SourceTensor, kind: TensorType, slicing: Slicing, layer: LayerExperts, weight: Array
) -> Iterator[Array]:
    """The down projection (d_model, d_ff), cut between its columns: as blocks where they stay whole."""
    factors = np.ones_like(layer.scale) if slicing.scale_tensor else layer.scale
    if layer.down is not None:
        yield from cut.slice_columns(layer.down, layer.order, factors)
    elif source.info.type in types.FLOATS:
        yield from cut.slice_columns(weight, layer.order, factors)
    elif kind == source.info.type and not moves_neurons(slicing, source.block):
        chosen = blocks.block_order(layer.order, source.block)
        assert chosen is not None, "the plan keeps blocks only where the slices do"  # noqa: S101 -- ours, not the user's
        yield from blocks.slice_blocks(weight.view(np.uint8), kind, chosen, factors, source.name)
    else:
        yield from cut.slice_columns(source.decode(weight), layer.order, factors)


def moves_neurons(slicing: Slicing, block: int) -> bool:
    """Whether neurons may leave the blocks of `block` in which a down projection stores them."""
    return slicing.method.needs_calibration or slicing.grain % block != 0


def requantized(dense: DenseFile, slicing: Slicing | None, chosen: Mapping[str, TensorType]) -> dict[str, list[str]]:
    """Quantized tensors that are decoded and quantized again: "Q4_1 to Q8_0" -> names, file order.

    Where both types are the same, the neurons move.
    """
    groups: dict[str, list[str]] = {}
    for entry in stored_tensors(dense, slicing):
        kind = chosen[entry.name]
        if entry.type in types.FLOATS:
            continue
        moves = slicing is not None and entry.name.endswith(".ffn_down_exps.weight")
        if kind != entry.type or (moves and slicing and moves_neurons(slicing, types.block_size(entry.type))):
            groups.setdefault(f"{entry.type.name} to {kind.name}", []).append(entry.name)
    return groups


def refusals(dense: DenseFile, slicing: Slicing | None, chosen: Mapping[str, TensorType], *, allow: bool) -> list[str]:
    """Down projections whose contiguous slices end inside blocks (unless `allow`), or that cannot be encoded again."""
    if slicing is None:
        return []
    found = []
    again = [
        entry
        for entry in stored_tensors(dense, slicing)
        if entry.name.endswith(".ffn_down_exps.weight")
        and chosen[entry.name] == entry.type
        and entry.type not in types.FLOATS
        and moves_neurons(slicing, types.block_size(entry.type))
    ]
    if again and not allow and not slicing.method.needs_calibration:
        found.append(_split_blocks(dense, slicing, again))
    if hopeless := [entry for entry in again if entry.type in NEEDS_IMPORTANCE]:
        found.append(
            f"{hopeless[0].type.name} needs an importance matrix to be quantized again, for {_names(hopeless)}; "
            "give them another type with --tensor-type"
        )
    return found


def _split_blocks(dense: DenseFile, slicing: Slicing, again: Sequence[Entry]) -> str:
    block = max(types.block_size(entry.type) for entry in again)
    n_block = dense.model.d_ff // block
    whole = [n for n in range(2, 17) if n_block % n == 0]
    ways = [f"choose --experts {' or '.join(map(str, whole))}, which divide them evenly"] if whole else []
    if n_block >= slicing.n_expert:
        ways.append(f"pad the experts with --align {block}")
    ways.append("quantize these tensors again with --allow-fallback")
    ways.append("give them another type with --tensor-type")
    return (
        f"{slicing.n_expert} experts of {slicing.d_expert} neurons cut through the blocks of {block} in which "
        f"{_names(again)} are stored ({n_block} blocks); " + " or ".join(ways)
    )


def _names(entries: Sequence[Entry]) -> str:
    return list_names([entry.name for entry in entries], 2)
