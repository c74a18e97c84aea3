"""The command compare: measure the quality of files against the dense model."""

import sys
from pathlib import Path
from typing import Any

import cloup
from cloup import option, option_group

from moe2gguf.cli import options as opt
from moe2gguf.cli import tables as display
from moe2gguf.cli.command import Command, ContinuedOutput, NoEffect


@cloup.command(
    cls=Command,
    no_effect=[
        NoEffect(("--expert-usage",), without=("--json", "--report")),
        NoEffect(("--wide",), beside=("--json",)),
        NoEffect(("--force",), without=("--csv", "--report", "--picture")),
    ],
)
@cloup.argument("files", nargs=-1, required=True, type=opt.FILE, metavar="FILES", help="The GGUF files to compare.")
@option_group(
    "What to compare",
    option(
        "--reference",
        required=True,
        type=opt.FILE,
        metavar="DENSE",
        help="The file to compare with, dense as a rule; one with experts runs at its own count.",
    ),
    opt.used_list_option,
    opt.devices_option,
    opt.rpc_option,
    option("--types", callback=opt.words, metavar="T,T", help="Also in these types, such as q8_0,q4_k_m."),
    option("--imatrix", type=opt.FILE, help="Importance matrix for --types, of this model or its dense original."),
)
@option_group(
    "Text",
    opt.text_option,
    opt.tokens_option,
    opt.context_option,
)
@option_group(
    "Running",
    opt.threads_option,
    opt.number("--timeout", default=600.0, type=opt.SECONDS, help="Seconds allowed per window."),
    option(
        "--memory",
        "memory_limit",
        hidden=True,
        type=opt.Size(),
        metavar="SIZE",
        help="RAM that a run may take (Linux).  [default: no limit]",
    ),
    option(
        "--room",
        hidden=True,
        type=opt.Size(),
        metavar="SIZE",
        help="Disk space for the logits of DENSE.  [default: 8GiB, at most half of what is free]",
    ),
    option("--scheduler", metavar="ADDRESS", help="Measure on the workers of this Dask scheduler."),
    option(
        "--journal",
        type=ContinuedOutput(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="File of finished rows.  [default: in the cache folder]",
    ),
    opt.resume_option,
)
@option_group(
    "Results",
    option("--speed", is_flag=True, help="Also measure the speed, and recommend one of the files."),
    option("--tasks", is_flag=True, help="Also count the solved of 300 tasks with exact answers, and repetitions."),
    option("--expert-usage", is_flag=True, help="Also count which experts are used (for --json and --report)."),
    option("--wide", is_flag=True, help="Print all columns."),
    opt.json_option,
    option("--csv", "csv_file", type=opt.PAGE, metavar="FILE.csv", help="Also write the rows as a table."),
    opt.report_option,
    option("--picture", type=opt.PAGE, metavar="FILE", help="Also draw quality against speed, as .svg or .png."),
    opt.pages_force_option,
)
def compare(
    files: tuple[Path, ...],
    reference: Path,
    used: list[int],
    device: str | None,
    rpc: str | None,
    types: list[str],
    imatrix: Path | None,
    text: Path | None,
    tokens: int,
    as_json: bool,
    csv_file: Path | None,
    speed: bool,
    expert_usage: bool,
    wide: bool,
    report: Path | None,
    picture: Path | None,
    resume: bool,
    threads: int | None,
    **options: Any,
) -> None:
    """Measure what fewer experts or another type cost in quality.

    Each file runs in llama.cpp with each K on each device, in a process of its own, and is compared with the dense
    file token by token, with the definitions of llama-perplexity. An interrupted comparison continues where it stopped.
    A K that a file cannot run, or a run that fails, is a row with the reason; the exit code is 1 then.

    With --types, files in f32, f16 or bf16 are also quantized (as by moe2gguf quantize --allow-fallback) into the
    cache folder, measured, and removed.

    \b
    Example:
      moe2gguf compare moe.gguf --reference dense.gguf --used 8,6,4,2
      moe2gguf compare moe.gguf --reference dense.gguf --used 8,4 --types q8_0,q4_k_m
      moe2gguf compare moe-q8.gguf moe-q4.gguf --reference dense.gguf --text wiki.test.raw --tokens 0 --csv rows.csv
      moe2gguf compare moe.gguf --reference dense.gguf --used 8,4,2 --speed --report report.html
      moe2gguf compare moe.gguf --reference dense.gguf --device cpu,gpu --scheduler tcp://10.0.0.1:8786
    """
    from moe2gguf.cli import tables_compare as display_compare
    from moe2gguf.measure.bench import Timing
    from moe2gguf.measure.compare import make_settings, open_journal
    from moe2gguf.measure.on_the_fly import compare_types
    from moe2gguf.measure.report.compare import make_page
    from moe2gguf.measure.report.page import plotly_script, write_page
    from moe2gguf.measure.report.picture import require_picture, write_picture

    if report:
        plotly_script()
    if picture:
        require_picture(picture)
    settings = make_settings(text, tokens or None, resume=resume, threads=threads, **options)
    journal = open_journal(settings)
    with journal.interruptible():
        found = compare_types(
            files,
            reference,
            kinds=types,
            imatrix=imatrix,
            experts=expert_usage,
            progress=display.progress,
            used=used,
            devices=opt.devices_from(device, rpc),
            settings=settings,
            timing=Timing(n_prompt=256, n_generate=64, repeat=3, threads=threads) if speed else None,
            journal=journal,
            on_row=display_compare.row_done,
            on_run=display_compare.run_done,
        )
        display.warnings(found.notes)
        if csv_file:
            display_compare.write_csv(found, csv_file)
        if report:
            write_page(make_page(found, sys.argv), report)
        if picture:
            write_picture(found, picture)
        opt.emit(found.to_dict(), as_json, lambda: display_compare.comparison(found, wide=wide))
    if not found.ok:
        raise SystemExit(1)
