"""The dense model, one layer in memory at a time, by transformers' own modules for its family."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moe2gguf.experts.carve import MLP, chunks

Load = Callable[[str], NDArray[np.generic]]
"""Reads a tensor of the checkpoint by its Hugging Face name."""

BATCH = 8
"""Windows that attention works on together."""


class Layers:
    """Blocks of the model in `folder`; weights come from `load`, computation is float32 on `device`."""

    def __init__(self, folder: Path, load: Load, device: torch.device) -> None:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config._attn_implementation = "sdpa"
        config.tie_word_embeddings = False
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        self._blocks = skeleton.model.layers.float()  # a bf16 checkpoint's configuration asks for bf16 modules
        self._rotary = type(skeleton.model.rotary_emb)(config).to(device)
        self._norm = skeleton.model.norm.float()
        self._load = load
        self._device = device

    def __len__(self) -> int:
        return len(self._blocks)

    def embed(self, ids: NDArray[np.int64]) -> Tensor:
        """(n_window, n_context) token ids -> (n_window, n_context, d_model)."""
        table = self._load("model.embed_tokens.weight")
        return torch.from_numpy(table[ids].astype(np.float32))

    def head(self, tied: bool) -> Callable[[Tensor], Tensor]:
        """What turns the last layer's hidden states (n_token, d_model) into logits (n_token, n_vocab)."""
        norm = self._norm.to_empty(device=self._device)
        norm.load_state_dict({"weight": torch.from_numpy(self._load("model.norm.weight").astype(np.float32))})
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        matrix = torch.from_numpy(self._load(name).astype(np.float32)).to(self._device)
        return lambda hidden: norm(hidden.to(self._device)) @ matrix.T

    def block(self, i: int) -> Block:
        """Layer `i` with its weights."""
        module = self._blocks[i].to_empty(device=self._device)
        state = {
            name: torch.from_numpy(self._load(f"model.layers.{i}.{name}").astype(np.float32))
            for name in module.state_dict()
        }
        module.load_state_dict(state)
        return Block(module.eval().requires_grad_(False), self._rotary, self._device)

    def release(self, i: int) -> None:
        """Drop the weights of layer `i`."""
        self._blocks[i].to("meta")


class Block:
    """One layer: attention into the residual stream, and the MLP with its norm."""

    def __init__(self, module: Any, rotary: Any, device: torch.device) -> None:
        self._module, self._rotary, self._device = module, rotary, device

    @functools.cached_property
    def mlp(self) -> MLP:
        """The weights of the dense MLP; a block with experts has none."""
        mlp = self._module.mlp
        return MLP(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T.contiguous())

    def attend(self, hidden: Tensor) -> None:
        """Add attention to `hidden` (n_window, n_context, d_model), in place; causal, each window on its own."""
        for part in _batches(len(hidden)):
            h = hidden[part].to(self._device)
            positions = torch.arange(h.shape[1], device=self._device)[None]
            rotary = self._rotary(h, positions)
            normed = self._module.input_layernorm(h)
            attended = self._module.self_attn(hidden_states=normed, position_embeddings=rotary, attention_mask=None)[0]
            hidden[part] = (h + attended).to(hidden.device)

    def mlp_input(self, hidden: Tensor) -> Tensor:
        """(n_window, n_context, d_model) -> the normed input of the MLP, (n_token, d_model), on the device."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        norm = self._module.post_attention_layernorm
        return torch.cat([norm(flat[part].to(self._device)) for part in chunks(len(flat))])


def _batches(n_window: int) -> Iterator[slice]:
    return chunks(n_window, BATCH)


def choose_device(name: str | None) -> torch.device:
    """`name`, or the best that is there: CUDA, then Apple's MPS, then the CPU."""
    if name:
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
