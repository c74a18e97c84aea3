"""What a person sees: tables on stdout, progress and warnings on stderr (seldom a line when it is not a terminal)."""

from __future__ import annotations

import contextlib
import itertools
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
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

from moe2gguf.errors import NESTED
from moe2gguf.llama.machine import describe_load

if TYPE_CHECKING:
    from pathlib import Path

    from moe2gguf.gguf.verify import Verification
    from moe2gguf.llama.generate import Generation
    from moe2gguf.measure.check import Check
    from moe2gguf.measure.imatrix import Collection
    from moe2gguf.spec import Metadata

PLAIN_WIDTH = 120
VERBOSE = "moe2gguf.verbose"
"""Where the click context remembers --verbose."""
MOST_LINES = 5
"""Of the list in an error's message."""
_MORE = re.compile(r"\W*and (\d+) more")
WIDE = 250
"""Columns of a table in a pipe or a file."""
NAME = 12
"""Columns that a narrow terminal leaves for names."""
SLOWEST = 600.0
"""Seconds that a step may take for the time left to be told."""
PULSE = 30.0
_pulse = SimpleNamespace(last=time.monotonic())  # when a log heard of us last
_CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")


def out() -> Console:
    """stdout; when it is not a terminal, plain and wide enough that no name is cut."""
    return Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def err() -> Console:
    """stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def make_table(*columns: str, numbers: slice = slice(0)) -> Table:
    """A table without lines; the columns of numbers are aligned to the right. A narrow terminal folds what is long."""
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for column in table.columns[numbers]:
        column.justify = "right"
    return table


def print_table(table: Table) -> None:
    """Print a table: a terminal folds what is too wide; a pipe or a file gets whole lines, and so does a terminal that
    has no room for the words of the columns behind the first, which may be long names.
    """
    console, wide = out(), Console(soft_wrap=True, highlight=False, width=WIDE)
    names = max(len(word) for word in " ".join(map(str, table.columns[0].cells)).split(" "))
    others = Measurement.get(wide, wide.options, table).minimum - names
    (console if console.is_terminal and others + NAME <= console.width else wide).print(table)


COUNT_BYTES = ("write", "verify")


@contextlib.contextmanager
def progress(stage: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with time left on stderr, and bytes with their rate; a line now and then when stderr is not a terminal.

    Stages that count something else than bytes show the share that is done.
    """
    console, done = err(), 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        bar.advance(task, n)
        if not console.is_terminal:
            tell(f"{stage}: {done / max(total, 1):.0%}")

    counts_bytes = stage in COUNT_BYTES
    amount = (DownloadColumn(binary_units=False), TransferSpeedColumn()) if counts_bytes else (TaskProgressColumn(),)
    columns = (TextColumn("{task.description:9}"), BarColumn(), *amount, TimeRemainingColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True, speed_estimate_period=SLOWEST) as bar:
        task = bar.add_task(stage, total=total)
        yield advance


def start_clock() -> None:
    """A command begins: a log hears of it after `PULSE` seconds."""
    _pulse.last = time.monotonic()


def tell(line: str) -> None:
    """A line of progress on stderr; where that is no terminal, one every `PULSE` seconds, with the machine's load."""
    console = err()
    if not console.is_terminal:
        now = time.monotonic()
        if now - _pulse.last < PULSE:
            return
        _pulse.last = now
        line = f"{line} ({load})" if (load := describe_load()) else line
    console.print(line, markup=False)


def is_verbose() -> bool:
    """Whether the command was given --verbose."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(VERBOSE))


def cut_list(items: Sequence[str], *, whole: bool) -> list[str]:
    """The first `MOST_LINES` items and how many more there are; all if the `whole` is wanted, or it saves no line.

    The last item may say "and 7 more" already.
    """
    if whole or len(items) <= MOST_LINES + 1:
        return [*items]
    rest = _MORE.fullmatch(items[-1])
    n = len(items) - MOST_LINES + (int(rest[1]) - 1 if rest else 0)
    return [*items[:MOST_LINES], f"  and {n} more (--verbose shows {'more of them' if rest else 'all'})"]


def warnings(lines: Iterable[str]) -> None:
    """One line each on stderr."""
    for line in cut_list([*lines], whole=is_verbose()):
        err().print(f"[yellow]warning:[/yellow] {escape(line.strip())}")


def next_steps(*commands: Sequence[object]) -> None:
    """Name commands to go on with, a line each, where a person reads them."""
    console = err()
    for words, command in zip(("next:", *["   or:"] * len(commands)), commands, strict=False):
        if console.is_terminal:
            console.print(words, shlex.join(map(str, command)), markup=False)


def suggest_running(path: Path, metadata: Metadata) -> list[object]:
    """The command that lets a file speak: chat where it has a chat template."""
    if "tokenizer.chat_template" in metadata:
        return ["moe2gguf", "chat", path]
    return ["moe2gguf", "run", path, "The capital of France is"]


def shorten(message: str, *, whole: bool) -> str:
    """An error's message with at most `MOST_LINES` of its list, unless the `whole` is wanted."""
    head, *items = re.split(rf"\n(?!{NESTED[1:]})", message)
    way = [items.pop()] if items and items[0].startswith("  - ") and not items[-1].startswith("  - ") else []
    return "\n".join([head, *cut_list(items, whole=whole), *way])


