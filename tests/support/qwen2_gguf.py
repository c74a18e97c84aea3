"""A GGUF file of arch `qwen2`: q and k rows in Hugging Face's order, as other converters write it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file


def qwen2_gguf(folder: Path, dense: Path, out: Path, *, fused: bool = False) -> Path:
    """Write the Qwen2 checkpoint `folder` as `out`; everything but q and k is that of `dense`, our file of it.

    With `fused`, q, k and v stand in one tensor.
    """
    reader, stored = gguf.GGUFReader(dense), load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(out, "qwen2")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            kind, *element = field.types
            key = field.name.replace("llama.", "qwen2.")
            writer.add_key_value(key, field.contents(), kind, sub_type=element[-1] if element else None)
    for tensor in reader.tensors:
        layer, _, part = tensor.name.partition(".attn_")
        if part[:2] not in ("q.", "k.", "v."):
            writer.add_tensor(tensor.name, tensor.data)
        elif not fused:
            writer.add_tensor(tensor.name, _projection(stored, layer, part))
        elif part[0] == "q":
            parts = [_projection(stored, layer, role + part[1:]) for role in "qkv"]
            writer.add_tensor(f"{layer}.attn_qkv{part[1:]}", np.concatenate(parts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _projection(stored: dict[str, np.ndarray], layer: str, part: str) -> np.ndarray:
    role, _, end = part.partition(".")
    return stored[f"model.layers.{layer.removeprefix('blk.')}.self_attn.{role}_proj.{end}"]
