"""The command compare: measure the quality of files against the dense model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import tables as display
from moe2gguf.cli.options import (
    FILE,
    devices_from,
    devices_option,
    emit,
    json_option,
    llama_threads_option,
    rpc_option,
    used_list_option,
    words,
)


@cloup.command()
@cloup.argument("files", nargs=-1, required=True, type=FILE, metavar="FILES", help="The GGUF files to compare.")
@option_group(
    "What",
    option("--reference", required=True, type=FILE, metavar="DENSE", help="The dense file they are compared with."),
    used_list_option,
    devices_option,
    rpc_option,
    option("--types", callback=words, metavar="T,T", help="Also in these types, such as q4_k_m,q8_0, made on the fly."),
    option("--imatrix", type=FILE, help="Importance matrix for them, of a file or of its dense parent."),
)
@option_group(
    "Text",
    option("--text", type=FILE, help="A text file.  [default: a built-in text]"),
    option("--tokens", default=2048, show_default=True, type=click.IntRange(0), help="Tokens to score; 0 is all."),
    option("--context", default=512, show_default=True, type=click.IntRange(8), help="Tokens of a window."),
)
@option_group(
    "Running",
    llama_threads_option,
    option("--timeout", default=600.0, show_default=True, help="Seconds that a window may take."),
    option("--memory", type=click.IntRange(1), metavar="MIB", help="Private memory that a run may have (Linux)."),
    option("--room", type=click.IntRange(1), metavar="MIB", help="Disk for the reference's logits.  [default: 8192]"),
    option("--scheduler", metavar="ADDRESS", help="Measure on the workers of this Dask scheduler."),
    option("--journal", type=click.Path(path_type=Path), help="Finished rows.  [default: in the cache folder]"),
    option(
        "--resume/--no-resume",
        default=True,
        help="Take finished rows from the journal, or measure everything again.  [default: resume]",
    ),
)
@option_group(
    "Results",
    json_option,
    option("--csv", "csv_file", type=click.Path(path_type=Path), help="Also write the rows to this file."),
    option("--speed", is_flag=True, help="Also time 256 and 64 tokens, 3 rounds; recommend one."),
    option("--experts", is_flag=True, help="Also count which experts run (JSON, report); see `moe2gguf experts`."),
    option("--report", type=click.Path(path_type=Path), help="Also write one HTML file with pictures."),
    option("--picture", type=click.Path(path_type=Path), help="Also draw quality against speed, as .svg or .png."),
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
    experts: bool,
    report: Path | None,
    picture: Path | None,
    **options: Any,
) -> None:
    """Measure what fewer experts or another type cost in quality.

    Every file at every K on every device runs in llama.cpp, in a process of its own, and is compared with the dense
    file token by token. The definitions are those of llama.cpp's perplexity tool. A sweep that was interrupted goes
    on where it stopped.

    --types quantizes every f32, f16 or bf16 file of FILES (as `moe2gguf quantize --allow-fallback`) into the cache
    folder, measures it like the others, and removes it when the sweep is done.

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
    from moe2gguf.measure.compare import settings_from
    from moe2gguf.measure.on_the_fly import compare_types
    from moe2gguf.measure.report.compare import make_page
    from moe2gguf.measure.report.page import require_plotly, write_page
    from moe2gguf.measure.report.picture import require_picture, write_picture

    if report:
        require_plotly(report)
    if picture:
        require_picture(picture)
    found = compare_types(
        files,
        reference,
        kinds=types,
        imatrix=imatrix,
        experts=experts,
        progress=display.progress,
        used=used,
        devices=devices_from(device, rpc),
        settings=settings_from(text, tokens or None, **options),
        timing=Timing(n_prompt=256, n_generate=64, repeat=3, threads=options["threads"]) if speed else None,
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
    emit(found.to_dict(), as_json, lambda: display_compare.comparison(found))
    if not found.ok:
        raise SystemExit(1)
