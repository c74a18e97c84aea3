"""Every tensor of the file to come: where it is read from, what is done to it, and its name, shape and type.

One function per kind of MLP (dense, sliced, experts that the checkpoint already has); `Maker` binds each tensor's
recipe to a thunk, so that nothing is read before the second pass asks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from numpy.typing import NDArray

from moe2gguf.errors import CalibrationError
from moe2gguf.experts import slicing as cut
from moe2gguf.experts.layer import LayerExperts
from moe2gguf.gguf.metadata import rope_frequencies
from moe2gguf.gguf.rotary import halves_to_pairs
from moe2gguf.gguf.writer import OutputTensor
from moe2gguf.hf.families import DENSE, MIXTRAL_FUSED, MLPPlace, lay_out_tensors
from moe2gguf.hf.folder import Checkpoint
from moe2gguf.hf.safetensors import DTYPES, SourceDigest, StoredTensor
from moe2gguf.quant.assign import as_stored
from moe2gguf.spec import Slicing

Array = NDArray[np.generic]

BLOCK_BYTES = 1 << 20
"""Row-wise tensors (the embedding, the output matrix) pass through memory in pieces of this size, which stay in the
cache while they are hashed, checked and written."""


@dataclass(frozen=True)
class Maker:
    """Makes output tensors of the type in which they are stored; their sources are hashed as they are read."""

    digest: SourceDigest

    def row_wise(self, name: str, source: StoredTensor) -> OutputTensor:
        """The tensor as it is, in blocks of rows."""
        return self._tensor(name, source.shape, [source], lambda: self.digest.blocks(source, BLOCK_BYTES))

    def mapped(
        self, name: str, shape: tuple[int, ...], source: StoredTensor, function: Callable[[Array], Iterator[Array]]
    ) -> OutputTensor:
        """The pieces that `function` makes of the whole tensor."""
        return self._tensor(name, shape, [source], lambda: function(self.digest.read(source)))

    def stacked(self, name: str, sources: Sequence[StoredTensor]) -> OutputTensor:
        """Equally shaped tensors, one behind the other: (len(sources), *shape)."""
        shape = (len(sources), *sources[0].shape)
        return self._tensor(name, shape, sources, lambda: (self.digest.read(source) for source in sources))

    def half(self, name: str, source: StoredTensor, which: int) -> OutputTensor:
        """The first (0) or second (1) half of the rows of each expert in (n_expert, 2 * d_ff, d_model)."""
        n_expert, rows, d_model = source.shape

        def blocks() -> Iterator[Array]:
            for experts in self.digest.blocks(source, source.n_bytes // n_expert):
                yield experts[:, which * (rows // 2) : (which + 1) * (rows // 2)]

        return self._tensor(name, (n_expert, rows // 2, d_model), [source], blocks)

    def _tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        sources: Sequence[StoredTensor],
        blocks: Callable[[], Iterator[Array]],
    ) -> OutputTensor:
        kind = as_stored(name, shape, DTYPES[sources[0].dtype])
        return OutputTensor(name, shape, kind, tuple(source.name for source in sources), blocks)


def made(name: str, shape: tuple[int, ...], array: Callable[[], NDArray[np.float32]]) -> OutputTensor:
    """An F32 tensor of ours, with no source."""
    return OutputTensor(name, shape, GGMLType.F32, (), lambda: iter([array()]))


class Experts:
    """Where the second pass finds each layer's experts: one for all layers, or what `load` gives after calibration."""

    def __init__(self, plain: LayerExperts | None) -> None:
        self._plain = plain
        self.load: Callable[[int], LayerExperts] | None = None
        self.layer = functools.lru_cache(maxsize=2)(self._layer)

    def _layer(self, i: int) -> LayerExperts:
        if self._plain is not None:
            return self._plain
        if self.load is None:
            raise CalibrationError("the experts have not been made yet: calibrate first")
        return self.load(i)


def output_tensors(
    checkpoint: Checkpoint, slicing: Slicing | None, experts: Experts, digest: SourceDigest
) -> tuple[OutputTensor, ...]:
    """Every tensor of the file, in file order, typed as stored. `slicing` None keeps the checkpoint's MLPs."""
    model, make = checkpoint.model, Maker(digest)
    tensors = []
    if model.rope.kind == "llama3":
        frequencies = rope_frequencies(model.rope, model.d_head)
        tensors.append(made("rope_freqs.weight", frequencies.shape, lambda: frequencies))
    for place in lay_out_tensors(model):
        if isinstance(place, MLPPlace):
            tensors += _mlp(checkpoint, slicing, experts, make, place.i)
            continue
        rule, i = place
        name, source = rule.target.format(i=i), checkpoint.tensors[rule.source.format(i=i)]
        if rule.permute:
            order = halves_to_pairs(getattr(model, rule.permute), model.d_head)
            tensors.append(make.mapped(name, source.shape, source, _reorder_rows(order)))
        else:
            tensors.append(make.row_wise(name, source))
    return tuple(tensors)


