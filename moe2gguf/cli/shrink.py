"""The command shrink: one wish about a model, and the file that meets it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup
from cloup import option, option_group
from rich.markup import escape

from moe2gguf.cli import options as opt
from moe2gguf.cli import tables as display
from moe2gguf.cli.command import Command, NoEffect
from moe2gguf.cli.publish import warn_once
from moe2gguf.gguf.reader import read_gguf

if TYPE_CHECKING:
    from moe2gguf.measure.shrink import Shrunk
    from moe2gguf.measure.trials import Trial

RATIO = opt.Number(1, min_open=True)


@cloup.command(
    cls=Command, no_effect=[NoEffect(("--context",), without=("--room",)), NoEffect(("--types",), beside=("--room",))]
)
@cloup.argument("model", type=opt.ANY, help="A Hugging Face folder or id, or a dense GGUF file.")
@cloup.argument("out", type=opt.OUT, help="The GGUF file to write.")
@option_group(
    "One wish",
    option("--faster", type=RATIO, metavar="F", help="Generate at least F times as fast on this machine."),
    option("--room", type=opt.Size(), metavar="SIZE", help="Need at most so many bytes for the file and its cache."),
    option("--quality", type=RATIO, metavar="Q", help="Have at most Q times the perplexity, and read the least."),
)
@option_group(
    "How",
    option(
        "--types",
        callback=opt.words,
        default="q8_0,q6_k,q5_k_m,q4_k_m,q4_0",
        show_default=True,
        metavar="T,T",
        help="Types that are tried.",
    ),
    opt.number("--context", "n_context", default=4096, type=opt.Whole(1), help="Tokens in the cache of --room."),
    opt.text_option,
    opt.tokens_option,
    opt.threads_option,
)
@option_group("Output", opt.force_option, opt.resume_option, opt.json_option)
def shrink(
    model: Path,
    out: Path,
    text: Path | None,
    tokens: int,
    types: list[str],
    threads: int | None,
    as_json: bool,
    n_context: int,
    faster: float | None,
    room: int | None,
    quality: float | None,
    **options: Any,
) -> None:
    """Make a model faster or smaller, by one wish.

    Smaller types of the dense model are tried first. It is cut into experts where no type is fast enough, or where
    that might make the type that keeps --quality faster. A room is filled with the types that lose least. Speed and
    perplexity are measured here, against MODEL as it is; four fifths of the text fit the experts, the last is scored.

    \b
    Example:
      moe2gguf shrink SmolLM2-135M-Instruct fast.gguf --faster 1.3
      moe2gguf shrink SmolLM2-135M-Instruct small.gguf --room 150MB --context 2048
      moe2gguf shrink Qwen2.5-Coder-0.5B-Instruct-Q4_K_M.gguf lean.gguf --quality 1.2 --text code.txt
    """
    from moe2gguf.measure.shrink import ShrinkSettings, Wish
    from moe2gguf.measure.shrink import shrink as make

    given = [wish for wish in (faster, room, quality) if wish is not None]
    if len(given) != 1:
        raise click.UsageError("give one wish: --faster, --room or --quality")
    done = make(
        model,
        out,
        Wish(room, faster, quality, n_context),
        ShrinkSettings(text, tokens or None, tuple(types), threads),
        progress=display.progress,
        on_plan=warn_once(),
        on_step=lambda line: display.err().print(line, markup=False),
        **options,
    )
    opt.emit(done.to_dict(), as_json, lambda: _print(done))
    display.next_steps(display.suggest_running(done.path, read_gguf(done.path).metadata))


def _print(done: Shrunk) -> None:
    """What was tried, as ratios to the source, and what the file gives."""
    console = display.out()
    display.warnings(done.notes)
    if done.trials:
        table = display.make_table(
            "type", "used", "bytes", "read per token", "perplexity", "speed", numbers=slice(2, None)
        )
        for trial in done.trials:
            table.add_row(*_cells(trial))
        display.print_table(table)
        console.print("perplexity and speed: how many times that of the source\n")
    source, one = done.source, done.chosen
    bits = f"{one.config.bits_per_weight:.2f} bits per weight"
    console.print(f"wrote {escape(str(done.path))}: {one.name}; {one.config.file_size:,} bytes, {bits}")
    console.print(f"source: {source.type}, {source.file_size:,} bytes, {source.active_bytes:,} read per token")
    if one.perplexity:
        low, high = one.perplexity.low, one.perplexity.high
        sure = f"{low:.3f} to {high:.3f}" if high < math.inf else "one window, so there is no interval"
        console.print(f"perplexity: {one.perplexity.mean:.3f} times ({sure}), on {escape(done.text)}")
    if one.speed:
        spread = one.speed.generation
        console.print(
            f"generation: {one.speed.ratio:.2f} times as fast ({spread.median:.1f} tokens/s, {spread.low:.1f} to "
            f"{spread.high:.1f}); prompts: {done.prompt_ratio:.2f} times, on this machine"
        )
    if done.cache:
        total = one.config.file_size + done.cache
        console.print(f"room: {total:,} bytes with {done.cache:,} for the cache; llama.cpp's own buffers come on top")


def _cells(trial: Trial) -> list[str]:
    one, ratio = trial.config, trial.speed and trial.speed.ratio
    perplexity = f"{trial.perplexity.mean:.3f}" if trial.perplexity else ""
    sizes = [f"{one.file_size:,}", f"{one.active_bytes:,}"]
    return [*trial.name.split(", "), *sizes, perplexity, f"{ratio:.2f}" if ratio else ""]
