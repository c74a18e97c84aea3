"""The command bench: measure the speed of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli.options import (
    FILE,
    devices_from,
    devices_option,
    emit,
    json_option,
    llama_threads_option,
    rpc_option,
    used_list_option,
)


@cloup.command()
@cloup.argument("files", nargs=-1, required=True, type=FILE, metavar="FILES", help="The GGUF files to time.")
@option_group(
    "What",
    option("--reference", type=FILE, metavar="DENSE", help="A dense file that speeds are divided by."),
    used_list_option,
    devices_option,
    rpc_option,
)
@option_group(
    "Running",
    llama_threads_option,
    option("--prompt", "n_prompt", default=512, show_default=True, type=click.IntRange(1), help="Tokens of a prompt."),
    option("--generate", "n_generate", default=128, show_default=True, type=click.IntRange(1), help="Tokens after it."),
    option("--repeat", default=5, show_default=True, type=click.IntRange(1), help="Runs of each."),
    option("--timeout", default=1800.0, show_default=True, help="Seconds that a run may take."),
)
@json_option
def bench(
    files: tuple[Path, ...],
    reference: Path | None,
    used: list[int],
    device: str | None,
    rpc: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how fast files run, and how fast memory would let them.

    Prompt and generation speed are those of llama-bench. Every file at every K runs once in each round, so that a
    busy machine slows all of them alike; shown are the median and the lowest and highest of all rounds.

    \b
    Example:
      moe2gguf bench moe.gguf --reference dense.gguf --used 8,4,2
      moe2gguf bench moe-q4.gguf moe-q8.gguf --prompt 64 --generate 32 --repeat 3 --json
    """
    from moe2gguf.cli import tables_compare as display_compare
    from moe2gguf.measure.bench import Timing
    from moe2gguf.measure.bench import bench as bench_files

    found = bench_files(
        files,
        used=used,
        devices=devices_from(device, rpc),
        reference=reference,
        timing=Timing(**options),
        on_run=display_compare.run_done,
    )
    emit(found.to_dict(), as_json, lambda: display_compare.speeds(found))
    if not found.ok:
        raise SystemExit(1)
