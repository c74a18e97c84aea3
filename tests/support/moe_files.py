"""Tiny files of every architecture with stacked experts, whose tensors llama.cpp itself names and shapes."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny_gguf
from numpy.typing import NDArray

from moe2gguf.gguf.ggml import Tensor
from moe2gguf.llama.child import run_in_child

Weights = dict[str, NDArray[np.float32]]

N_EXPERT, N_USED, D_MODEL, D_EXPERT = 6, 2, 64, 32

KEYS: dict[str, Any] = {
    "context_length": 512,
    "embedding_length": D_MODEL,
    "block_count": 2,
    "feed_forward_length": 64,
    "attention.head_count": 2,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
    "rope.dimension_count": 32,
    "expert_count": N_EXPERT,
    "expert_used_count": N_USED,
    "expert_feed_forward_length": D_EXPERT,
}
"""What nearly every architecture reads, without its prefix."""


_LATENT = {
    "expert_shared_count": 1,
    "leading_dense_block_count": 0,
    "attention.head_count_kv": 1,
    "attention.kv_lora_rank": 32,
    "attention.q_lora_rank": 32,
    "attention.key_length": 64,
    "attention.value_length": 32,
    "attention.key_length_mla": 48,
    "attention.value_length_mla": 32,
    "expert_weights_scale": 1.0,
    "expert_gating_func": 2,
}
"""Attention as in DeepSeek-V2."""

_INDEXER = {"attention.indexer.head_count": 2, "attention.indexer.key_length": 64, "attention.indexer.top_k": 64}
_HYBRID = {
    "expert_shared_feed_forward_length": 32,
    "ssm.inner_size": 64,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 2,
    "full_attention_interval": 2,
}
"""Attention and gated delta rule in turn, as in Qwen3-Next."""

_WINDOWS = {"attention.sliding_window": 128, "attention.sliding_window_pattern": [0, 1]}

MORE: dict[str, dict[str, Any]] = {
    "llama": {"expert_feed_forward_length": 64},
    "mistral3": {},
    "llama4": {"interleave_moe_layer_step": 1, "expert_feed_forward_length": 32, "block_count": 4},
    "grok": {},
    "dbrx": {"attention.clamp_kqv": 1.0},
    "qwen2moe": {"expert_shared_feed_forward_length": 32},
    "qwen3moe": {},
    "qwen3vlmoe": {"rope.dimension_sections": [4, 4, 4, 4]},
    "qwen3next": _HYBRID,
    "qwen35moe": _HYBRID | {"rope.dimension_sections": [4, 4, 4, 4]},
    "phimoe": {},
    "olmoe": {},
    "arctic": {},
    "jamba": {
        "ssm.inner_size": 128,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 16,
        "ssm.time_step_rank": 4,
        "attention.head_count_kv": [2, 0],
    },
    "deepseek": {"expert_shared_count": 1, "leading_dense_block_count": 0},
    "deepseek2": _LATENT,
    "mistral4": _LATENT,
    "deepseek32": _LATENT | _INDEXER | {"expert_weights_norm": True},
    "glm-dsa": _LATENT | _INDEXER | {"expert_weights_norm": True},
    "kimi-linear": _LATENT
    | {
        "attention.head_count": [2, 0],
        "attention.head_count_kv": [1, 0],
        "kda.head_dim": 16,
        "ssm.conv_kernel": 4,
    },
    "gemma4": {
        "attention.sliding_window": 128,
        "attention.sliding_window_pattern": [True, False],
        "attention.shared_kv_layers": 0,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.key_length_swa": 32,
        "attention.value_length_swa": 32,
        "embedding_length_per_layer_input": 0,
        "rope.freq_base_swa": 10000.0,
        "rope.dimension_count_swa": 32,
    },
    "minimax-m3": _INDEXER
    | {
        "expert_gating_func": 2,
        "expert_shared_count": 1,
        "leading_dense_block_count": 0,
        "attention.indexer.block_size": 4,
        "attention.indexer.local_blocks": 1,
    },
    "maple": _WINDOWS | {"swiglu_clamp_exp": 7.0},
    "bailingmoe": {"expert_shared_count": 1, "leading_dense_block_count": 0},
    "bailingmoe2": {"expert_shared_count": 1, "leading_dense_block_count": 0, "expert_gating_func": 2},
    "dots1": {"expert_shared_count": 1, "leading_dense_block_count": 0, "expert_gating_func": 2},
    "glm4moe": {"expert_shared_count": 1},
    "ernie4_5-moe": {"interleave_moe_layer_step": 1, "leading_dense_block_count": 0},
    "hunyuan-moe": {"expert_shared_feed_forward_length": 32},
    "granitemoe": {"logit_scale": 1.0, "expert_shared_feed_forward_length": 32},
    "granitehybrid": {
        "ssm.inner_size": 128,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 16,
        "ssm.time_step_rank": 4,
        "ssm.group_count": 2,
        "attention.head_count_kv": [2, 0],
    },
    "gpt-oss": {"attention.sliding_window": 128},
    "lfm2moe": {
        "expert_gating_func": 2,
        "shortconv.l_cache": 3,
        "attention.head_count_kv": [2, 0],
        "leading_dense_block_count": 0,
    },
    "smallthinker": {"expert_gating_func": 2, "attention.sliding_window": 128},
    "minimax-m2": {"expert_gating_func": 2},
    "afmoe": {
        "expert_shared_count": 1,
        "attention.sliding_window": 128,
        "expert_gating_func": 2,
        "leading_dense_block_count": 0,
    },
    "exaone-moe": {
        "expert_shared_count": 1,
        "attention.sliding_window": 128,
        "expert_gating_func": 2,
        "leading_dense_block_count": 0,
    },
    "mimo2": {
        "attention.sliding_window": 128,
        "attention.sliding_window_pattern": [0, 1],
        "rope.freq_base_swa": 10000.0,
        "expert_gating_func": 2,
    },
    "step35": {
        "expert_shared_feed_forward_length": 32,
        "attention.sliding_window": 128,
        "attention.sliding_window_pattern": [0, 1],
        "rope.freq_base_swa": 10000.0,
        "rope.dimension_count_swa": 32,
        "expert_gating_func": 2,
    },
    "hy_v3": {"expert_shared_feed_forward_length": 32},
    "llada-moe": {},
    "nemotron_h_moe": {
        "ssm.inner_size": 128,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 16,
        "ssm.time_step_rank": 4,
        "ssm.group_count": 2,
        "block_count": 3,
        "attention.head_count": [2, 0, 0],
        "attention.head_count_kv": [2, 0, 0],
        "feed_forward_length": [0, 0, 64],
        "expert_shared_feed_forward_length": 32,
        "expert_gating_func": 2,
    },
    "rnd1": {},
    "mellum": {"attention.sliding_window": 128},
    "laguna": {"expert_shared_feed_forward_length": 32, "leading_dense_block_count": 1},
    "cohere2moe": {
        "attention.sliding_window": 128,
        "attention.sliding_window_pattern": [0, 1],
        "expert_shared_count": 1,
        "logit_scale": 1.0,
        "leading_dense_block_count": 0,
    },
}
"""What an architecture reads besides, or with another value."""


def list_tensors(*metadata: Path) -> list[dict[str, tuple[int, ...]]]:
    """The tensors that llama.cpp makes for each file of metadata alone: names, and shapes in numpy order."""
    return run_in_child(_list_all, metadata)


def _list_all(metadata: Sequence[Path]) -> list[dict[str, tuple[int, ...]]]:
    return [_list_tensors(path) for path in metadata]


def _list_tensors(metadata: Path) -> dict[str, tuple[int, ...]]:
    import llama_cpp
    from llama_cpp import llama_cpp as lib

    class Params(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))

    found: dict[str, tuple[int, ...]] = {}

    def see(tensor: int, _: Any) -> None:
        one = Tensor.from_address(tensor)
        n_dim = max((i + 1 for i in range(4) if one.ne[i] > 1), default=1)
        found[one.name.decode()] = tuple(int(n) for n in one.ne[:n_dim])[::-1]

    llama_cpp.llama_backend_init()
    base = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    base.gguf_init_from_file.restype, base.gguf_init_from_file.argtypes = ctypes.c_void_p, (ctypes.c_char_p, Params)
    context = base.gguf_init_from_file(str(metadata).encode(), Params(True, None))
    callback = lib.llama_model_set_tensor_data_t(see)
    assert lib.llama_model_init_from_user(context, callback, None, llama_cpp.llama_model_default_params())
    return found


def make_weights(shapes: Mapping[str, tuple[int, ...]], never: Sequence[int] = (), seed: int = 0) -> Weights:
    """Random weights, with routers that `never` choose some experts: the first number of every state is large."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("scale") and not name.endswith(("_exps.scale", "gate_inp.scale")):
            continue
        values = rng.standard_normal(shape) / np.sqrt(shape[-1])
        if "norm" in name and name.endswith("weight"):
            values = np.ones(shape)
        elif name.endswith("scale"):
            values = 1 + np.abs(values)
        elif name.endswith("ssm_a"):
            values = -np.abs(values)
        elif "exp_probs_b" in name:
            values *= 0.01
        elif name == "token_embd.weight":
            values *= 8
            values[:, 0] = 4
        elif name.endswith("ffn_gate_inp.weight"):
            values[:, 0] = 0
            values[list(never), 0] = -20
        if re.search(r"blk.*(output|down|down_exps|down_shexp|out|out_proj|o)\.(weight|bias)", name):
            values[(..., 0, slice(None)) if name.endswith("weight") else (..., 0)] = 0
        weights[name] = values.astype(np.float32)
    return weights


def write(path: Path, architecture: str, keys: Mapping[str, Any], weights: Weights) -> Path:
    """Write a file of these keys, without the architecture's prefix, and weights."""
    writer = gguf.GGUFWriter(path, architecture)
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.ARRAY, kinds[type(value[0])])
        else:
            writer.add_key_value(f"{architecture}.{key}", value, kinds[type(value)])
    tiny_gguf.add_vocabulary(writer)
    for name, values in weights.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make(path: Path, architecture: str, times: int = 1, **changes: Any) -> Path:
    """Write a whole file with random weights: of 2 or 3 layers, or so many times as many."""
    keys: dict[str, Any] = {**KEYS, **MORE[architecture]}
    n_layer = keys["block_count"]
    layered = {key: value * times for key, value in keys.items() if isinstance(value, list) and len(value) == n_layer}
    keys |= {**layered, "block_count": n_layer * times, **changes}
    (shapes,) = list_tensors(write(path, architecture, keys, {}))
    return write(path, architecture, keys, make_weights(shapes))
