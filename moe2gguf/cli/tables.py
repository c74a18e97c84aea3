"""What a person sees: tables on stdout, progress and warnings on stderr (silent when it is not a terminal)."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from moe2gguf.gguf.verify import Verification
    from moe2gguf.llama.generate import Generation
    from moe2gguf.measure.check import Check
    from moe2gguf.measure.imatrix import Collection
    from moe2gguf.measure.sample import Sample
    from moe2gguf.recipes.convert import Conversion
    from moe2gguf.recipes.densify import Densified
    from moe2gguf.recipes.heal import Healing
    from moe2gguf.recipes.plan import Plan
    from moe2gguf.recipes.quantize import Quantization, QuantizationPlan

PLAIN_WIDTH = 120
WIDE = 250
"""Columns of a table in a pipe or a file."""
WEAK = 0.95
"""Always-on experts should run for at least this share of tokens."""


def out() -> Console:
    """stdout; when it is not a terminal, plain and wide enough that no name is cut."""
    return Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def err() -> Console:
    """stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def lines(table: Table) -> None:
    """Print a table: a terminal folds what is too wide, a pipe or a file gets whole lines."""
    console = out()
    if not console.is_terminal:
        console = Console(soft_wrap=True, highlight=False, width=WIDE)
    console.print(table)


