"""What a person sees: tables on stdout, progress and warnings on stderr (silent when it is not a terminal)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

if TYPE_CHECKING:
    from moe2gguf.convert import Conversion
    from moe2gguf.export.verify import Verification
    from moe2gguf.harness.check import Check
    from moe2gguf.harness.generate import Generation
    from moe2gguf.planning import Plan

PLAIN_WIDTH = 120


def out() -> Console:
    """stdout; when it is not a terminal, plain and wide enough that no name is cut."""
    return Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def err() -> Console:
    """stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress(stage: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes, rate and time left on stderr; nothing when stderr is not a terminal."""
    console = err()
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        DownloadColumn(binary_units=False),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
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
    table = Table("tensor", "shape", "type", "bytes", box=None, pad_edge=False)
    table.columns[3].justify = "right"
    for tensor in plan.tensors:
        shape = " x ".join(map(str, tensor.shape))
        table.add_row(tensor.name, shape, tensor.type.name, f"{tensor.n_bytes:,}")
    console.print(table)
    console.print()
    console.print(f"file size           {plan.file_size:,} bytes, {len(plan.tensors)} tensors")
    if plan.padding_bytes:
        share = plan.padding_bytes / plan.file_size
        console.print(f"zero-neuron padding {plan.padding_bytes:,} bytes ({share:.1%} of the file)")
    if plan.n_expert:
        _active(console, plan)
    else:
        console.print(f"read per token      {plan.active_bytes(0):,} bytes")


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
    out().print(
        f"wrote {escape(str(done.path))}: {plan.file_size:,} bytes, {len(plan.tensors)} tensors, {what}; verified"
    )
    if checked:
        check(checked)


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
