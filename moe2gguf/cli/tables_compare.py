"""What a person sees of comparisons and benchmarks: tables on stdout, one line per finished row on stderr."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from moe2gguf.cli import tables as display
from moe2gguf.errors import list_names
from moe2gguf.gguf.outputs import write_whole
from moe2gguf.measure.pareto import judge_quality
from moe2gguf.measure.results import describe_drafts
from moe2gguf.measure.tasks import describe_share

if TYPE_CHECKING:
    from moe2gguf.measure.bench import Bench
    from moe2gguf.measure.grid import RunConfig
    from moe2gguf.measure.results import Comparison, ResultRow
    from moe2gguf.measure.speed import Run, Speed, Spread


def row_done(row: ResultRow) -> None:
    """One line of progress: the sweep is alive, and this is how far it got."""
    if row.quality:
        summary = row.quality.summary
        what = f"perplexity {summary.perplexity:.3f}, KL {summary.kl_mean:.3g}"
        what += " (journal)" if row.resumed else f" ({row.quality.seconds:.1f} s)"
    else:
        what = row.reason.splitlines()[0]
    if row.tasks:
        what = f"tasks {describe_share(row.tasks.shares['all'])}"
    display.tell(f"{row.config.label}: {row.status}, {what}")


def comparison(found: Comparison, *, wide: bool = False) -> None:
    """The reference, one line per row, the reasons of those that did not run, and what cannot be told apart.

    The table fits 80 columns; `wide` adds the other measures.
    """
    console = display.out()
    _heading(found)
    more = ("accepted", "99 %", "top-5", "RMS dp", "corr", "max dlogit", "NaN") if wide else ()
    columns = ("file", "used", "perplexity", "x reference", "KL mean", "top-1", *more)
    devices = wide or len({row.config.device for row in found.rows}) > 1
    table = display.make_table(*columns, "type", *["device"] * devices, numbers=slice(2, len(columns)))
    for row in found.rows:
        c = row.config
        used = f"{c.n_expert_used} of {c.n_expert}" if c.n_expert else "dense"
        cells = [escape(c.name or c.path.name), used, *_scores(row, wide), c.type, c.device]
        table.add_row(*cells[: len(table.columns)])
    display.print_table(table)
    if found.noise:
        s = found.noise.summary
        console.print(
            "noise floor (the reference against itself, computed in another order over the first window): "
            f"KL mean {s.kl_mean:.2g}, top-1 {s.top1:.2%}"
        )
    console.print()
    _tasks(found)
    _reasons(found)
    _devices(found)
    _verdicts(found)
    _workers(found)
    _choice(found)


def _heading(found: Comparison) -> None:
    base = found.base
    console = display.out()
    if base:
        console.print(
            f"reference {escape(str(found.reference.path))}: perplexity {base.perplexity_base:.4f} "
            f"+- {base.perplexity_base_error:.4f} over {base.n_token} tokens"
        )
    console.print(f"KL divergence in nats per token; mean above {found.kl_limit:.2g} is more than noise")
    console.print()


def _scores(row: ResultRow, wide: bool) -> tuple[str, ...]:
    """The cells of a row's measures: four, or eleven where they are `wide`."""
    n_cell = 11 if wide else 4
    if row.quality is None:
        return (row.status, *[""] * (n_cell - 1))
    s = row.quality.summary
    cells = (
        f"{s.perplexity:.5g}",
        f"{s.ratio:.3f} +- {s.ratio_error:.1g}",
        f"{s.kl_mean:.3g}{'=' if row.above_noise is False else ''}",
        f"{s.top1:.2%}",
        f"{s.acceptance:.2%}",
        f"{s.kl_percentiles['99']:.3g}",
        f"{s.top5:.2%}",
        f"{s.p_change_rms:.2%}",
        f"{s.correlation:.4f}",
        f"{s.max_difference:.3g}",
        str(s.n_bad),
    )
    return cells[:n_cell]


def _tasks(found: Comparison) -> None:
    """How many tasks of each kind are solved, and how much of open answers is repeated, the reference first."""
    if not found.tasks:
        return
    kinds = next(iter(found.tasks.values())).shares
    table = display.make_table("tasks solved", *kinds, "repeated 4-grams")
    for label, scores in found.tasks.items():
        table.add_row(escape(label), *map(describe_share, scores.shares.values()), f"{scores.repeated:.0%}")
    display.print_table(table)
    display.out().print()


def _reasons(found: Comparison) -> None:
    for name, origin in found.settings.get("made", {}).items():
        display.out().print(f"{escape(name)}: {escape(origin)}")
    for row in found.rows:
        if row.reason:
            display.out().print(f"{escape(row.config.label)} {row.status}: {escape(row.reason)}")


