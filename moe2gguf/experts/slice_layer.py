"""One layer: a dense MLP and the inputs it sees become experts, a router, and a report on what was lost.

Shapes: x (n_token, d_model) is the post-norm MLP input, h (n_token, d_ff) = silu(G x) * (U x); `down` is kept as
(d_ff, d_model), one row per neuron, so that the MLP is h @ down. Activations are made chunk by chunk and never kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from moe2gguf.errors import CalibrationError
from moe2gguf.experts import amplification, grouping, regroup, routing
from moe2gguf.experts.grouping import Groups
from moe2gguf.experts.hidden_states import Rows, Store, chunks, thinned
from moe2gguf.experts.mlp import MLP, Carved, Inputs, Report
from moe2gguf.experts.refit import Normal, add_gram, mirror, refit
from moe2gguf.experts.slicing import default_always_on
from moe2gguf.spec import Slicing

HELD_OUT = 5
"""One of so many tokens (the last ones) is held out of the refit, to choose its ridge."""

ROUTED_MASS = 0.3
"""The routed experts' share of the softmax in the `any` mode."""

CARRIER_SHARE = 1e-2
CARRIER_FACTOR = 100.0


@dataclass(frozen=True)
class Contributions:
    """How neurons contribute to the dense model's output: a_i = |h_i| |d_i| for each token.

    together (d_ff, d_ff) = sum of a a^T over the tokens; `carriers` (d_ff,) carry a massive activation.
    """

    together: Tensor
    carriers: Tensor


def observe(mlp: MLP, x: Rows, output: Store) -> Contributions:
    """Run the dense MLP on x (n_token, d_model) into `output`, and count what each neuron contributes."""
    size = mlp.down.norm(dim=1)
    together, energies = torch.zeros(len(size), len(size)), []
    for part in chunks(len(x)):
        h = mlp.hidden(x[part])
        y = h @ mlp.down
        output[part] = y
        energies.append(y.square().sum(1))
        a = h.abs_().mul_(size)
        add_gram(together, a, a)
    return Contributions(mirror(together), _carriers(mlp, x, torch.cat(energies), size))


def _carriers(mlp: MLP, x: Rows, energy: Tensor, size: Tensor) -> Tensor:
    """(d_ff,): neurons with a share of the output of a token whose output energy (n_token,) is massive."""
    carriers = torch.zeros(len(size), dtype=torch.bool)
    massive = energy > CARRIER_FACTOR * energy.median()
    for part in chunks(len(x)):
        if massive[part].any():
            a = mlp.hidden(x[part][massive[part]]).abs_().mul_(size)
            share = a.square() / energy[part][massive[part], None]
            carriers |= (share > CARRIER_SHARE).any(0)
    return carriers


def carve(mlp: MLP, inputs: Inputs, slicing: Slicing, seen: Contributions) -> Carved:
    """Group, route, amplify and refit one layer as `slicing` says; `seen` is what `observe` found.

    The report: `energy_kept` (share of the routed experts' output energy that the chosen ones have), `energy_oracle`
    (the same if the truly largest were chosen), `hit_rate` (share of choices that are the oracle's), `energy_by_used`
    (share of all experts' energy that the first 1, 2 ... n of the router's order have), `load` (share of tokens per
    expert), `constant_min` (smallest v . x on held-out tokens), `always_on`, `always_on_rate` (share of tokens for
    which all of those run), and after a refit `refit_error` (share of the held-out error left) and `refit_strength`.

    Raises:
        CalibrationError: activations that are not finite, or a system that cannot be solved.
    """
    method, n, k = slicing.method, slicing.n_expert, slicing.n_expert_used
    x = inputs.sliced
    _require_finite(inputs)
    n_shared = default_always_on(n, k) if method.n_shared is None else method.n_shared
    groups = _group(seen, slicing, n_shared)
    try:
        if method.group == "routed":
            few, pinned = thinned(x, regroup.TOKENS), seen.carriers.float()
            for _ in range(regroup.ROUNDS):
                router = _route(mlp, few, groups, slicing, n_shared).router
                groups = regroup.regrouped(mlp, few, groups, router, n_shared, k, pinned)
        return carve_groups(mlp, inputs, slicing, groups, n_shared)
    except torch.linalg.LinAlgError as error:
        raise CalibrationError(
            f"a system of equations has no solution ({error}); give more --calibration-tokens of more varied text"
        ) from error


