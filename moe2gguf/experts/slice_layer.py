"""One layer: a dense MLP and the inputs it sees become experts, a router, and a report on what was lost.

The steps, in order: group the neurons, fit the router to the groups, scale the experts' outputs, refit the down
projections. Each step sums what it needs over the tokens (`moe2gguf.experts.stats`) and solves it from the sums.
"""

import functools
import operator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moe2gguf.errors import CalibrationError
from moe2gguf.experts import refit, routing, stats
from moe2gguf.experts.grouping import group_sizes, regroup_neurons, split_neurons
from moe2gguf.experts.hidden_states import Rows, sample_rows
from moe2gguf.experts.layer import LayerReport
from moe2gguf.experts.mlp import MLP, Groups, LayerInputs, Router, SlicedLayer, Stream
from moe2gguf.experts.slicing import default_n_shared, plain_scale
from moe2gguf.graphs import GRAPHS
from moe2gguf.spec import Slicing

HELD_OUT = 5
"""One of so many tokens (the last ones) is held out of the refit, to choose its ridge."""

REGROUP_ROUNDS = 2
"""The first brings most of it, a third next to nothing (docs/log/experts.md)."""

ALL_EXPERTS_WEIGHT = 4
"""How much more than a smaller count all experts count in a refit for several: else the file would not stay close to
the dense model there (docs/log/experts.md)."""

CLUSTER_TOKENS, REGROUP_TOKENS = 2048, 8192
"""Clustering and regrouping read at least so many tokens, spread over the text: enough (docs/log/experts.md)."""


class FittedRouter(NamedTuple):
    """The router, the constant direction v (d_model,) if it needs one, every expert's energy (n_token, n_expert)."""

    router: Router
    v: Tensor | None
    energy: Tensor


def slice_layer(mlp: MLP, inputs: LayerInputs, slicing: Slicing) -> SlicedLayer:
    """Slice one layer as `slicing` says.

    Raises:
        CalibrationError: activations that are not finite, or a system that cannot be solved.
    """
    stats.require_finite(inputs)
    n_shared = slicing.in_shared or slicing.method.n_shared
    if n_shared is None:
        n_shared = default_n_shared(slicing.n_expert, slicing.n_expert_used)
    try:
        groups = group_neurons(mlp.down, inputs.stream(slicing.n_fitted), slicing, n_shared)
        return slice_groups(mlp, inputs, slicing, groups, n_shared)
    except torch.linalg.LinAlgError as error:
        raise CalibrationError(
            f"a system of equations has no solution ({error}); give more --calibration-tokens of more varied text"
        ) from error


def group_neurons(down: Tensor, stream: Stream, slicing: Slicing, n_shared: int) -> Groups:
    """Group the neurons as the method says, the `n_shared` shared experts first."""
    method, sizes = slicing.method, group_sizes(len(down), slicing.n_expert)
    if method.group == "contiguous":
        return list(torch.arange(len(down)).split(sizes))
    found = stats.collect_statistics(down, stream.neurons)
    # The shared experts get the neurons with the most energy, before all others those with a massive activation.
    importance = found.importance + (found.outliers * found.importance.max() if n_shared else 0)
    fires = stats.map_rows(sample_rows(stream.neurons, CLUSTER_TOKENS), torch.abs)
    groups = split_neurons(importance, fires, sizes, n_shared, method.seed)
    # Groups and router are fitted to each other in turn; the first round starts from what contributes together.
    if method.group == "routed":
        x, neurons = (sample_rows(rows, REGROUP_TOKENS) for rows in (stream.x, stream.neurons))
        for _ in range(REGROUP_ROUNDS):
            router = fit_router(down, x, neurons, groups, slicing, n_shared).router
            kept = stats.energy_by_expert(down, x, neurons, router, slicing.n_fitted)
            groups = regroup_neurons(kept, sizes, n_shared, found.outliers)
    return groups


def slice_groups(mlp: MLP, inputs: LayerInputs, slicing: Slicing, groups: Groups, n_shared: int) -> SlicedLayer:
    """Slice one layer into the given groups, the first `n_shared` of them shared: router, scale, refit, report.

    Raises:
        torch.linalg.LinAlgError: a system that cannot be solved.
    """
    stream, k = inputs.stream(slicing.n_fitted), slicing.n_fitted
    router, v, energy = fit_router(mlp.down, stream.x, stream.neurons, groups, slicing, n_shared)
    used = replace(slicing, method=replace(slicing.method, amplify="used"))
    plain = SlicedLayer(mlp, groups, router, torch.from_numpy(plain_scale(used)).to(energy.device))
    report = report_routing(plain, stream.x, energy, v, n_shared, k)
    sliced = replace(plain, scale=_fit_scale(plain, inputs, slicing), report=report)
    return refit_down(sliced, inputs) if slicing.method.refit else sliced