def _devices(found: Comparison) -> None:
    for pair in found.agreements:
        what = escape(pair.reason)
        if pair.quality:
            s = pair.quality.summary
            what = f"mean KL {s.kl_mean:.3g}, top-1 {s.top1:.2%}, largest logit difference {s.max_difference:.3g}"
        display.out().print(f"{escape(pair.second)} against {escape(pair.first)}, first window: {what}")


def _workers(found: Comparison) -> None:
    counts = Counter(row.quality.worker for row in found.rows if row.quality and row.quality.worker)
    if counts:
        words = ", ".join(f"{escape(name)} {n}" for name, n in counts.items())
        display.out().print(f"rows measured by workers: {words}")


def _verdicts(found: Comparison) -> None:
    console = display.out()
    if any(row.above_noise is False for row in found.rows):
        console.print("= the reference itself, as far as the noise floor can tell")
    _print_some(f"not told apart from {name}: {list_names(others)}" for name, others in found.not_told_apart.items())
    resumed = sum(row.resumed for row in found.rows)
    if resumed:
        console.print(
            f"{resumed} of {len(found.rows)} rows were measured before (--no-resume measures them again): "
            f"{escape(found.settings['journal'])}"
        )


def _choice(found: Comparison) -> None:
    console = display.out()
    if found.recommendation is None:
        if best := judge_quality(found.rows):
            console.print(f"take {escape(best.label)}: {escape(best.reason)}")
        return
    console.print()
    table = _speed_table()
    if found.reference_speed:
        table.add_row(escape(found.reference.label), *_speed_cells(found.reference_speed), "reference")
    for row in found.rows:
        if row.speed:
            mark = "front" if row.config.label in found.recommendation.front else ""
            table.add_row(escape(row.config.label), *_speed_cells(row.speed), mark)
    display.print_table(table)
    console.print(
        "median (lowest - highest); bound: tokens/s for which the memory's bandwidth allows the weights to be read;"
    )
    console.print("front: no other row is better in both quality and speed")
    console.print()
    console.print(f"take {escape(found.recommendation.label)}: {escape(found.recommendation.reason)}")
    drafts = describe_drafts(found.rows)
    _print_some(f"{label} as a draft of the reference: {words}" for label, words in drafts.items())


def _print_some(lines: Iterable[str]) -> None:
    """The first of the lines, all with --verbose."""
    for line in display.cut_list([*lines], whole=display.is_verbose()):
        display.out().print(line, markup=False)


def run_done(one: RunConfig, run: Run) -> None:
    """One line of progress for every timed run."""
    display.tell(f"{one.label}: prompt {run.prompt_speed:.1f}, generation {run.generation_speed:.1f} tokens/s")


def speeds(found: Bench) -> None:
    """One line per row with medians and ranges, then the bandwidth behind the bound."""
    console = display.out()
    table = _speed_table()
    for row in found.rows:
        cells = _speed_cells(row.speed) if row.speed else ("refused" if row.config.refusal else "failed",)
        table.add_row(escape(row.config.label), *cells)
    display.print_table(table)
    console.print()
    for row in found.rows:
        if row.reason:
            console.print(f"{escape(row.config.label)}: {escape(row.reason)}")
    given = found.settings
    console.print(
        f"median (lowest - highest) of {given['repeat']} rounds; prompt of {given['prompt']}, generation of "
        f"{given['generate']} tokens, {given['threads']} thread{'s' * (given['threads'] > 1)}"
    )
    if found.bandwidth:
        limit = f"{found.bandwidth / 1e9:.1f} GB/s, measured here"
        console.print(f"bound: what {limit}, allow for the weights a token reads")


def _speed_table() -> Table:
    columns = ("", "prompt tokens/s", "generation tokens/s", "bound", "x reference", "first token", "memory", "")
    return display.make_table(*columns, numbers=slice(1, 7))


def _speed_cells(speed: Speed) -> tuple[str, ...]:
    def words(spread: Spread) -> str:
        return f"{spread.median:.1f} ({spread.low:.1f} - {spread.high:.1f})"

    return (
        words(speed.prompt),
        words(speed.generation),
        "" if speed.bound is None else f"{speed.bound:.0f}",
        "" if speed.ratio is None else f"{speed.ratio:.2f}",
        f"{speed.first_token.median:.2f} s",
        f"{speed.peak_memory / 2**20:.0f} MiB",
    )


def write_csv(found: Comparison, path: Path) -> None:
    """Write the lines of `Comparison.flat`, numbers unrounded. Raises OutputError if the file cannot be written."""
    lines, table = found.flat(), io.StringIO(newline="")
    writer = csv.DictWriter(table, list(dict.fromkeys(name for line in lines for name in line)))
    writer.writeheader()
    writer.writerows(lines)
    with write_whole(path) as partial:
        partial.write_bytes(table.getvalue().encode("utf-8", "surrogateescape"))  # a path may be no UTF-8