def carve_groups(mlp: MLP, inputs: Inputs, slicing: Slicing, groups: Groups, n_shared: int) -> Carved:
    """Route, amplify and refit the given groups, the first `n_shared` of them always on; see `carve`."""
    x, n, k = inputs.sliced, slicing.n_expert, slicing.n_expert_used
    router, v, energy = _route(mlp, x, groups, slicing, n_shared)
    plain = Carved(mlp, groups, router, amplification.uniform(n, k))
    report = _report(plain, x, energy, v, n_shared, k)
    carved = Carved(mlp, groups, router, _scale(plain, inputs, slicing), report)
    return _refitted(carved, inputs, _token_weights(inputs.target), k) if slicing.method.refit else carved


def _require_finite(inputs: Inputs) -> None:
    for rows in (inputs.dense, inputs.sliced, inputs.target):
        if not all(bool(rows[part].isfinite().all()) for part in chunks(len(rows))):
            raise CalibrationError("activations are not finite; check the checkpoint's weights with `moe2gguf verify`")


def _group(seen: Contributions, slicing: Slicing, n_shared: int) -> Groups:
    method, importance = slicing.method, seen.together.diagonal().clone()
    sizes = grouping.group_sizes(len(importance), slicing.n_expert)
    if method.group == "contiguous":
        return list(torch.arange(len(importance)).split(sizes))
    if n_shared:
        importance += seen.carriers.float() * importance.max()
    return grouping.split(importance, seen.together, sizes, n_shared, method.seed)


def _energies(mlp: MLP, x: Rows, groups: Groups) -> Tensor:
    """(n_token, len(groups)): the squared norm of each expert's output, h^T (D^T D) h."""
    grams = [mlp.down[group] @ mlp.down[group].T for group in groups]
    energy = torch.empty(len(x), len(groups))
    for part in chunks(len(x)):
        h = mlp.hidden(x[part])
        for e, (group, gram) in enumerate(zip(groups, grams, strict=True)):
            own = h[:, group]
            energy[part, e] = (own @ gram).mul_(own).sum(-1)
    return energy.clamp_min_(0)


class _Routed(NamedTuple):
    """router (n_expert, d_model), constant direction v (d_model,), every expert's energy (n_token, n_expert)."""

    router: Tensor
    v: Tensor
    energy: Tensor


def _route(mlp: MLP, x: Rows, groups: Groups, slicing: Slicing, n_shared: int) -> _Routed:
    method, energy = slicing.method, _energies(mlp, x, groups)
    xx, x1, xt = _correlations(x, energy[:, n_shared:].sqrt())
    v = routing.constant_direction(xx, x1)
    rows = _rows(groups[n_shared:], xx, xt, method.router)
    return _Routed(_assemble(rows, v, x, n_shared, method.amplify, slicing.n_expert), v, energy)


