"""Tiny Hugging Face checkpoints, made by transformers itself, with weights large enough that logits differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tiny_tokenizers import byte_level_bpe

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-mha": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama-mqa": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-head-dim": ("LlamaForCausalLM", {"head_dim": 32}),
    "llama-bias": ("LlamaForCausalLM", {"attention_bias": True}),
    "llama3-rope": (
        "LlamaForCausalLM",
        {
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "linear-rope": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}},
    ),
    "yarn-rope": (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "yarn-rope-attention-factor": (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "attention_factor": 1.5,
            }
        },
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen2-tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
}
"""Name -> (architecture, what differs from `DEFAULTS`): every row of the table, and every setting that matters."""

DEFAULTS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
}


def make(folder: Path, family: str = "llama", *, dtype: str = "float32", shards: int = 1, **changes: Any) -> Path:
    """Write the checkpoint `family` into `folder`, with a byte-level BPE tokenizer; returns the folder."""
    architecture, settings = FAMILIES[family]
    return write(folder, architecture, dtype=dtype, shards=shards, **(settings | changes))


def write(
    folder: Path, architecture: str, *, dtype: str = "float32", shards: int = 1, original: bool = True, **settings: Any
) -> Path:
    """Write a checkpoint of `architecture`; `original` False keeps transformers 5's fused expert tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    n_vocab = byte_level_bpe(folder, pre="llama-bpe")
    values = DEFAULTS | {"vocab_size": n_vocab} | settings
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**values)).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(
        folder, max_shard_size=size // shards + 1 if shards > 1 else "1GB", save_original_format=original
    )
    return folder


def rewrite_config(folder: Path, **changes: Any) -> None:
    """Change config.json; a value of None removes the key."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def torch_logits(folder: Path, tokens: list[int]) -> np.ndarray:
    """The logits (n_token, n_vocab) of transformers' own float32 forward pass."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].double().numpy()
