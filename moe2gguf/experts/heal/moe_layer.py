"""One mixture-of-experts layer in training form.

The neurons of all experts follow each other: m = n_expert * d_expert. All are computed, and those of experts that are
not used weigh zero, so that a step is a few large products.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe2gguf.experts.heal.router import Router
from moe2gguf.experts.heal.work import ExpertWeights


class MoELayer(nn.Module):  # type: ignore[misc]  # torch is not followed
    """The experts and the router of one layer, float32; a copy of `weights`. `scale` is the router's."""

    def __init__(self, weights: ExpertWeights, scale: float) -> None:
        super().__init__()
        n_expert, d_expert, d_model = weights.gate.shape
        self.router = Router(torch.from_numpy(weights.router).clone(), scale, n_expert)
        self.gate = nn.Parameter(torch.tensor(weights.gate).reshape(-1, d_model))
        self.up = nn.Parameter(torch.tensor(weights.up).reshape(-1, d_model))
        # (n_expert, d_model, d_expert) -> (m, d_model)
        self.down = nn.Parameter(torch.tensor(weights.down).transpose(1, 2).reshape(-1, d_model).contiguous())
        self.d_expert = d_expert

    def activations(self, x: Tensor, k: int) -> Tensor:
        """(n_token, d_model) -> (n_token, m): each neuron's activation times its expert's weight, k experts used."""
        self.router.top_k = k
        _, top, chosen = self.router(x)
        weights = torch.zeros(len(x), len(self.router.weight), device=x.device).scatter(1, chosen, top)
        h = nn.functional.silu(x @ self.gate.T) * (x @ self.up.T)
        return h * weights.repeat_interleave(self.d_expert, 1)

    def forward(self, x: Tensor, k: int) -> Tensor:
        """(n_token, d_model) -> (n_token, d_model), k experts used."""
        return self.activations(x, k) @ self.down

    def to_weights(self) -> ExpertWeights:
        """The tensors in the form of a Mixtral folder."""
        n_expert = len(self.router.weight)
        gate, up, down = (
            p.detach().cpu().reshape(n_expert, self.d_expert, -1) for p in (self.gate, self.up, self.down)
        )
        router = self.router.rows.detach().cpu().numpy()
        return ExpertWeights(router, gate.numpy(), up.numpy(), down.transpose(1, 2).contiguous().numpy())