def _correlations(x: Rows, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X^T X (d_model, d_model), X^T 1 (d_model,) and X^T T (d_model, n) of the inputs and targets (n_token, n)."""
    d_model = x[slice(0, 1)].shape[1]
    xx, x1, xt = torch.zeros(d_model, d_model), torch.zeros(d_model), torch.zeros(d_model, targets.shape[1])
    for part in chunks(len(x)):
        rows = x[part]
        xx.addmm_(rows.T, rows)
        x1 += rows.sum(0)
        xt.addmm_(rows.T, targets[part])
    return xx, x1, xt


def _rows(groups: Groups, xx: Tensor, xt: Tensor, router: str) -> Tensor:
    """Centered rows (n_routed, d_model) of the routed experts."""
    if not groups or router == "zero":
        return torch.zeros(len(groups), len(xx))
    return routing.centered(routing.least_squares(xx, xt))


def _assemble(rows: Tensor, v: Tensor, x: Rows, n_shared: int, amplify: str, n_expert: int) -> Tensor:
    largest = float(_each(x, lambda x: x @ rows.T).abs().max()) if len(rows) else 0.0
    if amplify == "any" and 0 < n_shared < n_expert:
        return routing.concentrated(rows, v, n_shared, ROUTED_MASS, largest)
    size = routing.EXACT_SIZE if amplify == "exact" else routing.SIZE
    return routing.assemble(rows, v, n_shared, largest, size)


def _each(x: Rows, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The function of every piece of x, as one tensor: for results of a few numbers per token."""
    return torch.cat([function(x[part]) for part in chunks(len(x))])


def _scale(plain: Carved, inputs: Inputs, slicing: Slicing) -> Tensor:
    """The amplification (n_expert,) of the method; `plain` has factor k."""
    n, k, amplify, x = slicing.n_expert, slicing.n_expert_used, slicing.method.amplify, inputs.sliced
    if amplify == "exact":
        return amplification.uniform(n, n)
    if amplify == "used":
        return amplification.uniform(n, k)
    if amplify == "any":
        return amplification.inverse_weights(_each(x, lambda x: (x @ plain.router.T).softmax(-1)))
    return amplification.fitted(plain, x, _token_weights(inputs.target), k)


def _token_weights(target: Rows) -> Tensor:
    """(n_token,): how much each token counts in a fit, so that none owns it."""
    energy = _each(target, lambda y: y.square().sum(1))
    return (100 * energy.median() / energy.clamp_min(1e-30)).clamp(max=1)


def _refitted(carved: Carved, inputs: Inputs, weight: Tensor, k: int) -> Carved:
    """The same experts with a refitted down projection; `weight` (n_token,) is how much each token counts."""
    x, target = inputs.sliced, inputs.target
    n_train = len(x) - len(x) // HELD_OUT
    normals = []
    for span in (range(n_train), range(n_train, len(x))):
        normal = Normal.empty(*carved.mlp.down.shape)
        for part in chunks(len(span)):
            tokens = slice(span.start + part.start, span.start + part.stop)
            h = carved.masked(x[tokens], k)
            normal.add(h, target[tokens] - h @ carved.mlp.down, weight[tokens])
        normals.append(normal.finished())
    delta, strength, error = refit(*normals)
    mlp = replace(carved.mlp, down=carved.mlp.down + delta)
    report = carved.report | {"refit_error": error} | ({"refit_strength": strength} if error < 1 else {})
    return replace(carved, mlp=mlp, report=report)


def _report(carved: Carved, x: Rows, energy: Tensor, v: Tensor, n_shared: int, k: int) -> Report:
    n = len(carved.groups)
    p = _each(x, lambda x: x @ carved.router.T)
    order = p.argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(energy, dtype=torch.bool).scatter_(1, order[:, :k], True)
    first_held_out = len(x) - len(x) // HELD_OUT
    report: Report = {
        "always_on": float(n_shared),
        "load": chosen.float().mean(0).tolist(),
        "constant_min": float(_each(x, lambda x: x @ v)[first_held_out:].min()),
        "always_on_rate": float(chosen[:, :n_shared].all(1).float().mean()),
        "energy_by_used": _shares(energy.gather(1, order).sum(0).cumsum(0)),
    }
    routed, chosen = energy[:, n_shared:], chosen[:, n_shared:]
    if n_shared < k < n:
        oracle = torch.zeros_like(chosen).scatter_(1, routed.topk(k - n_shared, 1).indices, True)
        total = routed.sum().clamp_min(1e-30)
        report |= {
            "energy_kept": float((routed * chosen).sum() / total),
            "energy_oracle": float((routed * oracle).sum() / total),
            "hit_rate": float((oracle & chosen).sum() / oracle.sum()),
        }
    return report


def _shares(sums: Tensor) -> list[float]:
    shares: list[float] = (sums / sums[-1].clamp_min(1e-30)).tolist()
    return shares
