"""One layer: a dense MLP and the inputs it sees become experts, a router, and a report on what was lost.

Shapes: x (n_token, d_model) is the post-norm MLP input, h (n_token, d_ff) = silu(G x) * (U x); `down` is kept as
(d_ff, d_model), one row per neuron, so that the MLP is h @ down. Activations are made chunk by chunk and never kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe2gguf.errors import CalibrationError
from moe2gguf.experts import amplification, grouping, routing
from moe2gguf.experts.grouping import Groups
from moe2gguf.experts.refit import Normal, refit
from moe2gguf.spec import Slicing

CHUNK = 2048
HELD_OUT = 5
"""One of so many tokens (the last ones) is held out of the refit, to choose its ridge."""

ROUTED_MASS = 0.3
"""The routed experts' share of the softmax in the `any` mode."""

CARRIER_SHARE = 1e-2
CARRIER_FACTOR = 100.0


@dataclass(frozen=True)
class MLP:
    """The weights of one dense MLP, float32: gate, up and down, each (d_ff, d_model)."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def hidden(self, x: Tensor) -> Tensor:
        """(n_token, d_model) -> (n_token, d_ff)."""
        return torch.nn.functional.silu(x @ self.gate.T).mul_(x @ self.up.T)

    def __call__(self, x: Tensor) -> Tensor:
        """(n_token, d_model) -> (n_token, d_model)."""
        return torch.cat([self.hidden(x[part]) @ self.down for part in chunks(len(x))])


@dataclass(frozen=True)
class Inputs:
    """What the layer sees, (n_token, d_model) each.

    dense   the MLP's input in the dense model
    output  what the dense MLP makes of it
    sliced  its input in the model whose earlier layers are sliced already
    target  what the sliced MLP should add to that model's residual stream
    """

    dense: Tensor
    output: Tensor
    sliced: Tensor
    target: Tensor


@dataclass(frozen=True)
class Carved:
    """The sliced MLP: `groups` of neuron numbers, `router` (n_expert, d_model), `scale` (n_expert,), new weights.

    `report` holds what the user is shown, see `carve`.
    """

    mlp: MLP
    groups: Groups
    router: Tensor
    scale: Tensor
    report: dict[str, float | list[float]]

    def weights(self, x: Tensor, k: int) -> Tensor:
        """(n_token, n_expert): renormalized top-k softmax times the amplification, zero where an expert does not run.

        llama.cpp's graph: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-graph.cpp#L2148-L2162
        """
        p = (x @ self.router.T).softmax(-1)
        top, chosen = p.topk(k, dim=-1)
        return torch.zeros_like(p).scatter_(1, chosen, top / top.sum(-1, keepdim=True)) * self.scale

    def masked(self, x: Tensor, k: int) -> Tensor:
        """(n_token, d_ff): hidden activations times the weight of their expert."""
        return self.mlp.hidden(x).mul_(self.weights(x, k)[:, owners(self.groups)])

    def __call__(self, x: Tensor, k: int) -> Tensor:
        """(n_token, d_model) -> (n_token, d_model), as the file will compute it."""
        return torch.cat([self.masked(x[part], k) @ self.mlp.down for part in chunks(len(x))])


def chunks(n_token: int, size: int = CHUNK) -> Iterator[slice]:
    """Slices that cover range(n_token)."""
    return (slice(start, min(start + size, n_token)) for start in range(0, n_token, size))


def owners(groups: Groups) -> Tensor:
    """(d_ff,): the expert each neuron belongs to."""
    owner = torch.empty(sum(map(len, groups)), dtype=torch.long, device=groups[0].device)
    for e, group in enumerate(groups):
        owner[group] = e
    return owner


def carve(mlp: MLP, inputs: Inputs, slicing: Slicing) -> Carved:
    """Group, route, amplify and refit one layer as `slicing` says.

    The report: `energy_kept` (share of the routed experts' output energy that the chosen ones have), `energy_oracle`
    (the same if the truly largest were chosen), `hit_rate` (share of choices that are the oracle's), `load` (share
    of tokens per expert), `constant_min` (smallest v . x on held-out tokens), `always_on`, `always_on_rate` (share of
    tokens for which all of those run), and after a refit `refit_error` (share of the held-out error left) and
    `refit_strength`.

    Raises:
        CalibrationError: activations that are not finite, or no room for a routed expert.
    """
    recipe, n, k = slicing.recipe, slicing.n_expert, slicing.n_expert_used
    if not all(bool(x.isfinite().all()) for x in (inputs.dense, inputs.sliced, inputs.target)):
        raise CalibrationError("activations are not finite; check the checkpoint's weights with `moe2gguf verify`")
    moments = _moments(mlp, inputs)
    n_shared = default_always_on(n, k) if recipe.always_on is None else recipe.always_on
    groups = _group(mlp, moments, slicing, n_shared)
    energy = _energies(mlp, inputs.sliced, groups[n_shared:])
    v = routing.constant_direction(moments.xx, moments.x1)
    rows = _rows(mlp, inputs.sliced, groups[n_shared:], energy, moments.xx, recipe.router)
    router = _assemble(rows, v, inputs.sliced, n_shared, recipe.amplify, n)
    plain = Carved(mlp, groups, router, amplification.uniform(n, k), {})
    carved = Carved(mlp, groups, router, _scale(plain, inputs, slicing), _report(plain, inputs, energy, v, n_shared, k))
    return _refitted(carved, inputs, k) if recipe.refit else carved


def default_always_on(n_expert: int, n_expert_used: int) -> int:
    """All that run but a quarter of all experts, at least half of them: 8 of 12, 4 of 8, 2 of 4 (n = 16)."""
    return min(max(n_expert_used - n_expert // 4, n_expert_used // 2), n_expert - 1)


@dataclass(frozen=True)
class _Moments:
    """energy (d_ff,) = E[a^2] and together (d_ff, d_ff) = E[a a^T] of contributions a_i = |h_i| |d_i|, on dense inputs;

    xx (d_model, d_model) = X^T X and x1 (d_model,) = X^T 1 of the sliced inputs; `carriers` (d_ff,) must always run.
    """

    energy: Tensor
    together: Tensor
    xx: Tensor
    x1: Tensor
    carriers: Tensor


def _moments(mlp: MLP, inputs: Inputs) -> _Moments:
    size = mlp.down.norm(dim=1)
    d_ff = len(size)
    together = torch.zeros(d_ff, d_ff, device=size.device)
    carriers = torch.zeros(d_ff, dtype=torch.bool, device=size.device)
    output = inputs.output.square().sum(1)
    massive = output > CARRIER_FACTOR * output.median()
    for part in chunks(len(inputs.dense)):
        a = mlp.hidden(inputs.dense[part]).abs_().mul_(size)
        together.addmm_(a.T, a)
        if massive[part].any():
            share = a[massive[part]].square() / output[part][massive[part], None]
            carriers |= (share > CARRIER_SHARE).any(0)
    x = inputs.sliced
    return _Moments(together.diagonal().clone(), together, x.T @ x, x.sum(0), carriers)


def _group(mlp: MLP, moments: _Moments, slicing: Slicing, n_shared: int) -> Groups:
    recipe = slicing.recipe
    sizes = grouping.group_sizes(len(moments.energy), slicing.n_expert)
    if recipe.group == "contiguous":
        return list(torch.arange(len(moments.energy), device=mlp.gate.device).split(sizes))
    importance = moments.energy.clone()
    if n_shared:
        importance[moments.carriers] += importance.max()  # whatever carries a massive activation always runs
    similarity = None
    if recipe.group == "weights":
        gate = torch.nn.functional.normalize(mlp.gate, dim=1)
        similarity = gate @ gate.T
    elif recipe.group == "activations":
        similarity = moments.together
    return grouping.split(importance, similarity, sizes, n_shared, recipe.seed)


def _energies(mlp: MLP, x: Tensor, groups: Groups) -> Tensor:
    """(n_token, len(groups)): the squared norm of each expert's output."""
    energy = torch.empty(len(x), len(groups), device=x.device)
    for part in chunks(len(x)):
        h = mlp.hidden(x[part])
        for e, group in enumerate(groups):
            energy[part, e] = (h[:, group] @ mlp.down[group]).square().sum(-1)
    return energy


def _rows(mlp: MLP, x: Tensor, groups: Groups, energy: Tensor, xx: Tensor, router: str) -> Tensor:
    """Centered rows (n_routed, d_model) of the routed experts."""
    if not groups or router == "zero":
        return torch.zeros(len(groups), x.shape[1], device=x.device)
    if router == "gate-mean":
        return routing.centered(routing.gate_mean(mlp.gate, groups))
    return routing.centered(routing.least_squares(xx, x.T @ energy.sqrt()))


def _assemble(rows: Tensor, v: Tensor, x: Tensor, n_shared: int, amplify: str, n_expert: int) -> Tensor:
    largest = float((x @ rows.T).abs().max()) if len(rows) else 0.0
    if amplify == "any" and 0 < n_shared < n_expert:
        return routing.concentrated(rows, v, n_shared, ROUTED_MASS, largest)
    size = routing.EXACT_SIZE if amplify == "exact" else routing.SIZE
    return routing.assemble(rows, v, n_shared, largest, size)


def _scale(plain: Carved, inputs: Inputs, slicing: Slicing) -> Tensor:
    """The amplification (n_expert,) of the recipe; `plain` has factor k."""
    n, k, amplify = slicing.n_expert, slicing.n_expert_used, slicing.recipe.amplify
    if amplify == "exact":
        return amplification.uniform(n, n)
    if amplify == "used":
        return amplification.uniform(n, k)
    if amplify == "any":
        one = Carved(plain.mlp, plain.groups, plain.router, amplification.uniform(n, 1), {})
        counts = sorted({n, k, max((n + k) // 2, 1)})
        return amplification.inverse_weights([one.weights(inputs.sliced, count) for count in counts])
    dot = square = 0.0
    for part in chunks(len(inputs.sliced)):
        ours, dense = plain(inputs.sliced[part], k), plain.mlp(inputs.sliced[part])
        dot, square = dot + float((ours * dense).sum()), square + float(ours.square().sum())
    return amplification.fitted(dot, square, n, k)


def _refitted(carved: Carved, inputs: Inputs, k: int) -> Carved:
    """The same experts with a corrected down projection."""
    x, target = inputs.sliced, inputs.target
    n_train = len(x) - len(x) // HELD_OUT
    energy = target.square().sum(1)
    weight = (100 * energy.median() / energy.clamp_min(1e-30)).clamp(max=1)  # no token may own the fit
    normals = []
    for span in (range(n_train), range(n_train, len(x))):
        normal = Normal.empty(len(carved.mlp.down), x.shape[1])
        for part in chunks(len(span)):
            tokens = slice(span.start + part.start, span.start + part.stop)
            h = carved.masked(x[tokens], k)
            normal.add(h, target[tokens] - h @ carved.mlp.down, weight[tokens])
        normals.append(normal)
    delta, strength, error = refit(*normals)
    mlp = MLP(carved.mlp.gate, carved.mlp.up, carved.mlp.down + delta)
    report = carved.report | {"refit_error": error, "refit_strength": strength}
    return Carved(mlp, carved.groups, carved.router, carved.scale, report)


def _report(
    carved: Carved, inputs: Inputs, energy: Tensor, v: Tensor, n_shared: int, k: int
) -> dict[str, float | list[float]]:
    n = len(carved.groups)
    chosen = carved.weights(inputs.sliced, k) > 0
    held_out = inputs.sliced[len(inputs.sliced) - len(inputs.sliced) // HELD_OUT :]
    report: dict[str, float | list[float]] = {
        "always_on": float(n_shared),
        "load": chosen.float().mean(0).tolist(),
        "constant_min": float((held_out @ v).min()),
        "always_on_rate": float(chosen[:, :n_shared].all(1).float().mean()),
    }
    if n_shared < k < n:
        oracle = torch.zeros_like(energy, dtype=torch.bool)
        oracle.scatter_(1, energy.topk(k - n_shared, 1).indices, True)
        total = energy.sum().clamp_min(1e-30)
        report |= {
            "energy_kept": float((energy * chosen[:, n_shared:]).sum() / total),
            "energy_oracle": float((energy * oracle).sum() / total),
            "hit_rate": float((oracle & chosen[:, n_shared:]).sum() / oracle.sum()),
        }
    return report
