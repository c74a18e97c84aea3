"""One mixture-of-experts layer in training form.

The neurons of all experts follow each other, behind those of the shared expert where the graph has one of its own:
m = d_shared + n_expert * d_expert. All are computed, and those of experts that are not used weigh zero, so that a step
is a few large products; the shared ones weigh one.
"""

import torch
from torch import Tensor, nn

from moe2gguf.experts.heal.router import Router
from moe2gguf.experts.heal.work import ExpertWeights
from moe2gguf.graphs import MIXTRAL, Graph


class MoELayer(nn.Module):  # type: ignore[misc]  # torch is not followed
    """The experts and the router of one layer, float32; a copy of `weights`. `scale` is the router's."""

    def __init__(self, weights: ExpertWeights, scale: float, graph: Graph = MIXTRAL) -> None:
        super().__init__()
        _, self.d_expert, self.d_model = weights.gate.shape
        self.d_shared = weights.shared_gate.size // self.d_model
        bias = torch.from_numpy(weights.bias) if graph.has_selection_bias else None
        self.router = Router(
            torch.from_numpy(weights.router).clone(), scale, graph, bias, self.d_shared // self.d_expert
        )
        self.gate, self.up = (
            self._join(torch.from_numpy(shared), torch.from_numpy(routed))
            for shared, routed in ((weights.shared_gate, weights.gate), (weights.shared_up, weights.up))
        )
        # columns become rows: (n_expert, d_model, d_expert) -> (m, d_model)
        shared = torch.from_numpy(weights.shared_down).reshape(self.d_model, -1).T
        self.down = self._join(shared, torch.from_numpy(weights.down).transpose(1, 2))

    def _join(self, shared: Tensor, routed: Tensor) -> nn.Parameter:
        """(m, d_model): the neurons of the shared expert (d_shared, d_model), then those of the others."""
        return nn.Parameter(torch.cat([part.reshape(-1, self.d_model) for part in (shared, routed)]))

    def activations(self, x: Tensor, k: int) -> Tensor:
        """(n_token, d_model) -> (n_token, m): each neuron's activation times its expert's weight, k experts used."""
        self.router.use(k)
        _, top, chosen = self.router(x)
        weights = torch.zeros(len(x), len(self.router.weight), device=x.device).scatter(1, chosen, top)
        shared = torch.ones(len(x), self.d_shared, device=x.device)
        h = nn.functional.silu(x @ self.gate.T) * (x @ self.up.T)
        return h * torch.cat([shared, weights.repeat_interleave(self.d_expert, 1)], 1)

    def forward(self, x: Tensor, k: int) -> Tensor:
        """(n_token, d_model) -> (n_token, d_model), k experts used."""
        return self.activations(x, k) @ self.down

    def to_weights(self) -> ExpertWeights:
        """The tensors in the form of a folder."""
        shared, routed = zip(*(self._split(p) for p in (self.gate, self.up, self.down)), strict=True)
        arrays = {"router": self.router.rows, "gate": routed[0], "up": routed[1], "down": routed[2].transpose(1, 2)}
        if self.d_shared:
            arrays |= {"bias": self.router.bias}
            arrays |= {"shared_gate": shared[0], "shared_up": shared[1], "shared_down": shared[2].T}
        return ExpertWeights.from_tensors(arrays)

    def _split(self, neurons: Tensor) -> tuple[Tensor, Tensor]:
        """What `_join` joined: (d_shared, d_model) and (n_expert, d_expert, d_model)."""
        shared, routed = neurons.tensor_split([self.d_shared])
        return shared, routed.unflatten(0, (-1, self.d_expert))