def fit_router(down: Tensor, x: Rows, neurons: Rows, groups: Groups, slicing: Slicing, n_shared: int) -> FittedRouter:
    """Fit the router of the method to the groups, on inputs x (n_token, d_model) and their activations `neurons`."""
    graph, method = GRAPHS[slicing.target], slicing.method
    # The targets are the norms of the routed experts' outputs; the shared experts run anyway.
    energy = stats.expert_energies(down, neurons, groups)
    moments = stats.router_moments(x, energy[:, n_shared:].sqrt())
    # The regression gives the routed experts their logits; how far all are scaled down is decided by the largest one.
    unrouted = method.router == "zero" or n_shared == len(groups)
    rows = torch.zeros(len(groups) - n_shared, len(moments.x1))
    if graph.has_selection_bias:
        bias = torch.zeros(len(groups))
        if not unrouted:
            rows, shift = routing.rows_and_bias(moments)
            rows, bias = routing.order_by_sigmoid(rows, shift, n_shared, stats.largest_logit(x, rows, shift))
        return FittedRouter(Router(rows, bias, graph, slicing.in_shared), None, energy)
    rows = rows if unrouted else routing.expert_rows(moments)
    largest = stats.largest_logit(x, rows)
    if graph.has_shared:
        rows = routing.order_by_softmax(rows, n_shared, largest)
        return FittedRouter(Router(rows, graph=graph, in_shared=slicing.in_shared), None, energy)
    # Without a shared expert in the graph, the constant direction v gives those here their constant logits.
    v = routing.constant_direction(moments)
    return FittedRouter(Router(routing.assemble_router(rows, v, n_shared, largest, method.amplify)), v, energy)


def _fit_scale(plain: SlicedLayer, inputs: LayerInputs, slicing: Slicing) -> Tensor:
    """Return the output scale (n_expert,) of the method; `plain` has the scale k."""
    k, amplify, stream = slicing.n_expert_used, slicing.method.amplify, inputs.stream(slicing.n_expert_used)
    if slicing.in_shared or amplify in ("exact", "used"):
        return torch.from_numpy(plain_scale(slicing)).to(plain.scale.device)
    if amplify == "any":
        return refit.inverse_weights(stats.map_rows(stream.x, plain.router.probabilities))
    agreement = stats.expert_agreement(plain, stream.x, stream.neurons, stats.token_weights(stream.target), k)
    return refit.fit_scale(*agreement, k).to(plain.scale.device)


def refit_down(sliced: SlicedLayer, inputs: LayerInputs) -> SlicedLayer:
    """Refit the down projection for the counts of all streams; the report gets the share of the error that is left."""
    n = len(sliced.groups)
    weights = [
        stats.token_weights(stream.target) * (ALL_EXPERTS_WEIGHT if stream.k == n else 1) for stream in inputs.streams
    ]
    n_token = len(inputs.streams[0].x)
    n_train = n_token - n_token // HELD_OUT
    spans = range(n_train), range(n_train, n_token)
    # One set of weights serves all counts: what it misses is summed over them.
    train, held_out = (
        functools.reduce(
            operator.add,
            (stats.normal_equations(sliced, *one, span) for one in zip(inputs.streams, weights, strict=True)),
        )
        for span in spans
    )
    delta, strength, error = refit.refit(train, held_out)
    report = sliced.report and replace(sliced.report, refit_error=error, refit_strength=strength if error < 1 else None)
    return replace(sliced, mlp=replace(sliced.mlp, down=sliced.mlp.down + delta), report=report)


def report_routing(
    sliced: SlicedLayer, x: Rows, energy: Tensor, v: Tensor | None, n_shared: int, k: int
) -> LayerReport:
    """Report how much of the experts' energy (n_token, n_expert) the router's choices have at k experts used."""
    # What the router chooses: its order of the experts, and the first k of them.
    n = len(sliced.groups)
    order = stats.map_rows(x, sliced.router.prefer).argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(energy, dtype=torch.bool).scatter_(1, order[:, :k], True)
    first_held_out = len(x) - len(x) // HELD_OUT
    by_used = energy.gather(1, order).sum(0).cumsum(0)
    report = LayerReport(
        n_shared=n_shared,
        load=chosen.float().mean(0).tolist(),
        constant_min=None if v is None else float(stats.map_rows(x, lambda x: x @ v)[first_held_out:].min()),
        shared_rate=float(chosen[:, :n_shared].all(1).float().mean()),
        energy_by_used=(by_used / by_used[-1].clamp_min(1e-30)).tolist(),
    )
    # Beside it the best possible choice: the routed experts with the largest outputs, token by token.
    if not n_shared < k < n:
        return report
    routed, chosen = energy[:, n_shared:], chosen[:, n_shared:]
    oracle = torch.zeros_like(chosen).scatter_(1, routed.topk(k - n_shared, 1).indices, True)
    total = routed.sum().clamp_min(1e-30)
    return replace(
        report,
        energy_kept=float((routed * chosen).sum() / total),
        energy_oracle=float((routed * oracle).sum() / total),
        hit_rate=float((oracle & chosen).sum() / oracle.sum()),
    )
