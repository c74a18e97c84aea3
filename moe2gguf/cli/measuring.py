"""Commands that measure files: compare, bench, experts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import tables as display
from moe2gguf.cli.shared import (
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
    option("--text", type=FILE, help="A text file.  [default: Python's own documentation]"),
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
    option("--fresh", is_flag=True, help="Measure again what the journal has."),
)
@option_group(
    "Results",
    json_option,
    option("--csv", "csv_file", type=click.Path(path_type=Path), help="Also write the rows to this file."),
    option("--speed", is_flag=True, help="Also time 256 and 64 tokens, 3 rounds; name a choice."),
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
    from moe2gguf.measure.report.compare import write_report
    from moe2gguf.measure.report.page import require_plotly
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
    if csv_file:
        display_compare.write_csv(found, csv_file)
    if report:
        write_report(found, report, sys.argv)
    if picture:
        write_picture(found, picture)
    emit(found.to_dict(), as_json, lambda: display_compare.comparison(found))
    if not found.ok:
        raise SystemExit(1)


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


@cloup.command()
@cloup.argument("file", type=FILE, help="A GGUF file with experts.")
@option("-k", "--used", type=int, help="Experts that run per token.  [default: what the file says]")
@option("--device", default="cpu", show_default=True, help="One of cpu, gpu and gpu:experts-on-cpu.")
@option_group(
    "Text",
    option("--text", type=FILE, help="A text file.  [default: Python's own documentation]"),
    option("--tokens", default=4096, show_default=True, type=click.IntRange(0), help="Tokens to run; 0 is all."),
    option("--context", default=512, show_default=True, type=click.IntRange(8), help="Tokens of a window."),
)
@option_group(
    "Running",
    llama_threads_option,
    option("--timeout", default=3600.0, show_default=True, help="Seconds that the run may take."),
)
@option_group(
    "Results",
    json_option,
    option("--report", type=click.Path(path_type=Path), help="Also write one HTML file with heat maps."),
)
def experts(
    file: Path, text: Path | None, tokens: int, context: int, as_json: bool, report: Path | None, **options: Any
) -> None:
    """Show which experts run, layer by layer, and for which tokens.

    From llama.cpp's own routing tensors while it reads a text: how evenly the experts are used, which are always on,
    dead or overloaded, which run together, and how far that is from what calibration saw. JSON and report also have the
    tokens typical of each expert.

    \b
    Example:
      moe2gguf experts moe.gguf --text wiki.test.raw
      moe2gguf experts moe.gguf --used 4 --tokens 16384 --report experts.html
    """
    from moe2gguf.cli import tables_experts as display_experts
    from moe2gguf.measure.compare import read_text
    from moe2gguf.measure.observe import observe
    from moe2gguf.measure.report.experts import write_report
    from moe2gguf.measure.report.page import require_plotly

    if report:
        require_plotly(report)
    found = observe(file, text=read_text(text), n_token=tokens or None, n_context=context, **options)
    if report:
        write_report(found, report, sys.argv)
    emit(found.to_dict(), as_json, lambda: display_experts.experts(found))