def _reorder_rows(order: NDArray[np.int64]) -> Callable[[Array], Iterator[Array]]:
    return lambda weight: iter([weight[order]])


def _mlp(checkpoint: Checkpoint, slicing: Slicing | None, experts: Experts, make: Maker, i: int) -> list[OutputTensor]:
    """The MLP of layer `i`."""
    if checkpoint.mlp is not DENSE:
        return _existing_experts(checkpoint, make, i)
    if slicing is None:
        return [
            make.row_wise(f"blk.{i}.ffn_{role}.weight", _sources(checkpoint, role, i)[0])
            for role in ("gate", "up", "down")
        ]
    return sliced_tensors(checkpoint, slicing, experts, make, i)


def sliced_tensors(
    checkpoint: Checkpoint, slicing: Slicing, experts: Experts, make: Maker, i: int
) -> list[OutputTensor]:
    """One MLP, cut into experts: router, gate, up, down. The blocks of the last three are one expert each."""
    gate, up, down = (_sources(checkpoint, role, i)[0] for role in ("gate", "up", "down"))
    n, d_model, d_expert = slicing.n_expert, checkpoint.model.d_model, slicing.d_expert

    def rows(weight: Array) -> Iterator[Array]:
        return cut.slice_rows(weight, experts.layer(i).order)

    def columns(weight: Array) -> Iterator[Array]:
        layer = experts.layer(i)
        corrected = weight if layer.down is None else layer.down
        factors = np.ones_like(layer.scale) if slicing.scale_tensor else layer.scale
        return cut.slice_columns(corrected, layer.order, factors)

    scales = made(f"blk.{i}.ffn_down_exps.scale", (n,), lambda: experts.layer(i).scale)
    return [
        made(f"blk.{i}.ffn_gate_inp.weight", (n, d_model), lambda: experts.layer(i).router),
        *([scales] if slicing.scale_tensor else []),
        make.mapped(f"blk.{i}.ffn_gate_exps.weight", (n, d_expert, d_model), gate, rows),
        make.mapped(f"blk.{i}.ffn_up_exps.weight", (n, d_expert, d_model), up, rows),
        make.mapped(f"blk.{i}.ffn_down_exps.weight", (n, d_model, d_expert), down, columns),
    ]


def _existing_experts(checkpoint: Checkpoint, make: Maker, i: int) -> list[OutputTensor]:
    """The experts and the router of a Mixtral checkpoint, merged."""
    tensors = [make.row_wise(f"blk.{i}.ffn_gate_inp.weight", _sources(checkpoint, "router", i)[0])]
    if checkpoint.mlp is MIXTRAL_FUSED:
        (gate_up,), (down,) = _sources(checkpoint, "gate_up", i), _sources(checkpoint, "down", i)
        return [
            *tensors,
            make.half(f"blk.{i}.ffn_gate_exps.weight", gate_up, 0),
            make.half(f"blk.{i}.ffn_up_exps.weight", gate_up, 1),
            make.row_wise(f"blk.{i}.ffn_down_exps.weight", down),
        ]
    return tensors + [
        make.stacked(f"blk.{i}.ffn_{role}_exps.weight", _sources(checkpoint, role, i))
        for role in ("gate", "up", "down")
    ]


def _sources(checkpoint: Checkpoint, role: str, i: int) -> list[StoredTensor]:
    """The stored tensors of one role of layer `i`'s MLP: one, or one per expert."""
    name = checkpoint.mlp.tensors[role][0]
    experts = range(checkpoint.model.n_expert) if "{e}" in name else range(1)
    return [checkpoint.tensors[name.format(i=i, e=e)] for e in experts]


def expert_stacks(checkpoint: Checkpoint, i: int) -> list[NDArray[np.float32]]:
    """Router, gate, up and down of layer `i` of a Mixtral checkpoint as float32, experts stacked, whatever its layout.

    Shapes: (n_expert, d_model), twice (n_expert, d_expert, d_model), (n_expert, d_model, d_expert).
    """

    def read(role: str) -> NDArray[np.float32]:
        arrays = [source.read().astype(np.float32) for source in _sources(checkpoint, role, i)]
        return np.stack(arrays) if "{e}" in checkpoint.mlp.tensors[role][0] else arrays[0]

    if checkpoint.mlp is MIXTRAL_FUSED:
        gate, up = np.split(read("gate_up"), 2, axis=1)
        return [read("router"), gate, up, read("down")]
    return [read(role) for role in ("router", "gate", "up", "down")]
