"""All experts at once: two large products, and weight zero for those that are not used.

A training step sends many tokens through few layers' worth of small experts. transformers' own implementations sort
tokens by expert, which on a CPU costs more than the arithmetic it saves from about a quarter of the experts upwards;
its default one (`grouped_mm`) also needs rows of a multiple of 16 bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "moe2gguf_all_experts"


def run_all_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """(n_token, d_model) -> (n_token, d_model), as `MixtralExperts.forward` computes it.

    `self` has gate_up_proj (n_expert, 2 * d_expert, d_model) and down_proj (n_expert, d_model, d_expert); indices and
    weights are (n_token, k).
    """
    gate_up, down, x = self.gate_up_proj, self.down_proj, hidden_states
    weights = torch.zeros(len(x), len(gate_up), dtype=top_k_weights.dtype, device=x.device)
    weights = weights.scatter(1, top_k_index, top_k_weights).to(x.dtype)
    gate, up = (x @ gate_up.flatten(0, 1).T).unflatten(1, (len(gate_up), 2, -1)).unbind(2)
    h = torch.nn.functional.silu(gate) * up * weights[:, :, None]
    return h.flatten(1) @ down.transpose(1, 2).flatten(0, 1)


def use_all_experts(model: Any) -> None:
    """Let every mixture-of-experts layer of a transformers model run this way."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, run_all_experts)
    model.set_experts_implementation(NAME)
