"""Everything that is summed over tokens: the one file of slicing that reads activations.

What comes out are small matrices, from which `grouping`, `routing` and `refit` solve a layer's experts without seeing a
token. Shapes and letters are those of `moe2gguf.experts.mlp`; k is the number of experts used.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe2gguf.errors import CalibrationError
from moe2gguf.experts.hidden_states import Rows, chunks
from moe2gguf.experts.mlp import Groups, LayerInputs, Router, SlicedLayer, Stream
from moe2gguf.experts.refit import Normal, sketch
from moe2gguf.experts.routing import RouterMoments

OUTLIER_SHARE = 1e-2
"""Share of a token's output energy above which a neuron carries that token's massive activation."""

MASSIVE_FACTOR = 100.0
"""How many times the median output energy makes a token's activation massive."""


@dataclass(frozen=True)
class ActivationStatistics:
    """How neurons contribute to an MLP's output: a_i = |h_i| |d_i| for each token, d_i the row of `down`.

    importance  (d_ff,): the sum of a_i^2 over the tokens
    outliers    (d_ff,) bool: neurons that carry a massive activation of some token (https://arxiv.org/abs/2402.17762)
    """

    importance: Tensor
    outliers: Tensor


def collect_statistics(down: Tensor, neurons: Rows) -> ActivationStatistics:
    """Sum the contributions of `neurons` (n_token, d_ff), the activations."""
    # The output's energy says which tokens are massive: random directions of it are enough.
    size, seen = down.square().sum(1), down @ sketch(down.shape[1])
    importance, energy = torch.zeros(len(size)), torch.zeros(len(neurons))
    for part in chunks(len(neurons)):
        importance += neurons[part].square().sum(0)
        energy[part] = (neurons[part] @ seen).square().sum(1)
    return ActivationStatistics(importance * size, _find_outliers(neurons, energy, size))


def _find_outliers(neurons: Rows, energy: Tensor, size: Tensor) -> Tensor:
    """Return (d_ff,) bool, from each token's output energy (n_token,) and each neuron's |d_i|^2 (d_ff,)."""
    outliers = torch.zeros(len(size), dtype=torch.bool)
    massive = energy > MASSIVE_FACTOR * energy.median()
    for part in chunks(len(energy)):
        if massive[part].any():
            share = neurons[part][massive[part]].square() * size / energy[part][massive[part], None]
            outliers |= (share > OUTLIER_SHARE).any(0)
    return outliers


def cap_massive_tokens(energy: Tensor) -> Tensor:
    """Return how much each token counts in a fit: 1, and less for those above 100 times the median `energy`.

    Without it a massive activation would decide the fit alone. The result has the shape of `energy`.
    """
    return (MASSIVE_FACTOR * energy.median() / energy.clamp_min(1e-30)).clamp(max=1)


def token_weights(target: Rows) -> Tensor:
    """Return (n_token,): how much each token of the target (n_token, d_model) counts in a fit."""
    return cap_massive_tokens(map_rows(target, lambda y: y.square().sum(1)))


def require_finite(inputs: LayerInputs) -> None:
    """Refuse NaN and infinities.

    Raises:
        CalibrationError: there are some.
    """
    for rows in (rows for stream in inputs.streams for rows in (stream.x, stream.target)):
        if not all(bool(rows[part].isfinite().all()) for part in chunks(len(rows))):
            raise CalibrationError("activations are not finite; check the checkpoint's weights with `moe2gguf verify`")


