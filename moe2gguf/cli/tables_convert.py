"""What a person sees of files that were planned and written: tables on stdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from moe2gguf.cli import tables as display
from moe2gguf.experts.layer import LayerReport
from moe2gguf.graphs import GRAPHS

if TYPE_CHECKING:
    from pathlib import Path

    from moe2gguf.measure.check import Check
    from moe2gguf.recipes.convert import Conversion
    from moe2gguf.recipes.densify import Densified
    from moe2gguf.recipes.plan import Plan
    from moe2gguf.recipes.quantize import Quantization, QuantizationPlan

EXACT = {
    "known": "what all its experts compute together, since its metadata says how they were scaled",
    "even": "what all its experts compute together, since its routers are zero",
    "one": "the one expert of each layer",
}
"""What a dense model is that has the experts' own weights, by `Densified.how`."""

WEAK = 0.95
"""Shared experts should be used by at least this share of tokens."""


def print_plan(plan: Plan) -> None:
    """The sums, then the rules for types, and the tensors with --verbose."""
    console = display.out()
    console.print(f"file size           {plan.file_size:,} bytes, {len(plan.tensors)} tensors{_count_files(plan)}")
    console.print(f"bits per weight     {plan.bits_per_weight:.3f}")
    if plan.padding_bytes:
        share = plan.padding_bytes / plan.file_size
        console.print(f"zero-neuron padding {plan.padding_bytes:,} bytes ({share:.1%} of the file)")
    if plan.n_expert:
        _print_active(console, plan)
    else:
        console.print(f"read per token      {plan.active_bytes(0):,} bytes")
    _print_tensors(console, plan)


def print_quantization_plan(plan: QuantizationPlan) -> None:
    """The sums, then the rules for types, and the tensors with --verbose."""
    console = display.out()
    before = plan.source.file_size
    share = f"{plan.file_size / before:.1%} of {before:,}"
    console.print(f"file size       {plan.file_size:,} bytes ({share}){_count_files(plan)}")
    console.print(f"bits per weight {plan.bits_per_weight:.3f}")
    _print_tensors(console, plan)


def _count_files(plan: Plan | QuantizationPlan) -> str:
    return f", in {len(plan.shards)} files" if plan.shards else ""


def _print_tensors(console: Console, plan: Plan | QuantizationPlan) -> None:
    """Where several rules chose the types, how many tensors each decided; every tensor with its type if asked for."""
    from moe2gguf.gguf.types import bits_per_weight

    console.print()
    if len(plan.assigned.counts) > 1:
        rules = display.make_table("tensors", "type", "asked for by", "whose names match")
        for rule, count in plan.assigned.counts:
            rules.add_row(str(count), rule.type.name, escape(rule.origin), escape(rule.pattern))
        console.print(rules)
    if not display.is_verbose():
        console.print("--verbose lists the tensors")
        return
    console.print()
    table = display.make_table("tensor", "shape", "type", "bytes", "bits per weight", numbers=slice(3, None))
    for tensor in plan.tensors:
        shape, bits = " x ".join(map(str, tensor.shape)), bits_per_weight(tensor.type)
        table.add_row(escape(tensor.name), shape, tensor.type.name, f"{tensor.n_bytes:,}", f"{bits:g}")
    console.print(table)


def _print_active(console: Console, plan: Plan) -> None:
    """Bytes per token and the bandwidth bound at each count."""
    console.print()
    table = display.make_table("experts used", "bytes per token", "speed-up, at most", "", numbers=slice(3))
    for k in range(plan.in_shared + 1, plan.n_expert + 1):
        cells = f"{k} of {plan.n_expert}", f"{plan.active_bytes(k):,}", f"{plan.speed_bound(k):.2f} x"
        table.add_row(*cells, _mark_own(plan, k))
    console.print(table)
    console.print("speed-up: the limit that memory bandwidth sets, relative to the dense model; bench measures it")
    if plan.slicing and plan.slicing.method.router == "zero":
        console.print(
            "these plain slices are for all experts: with fewer the text falls apart; --used fits them to a text"
        )


def _mark_own(plan: Plan, k: int) -> str:
    return "as in the file" if k == plan.n_expert_used else ""


def print_conversion(done: Conversion, checked: Check | None) -> None:
    """One line for the file, one for the check."""
    plan = done.plan
    what = f"{plan.n_expert} experts, {plan.n_expert_used} used" if plan.n_expert else "dense"
    tensors = f"{len(plan.tensors)} tensors{_count_reused(done)}"
    display.out().print(f"wrote {_name_written(done)}: {plan.file_size:,} bytes, {tensors}, {what}; verified")
    if done.layers:
        print_layers(done.numbered_layers)
        _print_energy(done)
    if checked:
        display.print_check(checked)