def print_check(checked: Check) -> None:
    """The comparison in llama.cpp, in words."""
    console, ours = out(), checked.difference
    console.print(
        f"compared with {escape(str(checked.dense))} over {ours.n_token} tokens, {checked.n_expert_used} experts used:"
    )
    table = make_table("", "largest logit difference", "KL divergence", "same top token", numbers=slice(1, None))
    for name, found in (("this file", ours), ("dense file again (noise)", checked.noise)):
        table.add_row(name, f"{found.max_difference:.2e}", f"{found.kl_mean:.2e} nats", f"{found.top1:.2%}")
    console.print(table)
    console.print(f"perplexity {ours.perplexity:.3f}, dense {ours.perplexity_base:.3f}")
    console.print(("ok: " if checked.ok else "NOT THE SAME: ") + escape(checked.reason))
    if tokens := checked.tokens:
        differ = f"{tokens.n_differing} of {tokens.n_text} texts have others than the folder's tokenizer gives"
        console.print(f"token ids: {differ if tokens.named else f'those of the folder, of {tokens.n_text} texts'}")
    for one in tokens.named if tokens else ():
        console.print(f"  {one.text!r}: llama.cpp {[*one.llama_cpp]}, the tokenizer {[*one.tokenizer]}", markup=False)


def print_verification(found: Verification, checked: Check | None) -> None:
    """Sound or not, and why."""
    console = out()
    path = escape(str(found.path))
    for problem in cut_list(found.problems, whole=is_verbose()):
        console.print(f"problem: {escape(problem.strip())}")
    for note in found.notes:
        console.print(f"note: {escape(note)}")
    verdict = "NOT SOUND" if found.problems else "sound"
    console.print(f"{path}: {verdict}, {found.n_tensors} tensors, {found.n_bytes:,} bytes of weights")
    if checked:
        print_check(checked)


def print_stream(prompt: str, generation: Generation) -> None:
    """The prompt and its continuation on stdout as it comes; speeds on stderr. An error comes before the prompt."""
    first = next(generation, "")
    sys.stdout.write(prompt)
    pieces(itertools.chain([first], generation))
    warnings(generation.notes)
    speed(generation)


def pieces(text: Iterable[str]) -> None:
    """A text on stdout as it comes, and the end of its line. A terminal gets no control characters from a model."""
    safe = _CONTROL if sys.stdout.isatty() else {}
    for piece in text:
        sys.stdout.write(piece.translate(safe))
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def speed(generation: Generation) -> None:
    """How fast a text came, on stderr."""
    if found := generation.speed:
        prompt = f"prompt {found.n_prompt} tokens, {found.prompt_speed:.1f} tokens/s"
        answer = f"generated {found.n_generated}, {found.generation_speed:.1f} tokens/s ({found.stopped})"
        load = f"; {busy}" if (busy := describe_load()) else ""
        err().print(f"{prompt}; {answer}{load}", style="dim", markup=False)


def print_collection(done: Collection) -> None:
    """The file, what went into it, and the experts that saw little."""
    merged = f", {done.n_merged} {'matrix' if done.n_merged == 1 else 'matrices'} merged" if done.n_merged else ""
    resumed = f" ({done.n_resumed:,} of them before)" if done.n_resumed else ""
    out().print(
        f"wrote {done.path}: {len(done.matrix.entries)} tensors, {done.n_token:,} tokens{resumed}{merged}", markup=False
    )
    if done.scarce:
        table = make_table("layer", "experts and their tokens")
        for layer in dict.fromkeys(one.layer for one in done.scarce):
            experts = ", ".join(f"{one.expert}: {one.n_token}" for one in done.scarce if one.layer == layer)
            table.add_row(layer, experts)
        out().print(table)
