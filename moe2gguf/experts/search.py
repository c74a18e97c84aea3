"""How many experts of a layer are always on: chosen by what the layer does to the model's output.

Local error always says "all of them": a router that never chooses makes no wrong choice. So a layer's candidates are
judged at the end of the model: windows of text that nothing is fitted to run through the sliced layers so far, the
candidate, and the dense layers behind it; what counts is the divergence of the next-token distribution from the dense
model's. The search is greedy, from the first layer to the last, and reads one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe2gguf.experts.forward import Layers
from moe2gguf.experts.hidden_states import chunks
from moe2gguf.experts.mlp import Carved
from moe2gguf.experts.slicing import default_always_on
from moe2gguf.spec import Slicing

WINDOWS = 2
"""Windows of text that judge; all but the first quarter of each is scored."""

TOKENS = 256
"""Tokens whose logits are made together."""


def variants(slicing: Slicing) -> list[Slicing]:
    """`slicing` with every count of always-on experts to try: the default, an eighth of all experts fewer, and more.

    12 of 16: 8, 6 and 10.
    """
    n, k, recipe = slicing.n_expert, slicing.n_expert_used, slicing.recipe
    default, step = default_always_on(n, k), max(n // 8, 1)
    least = min(default, 1) if recipe.amplify == "any" or recipe.bias_neuron else 0  # both rest on always-on experts
    counts = [s for s in (default, default - step, default + step) if least <= s < k]
    return [replace(slicing, recipe=replace(recipe, always_on=s)) for s in counts]


def choose(divergences: Sequence[Tensor]) -> int:
    """The place of the candidate with the least mean divergence; `divergences` (n_scored,) each, the default's first.

    The default stays unless another is better by more than one standard error of the difference, token by token.
    """
    best = min(range(len(divergences)), key=lambda c: float(divergences[c].mean()))
    gain = divergences[0] - divergences[best]
    return best if float(gain.mean()) > float(gain.std()) / len(gain) ** 0.5 else 0


@dataclass(frozen=True)
class Judge:
    """The dense model on the windows that judge.

    head    (n_token, d_model) -> (n_token, n_vocab)
    answer  (n_scored, d_model): what the dense model's last layer gives for the scored tokens
    """

    layers: Layers
    n_context: int
    head: Callable[[Tensor], Tensor]
    answer: Tensor

    @classmethod
    def hear(cls, layers: Layers, ids: NDArray[np.int64]) -> Judge:
        """Run the dense model on windows of token `ids` (n_window, n_context)."""
        hidden = torch.empty(ids.size, layers.d_model, device="cpu")
        layers.embed(ids, hidden)
        _run(layers, range(len(layers)), hidden, ids.shape[1])
        return cls(layers, ids.shape[1], layers.head(layers.tied), _scored(hidden, ids.shape[1]))

    def best(self, i: int, made: Sequence[Carved], hidden: Tensor, outputs: Sequence[Tensor]) -> Carved:
        """The candidate for layer `i` that serves the model best, the default first in `made`.

        hidden   (n_token, d_model): the residual stream before its MLP, in the model sliced so far
        outputs  (n_token, d_model) each: what the candidates add to it

        The report gets `always_on_tried` and `always_on_kl`, the mean divergences of the candidates in nats.
        """
        divergences = self.divergences(i, [hidden + output for output in outputs])
        tried = [carved.report["always_on"] for carved in made]
        found = {"always_on_tried": tried, "always_on_kl": [float(kl.mean()) for kl in divergences]}
        chosen = made[choose(divergences)]
        return replace(chosen, report=chosen.report | found)

    def divergences(self, i: int, states: Sequence[Tensor]) -> list[Tensor]:
        """(n_scored,) for each state: KL of the next-token distribution from the dense model's, in nats.

        `states` (n_token, d_model) each: the residual stream behind layer `i`; the layers behind it are dense.
        """
        together = torch.cat(list(states))
        _run(self.layers, range(i + 1, len(self.layers)), together, self.n_context)
        ends = [_scored(state, self.n_context) for state in together.chunk(len(states))]
        found: list[list[Tensor]] = [[] for _ in ends]
        for part in chunks(len(self.answer), TOKENS):
            p = self.head(self.answer[part]).log_softmax(-1)
            weight = p.exp()
            for kl, end in zip(found, ends, strict=True):
                q = self.head(end[part]).log_softmax(-1)
                kl.append(weight.mul(p - q).sum(-1).cpu())
        return [torch.cat(kl) for kl in found]


def _run(layers: Layers, which: range, hidden: Tensor, n_context: int) -> None:
    """Run dense layers on windows of n_context tokens, in `hidden` (n_token, d_model), in place."""
    for i in which:
        block = layers.block(i)
        block.attend(hidden, n_context)
        x = block.mlp_input(hidden)
        for part in chunks(len(hidden)):
            hidden[part] += block.mlp(x[part]).to(hidden.device)
        layers.release(i)


def _scored(hidden: Tensor, n_context: int) -> Tensor:
    """All but the first quarter of every window."""
    return hidden.unflatten(0, (-1, n_context))[:, n_context // 4 :].flatten(0, 1)
