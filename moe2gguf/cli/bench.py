"""The command bench: measure the speed of files."""

from pathlib import Path
from typing import Any

import cloup
from cloup import option, option_group

from moe2gguf.cli import options as opt
from moe2gguf.cli import tables as display
from moe2gguf.cli.command import Command


@cloup.command(cls=Command)
@cloup.argument("files", nargs=-1, required=True, type=opt.FILE, metavar="FILES", help="The GGUF files to time.")
@option_group(
    "What to time",
    option(
        "--reference", type=opt.FILE, metavar="DENSE", help="File, dense as a rule, to which the speeds are also given."
    ),
    opt.used_list_option,
    opt.devices_option,
    opt.rpc_option,
)
@option_group(
    "Running",
    opt.threads_option,
    opt.number("--prompt", "n_prompt", default=512, type=opt.ONE, help="Tokens of the prompt."),
    opt.number("--generate", "n_generate", default=128, type=opt.ONE, help="Tokens to generate."),
    opt.number("--repeat", default=5, type=opt.ONE, help="Number of rounds."),
    opt.number("--timeout", default=1800.0, type=opt.SECONDS, help="Seconds allowed per run."),
)
@opt.json_option
def bench(
    files: tuple[Path, ...],
    reference: Path | None,
    used: list[int],
    device: str | None,
    rpc: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the speed of files and its bandwidth limit.

    Prompt and generation are measured as by llama-bench. Each file runs with each K once per round, so that a busy
    machine slows all of them alike. The table has the median, the lowest and the highest of the rounds. The exit code
    is 1 where a file could not run with a K.

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
        devices=opt.devices_from(device, rpc),
        reference=reference,
        timing=Timing(**options),
        on_run=display_compare.run_done,
    )
    display.warnings(found.notes)
    opt.emit(found.to_dict(), as_json, lambda: display_compare.speeds(found))
    if not found.ok:
        raise SystemExit(1)
