"""A dense GGUF file's weights as transformers' modules want them: their names, their rotary layout, as numbers.

One tensor is decoded at a time. Biases that a file leaves out are zeros, as they are in llama.cpp's graph.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe2gguf.gguf.dense_model import DenseFile
from moe2gguf.gguf.rotary import pairs_to_halves
from moe2gguf.gguf.source_tensor import SourceTensor
from moe2gguf.graphs import graph_sizes
from moe2gguf.hf.families import DENSE, list_rules
from moe2gguf.spec import Model

Array = NDArray[np.generic]

_QKV = re.compile(r"(blk\.\d+\.attn_)([qkv])(\.\w+)")


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in the file; `n_head` heads of its rows are rotated, if any."""

    name: str
    n_row: int
    n_head: int = 0


class Weights:
    """Reads the weights of `dense` by their Hugging Face names."""

    def __init__(self, dense: DenseFile) -> None:
        self._dense, self._places = dense, _list_places(dense.model)

    def read(self, name: str, rows: NDArray[np.int64] | None = None) -> Array:
        """The tensor `name`, or these of its rows: float32, or the float type in which it is stored.

        Raises:
            GGUFError: the file became shorter.
            HarnessError: its type needs llama.cpp to be decoded, which is not installed.
        """
        place, dense = self._places[name], self._dense
        order = np.arange(place.n_row) if rows is None else rows
        if place.n_head and not dense.rotates_halves:
            order = pairs_to_halves(place.n_head, dense.model.d_head)[order]
        if place.name in dense.tensors:
            return _read_rows(dense.tensors[place.name], order)
        if (part := _QKV.fullmatch(place.name)) and (fused := dense.tensors.get(f"{part[1]}qkv{part[3]}")):
            return _read_rows(fused, order + _find_first_row(dense.model, part[2]))
        return np.zeros(len(order), np.float32)  # a bias: the plan misses every other tensor

    def rope_divisors(self) -> NDArray[np.float32] | None:
        """LLaMA 3's divisors of the rotary frequencies (d_head / 2,), which GGUF keeps in a tensor; None without it."""
        tensor = self._dense.tensors.get("rope_freqs.weight")
        return None if tensor is None else np.asarray(tensor.read(), np.float32)


def _list_places(model: Model) -> dict[str, Place]:
    """By Hugging Face's name."""
    size, places = graph_sizes(model), {}
    for rule, i in list_rules(model):
        n_head = getattr(model, rule.permute) if rule.permute else 0
        places[rule.source.format(i=i)] = Place(rule.target.format(i=i), size[rule.shape[0]], n_head)
    for role, (source, shape) in DENSE.tensors.items():
        for i in range(model.n_layer):
            places[source.format(i=i)] = Place(f"blk.{i}.ffn_{role}.weight", size[shape[0]])
    return places


def _read_rows(source: SourceTensor, rows: NDArray[np.int64]) -> Array:
    return source.decode(source.read()[rows])


def _find_first_row(model: Model, part: str) -> int:
    """Where q, k or v begins in a tensor that holds all three, one behind the other."""
    d_q, d_kv = model.n_head * model.d_head, model.n_head_kv * model.d_head
    return {"q": 0, "k": d_q, "v": d_q + d_kv}[part]


def refuse_calibration(dense: DenseFile) -> list[str]:
    """What the file's graph has and transformers' modules have not, or what is missing to read text with."""
    found, metadata = [], dense.file.metadata
    if metadata.get("llama.rope.scaling.type") == "longrope":
        found.append("its rotary embedding is scaled by longrope")
    if metadata.get("llama.rope.scaling.attn_factor", 1.0) != 1.0 and dense.model.rope.kind != "yarn":
        found.append("its rotary embedding has an attn_factor without yarn")
    if dense.model.rope.kind == "yarn" and dense.model.rope.theta == 1:
        found.append("its rotary frequencies are all the same, which yarn cannot scale")
    if scales := [name for name in dense.tensors if name.endswith("scale")]:
        found.append(f"it has scales beside its weights, such as {scales[0]}")
    if "tokenizer.ggml.tokens" not in metadata:
        found.append("it has no vocabulary")
    return [
        f"{dense.path}: experts for --used below --experts are made by running the model on text, and {reason}; "
        "convert its Hugging Face folder, give a calibration with --load-calibration, or take --preset exact"
        for reason in found
    ]
