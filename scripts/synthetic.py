"""Write a LLaMA-shaped bf16 checkpoint of a given size: python scripts/synthetic.py FOLDER BYTES TOKENIZER_FOLDER.

TinyLlama's layer (d_model 2048, d_ff 5632, 32 query and 4 key/value heads, untied embeddings), as many layers as the
size needs, in shards of about 500 MB with an index. The tokenizer is SmolLM2's, a real one that every converter
knows; the weights are normal numbers times 0.02 from a fixed seed. Needs the packages of moe2gguf's base installation.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

D_MODEL, D_FF, N_HEAD, N_HEAD_KV, D_HEAD, N_VOCAB = 2048, 5632, 32, 4, 64, 49152
SHARD_BYTES = 500_000_000
BF16 = np.dtype(ml_dtypes.bfloat16)
LAYER = {
    "input_layernorm": (D_MODEL,),
    "post_attention_layernorm": (D_MODEL,),
    "self_attn.q_proj": (N_HEAD * D_HEAD, D_MODEL),
    "self_attn.k_proj": (N_HEAD_KV * D_HEAD, D_MODEL),
    "self_attn.v_proj": (N_HEAD_KV * D_HEAD, D_MODEL),
    "self_attn.o_proj": (D_MODEL, N_HEAD * D_HEAD),
    "mlp.gate_proj": (D_FF, D_MODEL),
    "mlp.up_proj": (D_FF, D_MODEL),
    "mlp.down_proj": (D_MODEL, D_FF),
}
OUTSIDE = {"model.embed_tokens": (N_VOCAB, D_MODEL), "model.norm": (D_MODEL,), "lm_head": (N_VOCAB, D_MODEL)}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def layers_for(size: int) -> int:
    """Number of layers of the smallest checkpoint with at least `size` bytes of weights."""
    per_layer: int = sum(map(math.prod, LAYER.values())) * BF16.itemsize
    outside: int = sum(map(math.prod, OUTSIDE.values())) * BF16.itemsize
    return max(1, math.ceil((size - outside) / per_layer))


def shapes(n_layer: int) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, in the order of the shards."""
    layers = {f"model.layers.{i}.{name}": shape for i in range(n_layer) for name, shape in LAYER.items()}
    return {f"{name}.weight": shape for name, shape in {**layers, **OUTSIDE}.items()}


def shards(tensors: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Split the names so that no shard holds more than SHARD_BYTES."""
    names: list[str] = []
    size = 0
    for name, shape in tensors.items():
        more = math.prod(shape) * BF16.itemsize
        if names and size + more > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def weight(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Norms around 1, matrices around 0."""
    values = random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    return (values + np.float32(1) if "norm" in name else values).astype(BF16)


def write(folder: Path, size: int, tokenizer: Path) -> None:
    """Write the checkpoint into an empty folder."""
    n_layer = layers_for(size)
    tensors = shapes(n_layer)
    parts = list(shards(tensors))
    random = np.random.default_rng(0)
    weight_map = {}
    for number, names in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        content = {name: weight(name, tensors[name], random) for name in names}
        save_file(content, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    total = sum(map(math.prod, tensors.values())) * BF16.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config(n_layer), indent=2))
    for file in TOKENIZER_FILES:
        shutil.copy(tokenizer / file, folder / file)


def config(n_layer: int) -> dict[str, object]:
    """config.json of the synthetic model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": D_HEAD,
        "hidden_act": "silu",
        "hidden_size": D_MODEL,
        "intermediate_size": D_FF,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": N_HEAD,
        "num_hidden_layers": n_layer,
        "num_key_value_heads": N_HEAD_KV,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": N_VOCAB,
    }


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