@contextlib.contextmanager
def progress(stage: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with time left on stderr, and bytes with their rate; nothing when stderr is not a terminal.

    What is counted are bytes, but tokens times layers in the stage "calibrate", which has its share done instead.
    """
    console = err()
    amount = (
        (TaskProgressColumn(),) if stage == "calibrate" else (DownloadColumn(binary_units=False), TransferSpeedColumn())
    )
    columns = (TextColumn("{task.description:9}"), BarColumn(), *amount, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(stage, total=total)
        yield lambda n: bar.advance(task, n)


def warnings(lines: Iterable[str]) -> None:
    """One line each on stderr."""
    for line in lines:
        err().print(f"[yellow]warning:[/yellow] {escape(line)}")


def plan(plan: Plan) -> None:
    """Every tensor, then the sums."""
    console = out()
    _tensors(console, plan)
    console.print(f"file size           {plan.file_size:,} bytes, {len(plan.tensors)} tensors{_files(plan)}")
    console.print(f"bits per weight     {plan.bits_per_weight:.3f}")
    if plan.padding_bytes:
        share = plan.padding_bytes / plan.file_size
        console.print(f"zero-neuron padding {plan.padding_bytes:,} bytes ({share:.1%} of the file)")
    if plan.n_expert:
        _active(console, plan)
    else:
        console.print(f"read per token      {plan.active_bytes(0):,} bytes")


def quantization_plan(plan: QuantizationPlan) -> None:
    """Every tensor, the rules, then the sums."""
    console = out()
    _tensors(console, plan)
    before = plan.source.file_size
    share = f"{plan.file_size / before:.1%} of {before:,}"
    console.print(f"file size       {plan.file_size:,} bytes ({share}){_files(plan)}")
    console.print(f"bits per weight {plan.bits_per_weight:.3f}")


def _files(plan: Plan | QuantizationPlan) -> str:
    return f", in {len(plan.shards)} files" if plan.shards else ""


def _tensors(console: Console, plan: Plan | QuantizationPlan) -> None:
    """Every tensor with its type, then the rules that chose the types and how many tensors each decided."""
    from moe2gguf.gguf.types import bits_per_weight

    table = Table("tensor", "shape", "type", "bytes", "bits per weight", box=None, pad_edge=False)
    table.columns[3].justify = table.columns[4].justify = "right"
    for tensor in plan.tensors:
        shape, bits = " x ".join(map(str, tensor.shape)), bits_per_weight(tensor.type)
        table.add_row(escape(tensor.name), shape, tensor.type.name, f"{tensor.n_bytes:,}", f"{bits:g}")
    console.print(table)
    console.print()
    if plan.assigned.counts:
        rules = Table("tensors", "type", "because of", "pattern", box=None, pad_edge=False)
        for rule, count in plan.assigned.counts:
            rules.add_row(str(count), rule.type.name, escape(rule.origin), escape(rule.pattern))
        console.print(rules)
        console.print()


def _active(console: Console, plan: Plan) -> None:
    """Bytes per token and the bandwidth bound at each count."""
    console.print()
    table = Table("experts used", "bytes per token", "speed-up, at most", box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for k in range(1, plan.n_expert + 1):
        mark = " (file)" if k == plan.n_expert_used else ""
        table.add_row(f"{k} of {plan.n_expert}{mark}", f"{plan.active_bytes(k):,}", f"{plan.speed_bound(k):.2f} x")
    console.print(table)
    console.print("The bound is what memory bandwidth alone would allow against the dense model; measure to know.")


def conversion(done: Conversion, checked: Check | None) -> None:
    """One line for the file, one for the check."""
    plan = done.plan
    what = f"{plan.n_expert} experts, {plan.n_expert_used} used" if plan.n_expert else "dense"
    tensors = f"{len(plan.tensors)} tensors{_reused(done)}"
    out().print(f"wrote {_written(done)}: {plan.file_size:,} bytes, {tensors}, {what}; verified")
    if done.layers:
        layers(done.layers)
        _energy(done)
    if checked:
        check(checked)


def _written(done: Conversion | Quantization) -> str:
    others = f" and {len(done.plan.shards) - 1} more files" if done.plan.shards else ""
    return escape(str(done.path)) + others


def _reused(done: Conversion | Quantization) -> str:
    return f" ({done.reused} of them from the run that was stopped)" if done.reused else ""


def densified(done: Densified) -> None:
    """One line, and what one MLP cannot reproduce."""
    out().print(f"wrote {escape(str(done.path))}: dense; factors: {done.how}")
    if done.errors:
        worst = max(range(len(done.errors)), key=lambda i: done.errors[i])
        mean = sum(done.errors) / len(done.errors)
        out().print(
            f"missed of the experts' output energy: {mean:.2%}, most in layer {worst}: {done.errors[worst]:.2%}"
        )


def folder(done: Conversion) -> None:
    """One line for the folder, then the layers."""
    size = sum(file.stat().st_size for file in done.path.rglob("*") if file.is_file())
    what = f"{done.plan.n_expert} experts, {done.plan.n_expert_used} used"
    out().print(f"wrote {escape(str(done.path))}: {size:,} bytes, MixtralForCausalLM, {what}")
    if done.layers:
        layers(done.layers)


def heal_line(line: Mapping[str, Any]) -> None:
    """One line of a healing run on stderr: every layer, every evaluation, every tenth step."""
    if line["stage"] == "layerwise":
        text = f"layer {line['layer']}: held-out error {line['error_before']:.4f} -> {line['error_after']:.4f}"
    elif line["stage"] == "evaluation":
        scores = ", ".join(f"k = {k}: {kl:.4f}" for k, kl in line["kl"].items())
        text = f"step {line['step']}: held-out KL {scores}{' (best)' if line['best'] else ''}"
    elif line["step"] % 10 == 0:
        text = f"step {line['step']}: loss {line['loss']:.4f} with {line['used']} experts"
        text += f", {line['tokens_per_second']:.0f} tokens/s"
    else:
        return
    err().print(text, markup=False)


def healing(done: Healing) -> None:
    """The first and the best held-out scores by count."""
    console = out()
    if scores := done.evaluations:
        best = min(scores, key=lambda line: line["kl_mean"])
        table = Table("experts used", "KL at first", "KL now", "perplexity now", "dense", box=None, pad_edge=False)
        for column in table.columns:
            column.justify = "right"
        for k in best["kl"]:
            values = (scores[0]["kl"][k], best["kl"][k], math.exp(best["nll"][k]), math.exp(best["nll_dense"]))
            table.add_row(k, *(f"{value:.4g}" for value in values))
        console.print(table)
        if needed := best.get("needed"):
            console.print(
                f"A router with a threshold would run {needed['all']:.2f} experts per token: {needed['easy']:.2f} for "
                f"the half the dense model predicts best, {needed['hard']:.2f} for the other."
            )
    console.print(f"wrote {escape(str(done.path))}")


def layers(reports: Sequence[dict[str, Any]]) -> None:
    """What calibration found, layer by layer."""
    console = out()
    columns = (
        "layer",
        "always on",
        "for every token",
        "energy kept",
        "best choice",
        "hit rate",
        "load",
        "constant",
        "after refit",
    )
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for i, report in enumerate(reports):
        routed = report["load"][int(report["always_on"]) :]
        table.add_row(
            str(i),
            f"{report['always_on']:.0f}",
            f"{report['always_on_rate']:.1%}",
            _share(report, "energy_kept"),
            _share(report, "energy_oracle"),
            _share(report, "hit_rate"),
            f"{min(routed):.0%} - {max(routed):.0%}" if routed else "",
            f"{report['constant_min']:.2f}",
            _share(report, "refit_error"),
        )
    console.print(table)
    console.print(
        "energy kept: share of the routed experts' output that the chosen ones hold (best choice: if always the "
        "largest were chosen); load: share of tokens, least and most busy routed expert; constant: smallest value, "
        "on tokens held out, of the direction that keeps experts always on (perfect: 1); after refit: error left"
    )
    if weak := [i for i, report in enumerate(reports) if report["always_on_rate"] < WEAK]:
        warnings([f"always-on experts do not run for every token in layers {weak}; fewer of them may do better"])


def _energy(done: Conversion) -> None:
    """Energy kept at each count, over the layers, beside the speed bound."""
    console, plan = out(), done.plan
    columns = ("experts used", "energy kept, mean", "worst layer", "speed-up, at most")
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for k, values in enumerate(zip(*(layer["energy_by_used"] for layer in done.layers), strict=True), 1):
        mean = sum(values) / len(values)
        mark = " (file)" if k == plan.n_expert_used else ""
        table.add_row(
            f"{k} of {plan.n_expert}{mark}", f"{mean:.1%}", f"{min(values):.1%}", f"{plan.speed_bound(k):.2f} x"
        )
    console.print(table)
    console.print("energy kept: here of all experts, always-on ones included.")


def _share(report: dict[str, Any], key: str) -> str:
    return f"{report[key]:.1%}" if key in report else ""


def quantization(done: Quantization) -> None:
    """One line for the file."""
    plan = done.plan
    out().print(
        f"wrote {_written(done)}: {plan.file_size:,} bytes, {len(plan.tensors)} tensors{_reused(done)}, "
        f"{plan.bits_per_weight:.3f} bits per weight; verified"
    )


def check(checked: Check) -> None:
    """The comparison in llama.cpp, in words."""
    console = out()
    console.print(
        f"against {escape(checked.dense)} over {checked.n_token} tokens, {checked.n_expert_used} experts used:"
    )
    table = Table("", "largest logit difference", "KL divergence", "same top token", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row(
        "sliced - dense", f"{checked.max_difference:.2e}", f"{checked.kl_mean:.2e} nats", f"{checked.top1:.2%}"
    )
    table.add_row(
        "dense - dense (noise)",
        f"{checked.noise_max_difference:.2e}",
        f"{checked.noise_kl_mean:.2e} nats",
        f"{checked.noise_top1:.2%}",
    )
    console.print(table)
    console.print(f"perplexity {checked.perplexity:.3f}, dense {checked.perplexity_dense:.3f}")
    console.print(("ok: " if checked.ok else "NOT THE SAME: ") + escape(checked.reason))


def verification(found: Verification, checked: Check | None) -> None:
    """Sound or not, and why."""
    console = out()
    path = escape(str(found.path))
    for problem in found.problems:
        console.print(f"problem: {escape(problem)}")
    for note in found.notes:
        console.print(f"note: {escape(note)}")
    verdict = "NOT SOUND" if found.problems else "sound"
    console.print(f"{path}: {verdict}, {found.n_tensors} tensors, {found.n_bytes:,} bytes of weights")
    if checked:
        check(checked)


def stream(prompt: str, pieces: Generation) -> None:
    """The prompt and its continuation on stdout as it comes; speeds on stderr."""
    sys.stdout.write(prompt)
    sys.stdout.flush()
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    if speed := pieces.speed:
        err().print(
            f"prompt {speed.n_prompt} tokens, {speed.prompt_speed:.1f} tokens/s; "
            f"generated {speed.n_generated}, {speed.generation_speed:.1f} tokens/s ({speed.stopped})"
        )


def sampled(done: Sample) -> None:
    """The file and what is in it."""
    out().print(f"{done.path}: {done.n_text:,} texts, {done.n_token:,} tokens", markup=False)


def collection(done: Collection) -> None:
    """The file, what went into it, and the experts that saw little."""
    merged = f", {done.n_merged} {'matrix' if done.n_merged == 1 else 'matrices'} merged" if done.n_merged else ""
    resumed = f" ({done.n_resumed:,} of them before)" if done.n_resumed else ""
    out().print(
        f"{done.path}: {len(done.matrix.entries)} tensors, {done.n_token:,} tokens{resumed}{merged}", markup=False
    )
    if done.scarce:
        table = Table("layer", "experts and their tokens", box=None, pad_edge=False)
        for layer in dict.fromkeys(one.layer for one in done.scarce):
            experts = ", ".join(f"{one.expert}: {one.n_token}" for one in done.scarce if one.layer == layer)
            table.add_row(layer, experts)
        out().print(table)
