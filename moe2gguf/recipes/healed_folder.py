"""Writing a Mixtral folder again with other experts: what did not train is copied bit for bit."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe2gguf.gguf import types
from moe2gguf.gguf.writer import OutputTensor
from moe2gguf.hf.companions import copy_companions
from moe2gguf.hf.folder import Checkpoint, open_checkpoint
from moe2gguf.hf.json_file import read_bytes, read_json
from moe2gguf.hf.paths import inside
from moe2gguf.hf.safetensors import DTYPES, StoredTensor
from moe2gguf.progress import Progress, silent
from moe2gguf.recipes.write_folder import MARK, replacing_folder, write_json, write_shards
from moe2gguf.spec import MetadataValue

BLOCK_BYTES = 1 << 24
MAX_CARD_BYTES = 4 << 20
PARTS = {"router": ("router",), "gate": ("experts", "lora"), "up": ("experts", "lora")}
PARTS |= {"gate_up": PARTS["gate"], "down": ("down", "experts", "lora")}
"""Which parts of `moe2gguf.experts.methods.TRAINED` change a role of the MLP."""


@dataclass(frozen=True)
class Trained:
    """`layer(i)` has float32 arrays router, gate, up, down, experts stacked; `train` names the parts that changed.

    `others` has tensors outside of the MLPs that changed, float32, by their names.
    """

    layer: Callable[[int], Any]
    train: Sequence[str]
    others: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def changes(self, role: str) -> bool:
        """Whether tensors of that role differ from the source's."""
        return any(part in self.train for part in PARTS[role])


def write_healed(
    source: Checkpoint,
    trained: Trained,
    out: Path,
    provenance: Mapping[str, MetadataValue],
    log: Sequence[Mapping[str, Any]],
    *,
    progress: Progress = silent,
) -> None:
    """Write the folder `out`: `source` with the trained layers, each tensor in the type it had; log and card beside.

    Raises:
        OutputError, CorruptWeightError: as in `moe2gguf.recipes.convert.convert`.
    """
    tensors = healed_tensors(source, trained)
    values = read_json(inside(source.folder, "config.json"))
    with replacing_folder(out) as partial:
        with progress("write", sum(tensor.n_bytes for tensor in tensors)) as advance:
            write_shards(partial, tensors, advance)
        write_json(partial / "config.json", {**values, MARK: {**source.provenance, **provenance}})
        (partial / "README.md").write_text(_card(source.folder, provenance, log), "utf-8")
        (partial / "heal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), "utf-8")
        copy_companions(source.folder, partial)
        open_checkpoint(partial)


def healed_tensors(source: Checkpoint, trained: Trained) -> list[OutputTensor]:
    """Every tensor under its old name: copied, or made of the trained layer when asked for."""
    layer = functools.lru_cache(maxsize=1)(trained.layer)
    changed: dict[str, Callable[[], Iterator[NDArray[Any]]]] = {
        name: functools.partial(iter, (array,)) for name, array in trained.others.items()
    }
    for role, (name, _) in source.mlp.tensors.items():
        if trained.changes(role):
            for i in range(source.model.n_layer):
                for e in range(source.model.n_expert) if "{e}" in name else (None,):
                    changed[name.format(i=i, e=e)] = functools.partial(_blocks, layer, role, i, e)
    return [_tensor(tensor, changed.get(name)) for name, tensor in source.tensors.items()]


def _blocks(layer: Callable[[int], Any], role: str, i: int, e: int | None) -> Iterator[NDArray[Any]]:
    stored = layer(i)
    array = np.concatenate([stored.gate, stored.up], 1) if role == "gate_up" else getattr(stored, role)
    yield array if e is None else array[e]


def _tensor(tensor: StoredTensor, made: Callable[[], Iterator[NDArray[Any]]] | None) -> OutputTensor:
    kind = types.of_dtype(DTYPES[tensor.dtype])
    blocks = made or functools.partial(tensor.blocks, BLOCK_BYTES)
    return OutputTensor(tensor.name, tensor.shape, kind, (tensor.name,), blocks)


def _card(folder: Path, provenance: Mapping[str, MetadataValue], log: Sequence[Mapping[str, Any]]) -> str:
    """The source's card and what was done since."""
    path = inside(folder, "README.md")
    before = read_bytes(path, max_bytes=MAX_CARD_BYTES).decode("utf-8", "replace") if path.is_file() else ""
    lines = ["", "## Healed", "", "| how | |", "|---|---|"]
    lines += [f"| {key.removeprefix('moe2gguf.heal.')} | {value} |" for key, value in provenance.items()]
    scores = [line for line in log if line["stage"] == "evaluation"]
    if scores:
        counts = list(scores[0]["kl"])
        lines += ["", "Held-out KL divergence from the dense model, nats per token:", ""]
        lines += ["| step | " + " | ".join(f"k = {k}" for k in counts) + " |", "|--:|" + "--:|" * len(counts)]
        lines += [f"| {s['step']} | " + " | ".join(f"{s['kl'][k]:.4f}" for k in counts) + " |" for s in scores]
    return before + "\n".join(lines) + "\n"