def map_rows(x: Rows, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply the function to every piece of x, and join the results: a few numbers per token."""
    return torch.cat([function(x[part]) for part in chunks(len(x))])


def expert_energies(down: Tensor, neurons: Rows, groups: Groups) -> Tensor:
    """Return (n_token, n_expert): the squared norm of each expert's output, h^T (D D^T) h over its own neurons."""
    grams = [down[group] @ down[group].T for group in groups]
    energy = torch.empty(len(neurons), len(groups))
    for part in chunks(len(neurons)):
        h = neurons[part]
        for e, (group, gram) in enumerate(zip(groups, grams, strict=True)):
            own = h[:, group]
            energy[part, e] = (own @ gram).mul_(own).sum(-1)
    return energy.clamp_min_(0)


def energy_by_expert(down: Tensor, x: Rows, neurons: Rows, router: Router, k: int) -> Tensor:
    """Return (d_ff, n_expert): the energy a neuron keeps in each expert, the sum of a_i^2 over the expert's tokens.

    neurons (n_token, d_ff): the activations of inputs x (n_token, d_model).
    """
    kept = torch.zeros(len(down), len(router.rows))
    for part in chunks(len(x)):
        chosen = router.prefer(x[part]).topk(k, dim=-1).indices
        runs = torch.zeros(len(chosen), len(router.rows)).scatter_(1, chosen, 1.0)
        kept.addmm_(neurons[part].square().T, runs)
    return kept * down.square().sum(1)[:, None]


def router_moments(x: Rows, targets: Tensor) -> RouterMoments:
    """Sum X^T X, X^T 1, X^T T and 1^T T of the inputs x (n_token, d_model) and the targets (n_token, n)."""
    d_model = x[slice(0, 1)].shape[1]
    xx, x1, xt = torch.zeros(d_model, d_model), torch.zeros(d_model), torch.zeros(d_model, targets.shape[1])
    for part in chunks(len(x)):
        rows = x[part]
        xx.addmm_(rows.T, rows)
        x1 += rows.sum(0)
        xt.addmm_(rows.T, targets[part])
    return RouterMoments(xx, x1, xt, targets.sum(0), len(x))


def largest_logit(x: Rows, rows: Tensor, bias: Tensor | float = 0.0) -> float:
    """Return the largest |logit| that router `rows` (n, d_model) and `bias` (n,) have on x; 0 without rows."""
    return float(map_rows(x, lambda x: x @ rows.T + bias).abs().max()) if len(rows) else 0.0


def expert_agreement(
    layer: SlicedLayer, x: Rows, neurons: Rows, weight: Tensor, k: int
) -> tuple[Tensor, Tensor, float]:
    """Sum <y_e, y_f> (n_expert, n_expert), <y_e, F> (n_expert,) and |F|^2 over the tokens, in doubles on the CPU.

    y_e is what an expert gives, zero where it does not run; F is what the dense MLP gives; `weight` (n_token,) says how
    much a token counts.
    """
    n, down = len(layer.groups), layer.mlp.down
    gram, dot, energy = torch.zeros(n, n), torch.zeros(n), 0.0
    for part in chunks(len(x)):
        h, runs = neurons[part], layer.expert_weights(x[part], k).T[..., None]
        outputs = torch.stack([h[:, group] @ down[group] for group in layer.groups])
        dense, chosen = outputs.sum(0), (outputs * runs).flatten(1)
        weighted = (outputs * (runs * weight[part][:, None])).flatten(1)
        gram.addmm_(weighted, chosen.T)
        dot += weighted @ dense.flatten()
        energy += float(dense.square().sum(1) @ weight[part])
    return gram.cpu().double(), dot.cpu().double(), energy


def normal_equations(layer: SlicedLayer, stream: Stream, weight: Tensor, span: range) -> Normal:
    """Sum the normal equations of what the down projection still misses, given what runs, over the tokens of `span`."""
    normal = Normal.empty(*layer.mlp.down.shape)
    for part in chunks(len(stream.x)):
        own = slice(max(span.start - part.start, 0), max(span.stop - part.start, 0))
        x, h, y, w = (rows[part][own] for rows in (stream.x, stream.neurons, stream.target, weight))
        if len(x):
            h = layer.weigh_neurons(x, h, stream.k)
            normal.add(h, y - h @ layer.mlp.down, w)
    return normal.finished()