def _name_written(done: Conversion | Quantization) -> str:
    others = f" and {len(done.plan.shards) - 1} more files" if done.plan.shards else ""
    return escape(str(done.path)) + others


def _count_reused(done: Conversion | Quantization) -> str:
    return f" ({done.reused} of them from the interrupted run)" if done.reused else ""


def print_densified(done: Densified) -> None:
    """One line: the output, and why it computes the same; or how far averaged experts are apart."""
    what = EXACT.get(done.how, "")
    if done.apart:
        mean, most = sum(done.apart.values()) / len(done.apart), max(done.apart.values())
        what = f"the average of experts that are {mean:.0%} of their length away from it, {most:.0%} in a layer"
    display.out().print(f"wrote {escape(str(done.path))}: {_measure(done.path):,} bytes, dense; {what}")


def print_folder(done: Conversion) -> None:
    """One line for the folder, then the layers."""
    kind = GRAPHS[done.plan.slicing.target].hf_class if done.plan.slicing else GRAPHS["mixtral"].hf_class
    what = f"{kind}, {done.plan.n_expert} experts, {done.plan.n_expert_used} used"
    display.out().print(f"wrote {escape(str(done.path))}: {_measure(done.path):,} bytes, {what}")
    if done.layers:
        print_layers(done.numbered_layers)


def _measure(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def print_layers(reports: Mapping[int, LayerReport]) -> None:
    """What calibration found: one line, or every layer with --verbose."""
    if display.is_verbose():
        _print_each_layer(reports)
    else:
        kept, best, error = (
            _average([getattr(one, name) for one in reports.values()])
            for name in ("energy_kept", "energy_oracle", "refit_error")
        )
        parts = [f"the chosen experts hold {kept} of the routed experts' output, the best choice would hold {best}"]
        parts += [f"the refit leaves {error} of the error"] if error else []
        head = "mean over the layers: " + "; ".join(parts if kept else parts[1:] or ["all experts are shared"])
        display.out().print(f"{head} (--verbose shows every layer)")
    if weak := [i for i, report in reports.items() if report.shared_rate < WEAK]:
        display.warnings(
            [f"some tokens do not use the shared experts in layers {weak}; fewer shared experts may be better"]
        )


def _average(shares: Sequence[float | None]) -> str:
    """The mean of those that there are, in percent; empty where there is none."""
    known = [share for share in shares if share is not None]
    return f"{sum(known) / len(known):.1%}" if known else ""


def _print_each_layer(reports: Mapping[int, LayerReport]) -> None:
    console = display.out()
    columns = ("layer", "shared", "used by tokens", "energy kept", "best choice", "hit rate", "load", "constant")
    table = display.make_table(*columns, "after refit", numbers=slice(None))
    for i, report in reports.items():
        routed = report.load[report.n_shared :]
        table.add_row(
            str(i),
            str(report.n_shared),
            f"{report.shared_rate:.1%}",
            _format_share(report.energy_kept),
            _format_share(report.energy_oracle),
            _format_share(report.hit_rate),
            f"{min(routed):.0%} - {max(routed):.0%}" if routed else "",
            "" if report.constant_min is None else f"{report.constant_min:.2f}",
            _format_share(report.refit_error),
        )
    console.print(table)
    console.print(
        "shared: number of shared experts, and the share of tokens that use them\n"
        "energy kept: share of the routed experts' output that the chosen experts hold; best choice: the same if the "
        "experts with the largest outputs were chosen; hit rate: share of choices that are the same\n"
        "load: share of tokens that the least and the most used routed expert get\n"
        "constant: smallest value, on held-out tokens, of the direction by which the router chooses the shared experts "
        "(ideal: 1); after refit: share of the error that the refit leaves"
    )


def _print_energy(done: Conversion) -> None:
    """Energy kept at each count, over the layers, beside the speed bound."""
    console, plan = display.out(), done.plan
    columns = ("experts used", "energy kept, mean", "worst layer", "speed-up, at most")
    table = display.make_table(*columns, "", numbers=slice(4))
    for k, values in enumerate(zip(*(layer.energy_by_used for layer in done.layers), strict=True), 1):
        mean = sum(values) / len(values)
        if k <= plan.in_shared:
            continue
        cells = f"{k} of {plan.n_expert}", f"{mean:.1%}", f"{min(values):.1%}", f"{plan.speed_bound(k):.2f} x"
        table.add_row(*cells, _mark_own(plan, k))
    console.print(table)
    console.print("energy kept: how much of the output of all experts so many hold; compare measures what that costs")


def _format_share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def print_quantization(done: Quantization) -> None:
    """One line for the file."""
    plan = done.plan
    display.out().print(
        f"wrote {_name_written(done)}: {plan.file_size:,} bytes, {len(plan.tensors)} tensors{_count_reused(done)}, "
        f"{plan.bits_per_weight:.3f} bits per weight; verified"
    )
