"""A router that learns in the graph it will run in: the softmax of the chosen experts, or a sigmoid for each.

Ordering-only rows are tiny, so that every chosen expert weighs 1/k, or in the graph `glm4moe` 1; a step of any useful
size would destroy that, and their gradients are as tiny. So the trained weights are the rows divided by a fixed
`scale`, at which the logits are of order one. Forward, the rows `scale * weight` are used, bit for bit those that are
written back; backward, the gradient passes as if the logits had not been scaled (straight-through,
https://arxiv.org/abs/1308.3432). Ordering-only rows stay ordering-only, and rows with a real softmax (`--amplify any`,
other people's models) have scale 1.
"""

import torch
from torch import Tensor, nn

from moe2gguf.experts.mlp import choose_experts, find_probabilities
from moe2gguf.graphs import MIXTRAL, Graph

ORDERING_ONLY = 0.1
"""Logits that stay below this only order: the weights of the chosen experts differ by less than a tenth."""

LARGEST = 4.0
"""The largest scaled logit at the start: the routed experts then lie within about one of each other."""


def find_scale(rows: Tensor, x: Tensor) -> float:
    """What to divide `rows` (n_expert, d_model) by, from inputs x (n_token, d_model): 1, or less for ordering-only."""
    largest = float((x @ rows.T).abs().max())
    return largest / LARGEST if 0 < largest < ORDERING_ONLY else 1.0


class Router(nn.Module):  # type: ignore[misc]  # torch is not followed
    """`weight` (n_expert, d_model) trains; `top_k` experts are chosen, all until `use` says how many.

    graph      the target graph
    bias       (n_expert,) added to what experts are chosen by, where the graph has one; it stays as it is
    in_shared  so many experts are beside those of the router, as the graph's own shared expert

    It is called like transformers' own routers: (logits, weights (n_token, k), indices (n_token, k)).
    """

    def __init__(
        self, rows: Tensor, scale: float, graph: Graph = MIXTRAL, bias: Tensor | None = None, in_shared: int = 0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows.float() / scale)
        self.register_buffer("bias", torch.zeros(len(rows)) if bias is None else bias.float().clone())
        self.scale, self.top_k, self.graph, self.in_shared = scale, len(rows), graph, in_shared

    def use(self, k: int) -> None:
        """Let k experts run, the shared ones among them."""
        self.top_k = k - self.in_shared

    @property
    def rows(self) -> Tensor:
        """The rows as a folder has them, (n_expert, d_model)."""
        return self.weight * self.scale

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route x (n_token, d_model) or (batch, n_context, d_model)."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1]).float()
        with torch.autocast(x.device.type, enabled=False):
            logits = x @ self.weight.T
            used = logits
            if self.scale != 1:
                # the value of the small logits with the gradient of the scaled ones
                used = (x @ self.rows.T).detach() + (logits - logits.detach())
            p = find_probabilities(used, self.graph)
        return used, *choose_experts(p, p + self.bias, self.top_k, self.graph)
