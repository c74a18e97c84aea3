"""The command experts: show which experts a text uses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli.options import (
    FILE,
    emit,
    json_option,
    llama_threads_option,
)


@cloup.command()
@cloup.argument("file", type=FILE, help="A GGUF file with experts.")
@option("-k", "--used", type=int, help="Experts that run per token.  [default: what the file says]")
@option("--device", default="cpu", show_default=True, help="One of cpu, gpu and gpu:experts-on-cpu.")
@option_group(
    "Text",
    option("--text", type=FILE, help="A text file.  [default: a built-in text]"),
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
    from moe2gguf.cli import tables as display
    from moe2gguf.cli import tables_expert_usage as display_experts
    from moe2gguf.experts.text import bytes_to_read, read_text
    from moe2gguf.measure.expert_usage import measure_expert_usage
    from moe2gguf.measure.report.expert_usage import make_page
    from moe2gguf.measure.report.page import require_plotly, write_page

    if report:
        require_plotly(report)
    words = read_text(text, bytes_to_read(tokens + context if tokens else None))
    found = measure_expert_usage(file, text=words, n_token=tokens or None, n_context=context, **options)
    display.warnings(found.notes)
    if report:
        write_page(make_page(found, sys.argv), report)
    emit(found.to_dict(), as_json, lambda: display_experts.experts(found))
