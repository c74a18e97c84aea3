"""The command expert-usage: show which experts a text uses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cloup
from cloup import option, option_group

from moe2gguf.cli.command import Command
from moe2gguf.cli.options import (
    FILE,
    NONE,
    context_option,
    device_option,
    emit,
    json_option,
    number,
    pages_force_option,
    report_option,
    text_option,
    threads_option,
    used_option,
)


@cloup.command("expert-usage", cls=Command)
@cloup.argument("file", type=FILE, help="A GGUF file with experts.")
@option_group(
    "Running",
    used_option,
    device_option,
    threads_option,
    option("--timeout", default=3600.0, show_default=True, help="Seconds allowed for the whole run."),
)
@option_group(
    "Text",
    text_option,
    number("--tokens", default=4096, type=NONE, help="Tokens to read; 0 means all."),
    context_option,
)
@option_group("Results", json_option, report_option, pages_force_option)
def expert_usage(
    file: Path,
    text: Path | None,
    tokens: int,
    n_context: int,
    as_json: bool,
    report: Path | None,
    **options: Any,
) -> None:
    """Show which experts a text uses, layer by layer.

    Counts the choices of the routers while llama.cpp reads a text: how evenly the experts are used, which are always
    used, never used or overloaded, which are used together, and how far that is from the calibration. JSON and report
    also have the tokens that are typical of each expert.

    \b
    Example:
      moe2gguf expert-usage moe.gguf --text wiki.test.raw
      moe2gguf expert-usage moe.gguf --used 4 --tokens 16384 --report experts.html
    """
    from moe2gguf.cli import tables as display
    from moe2gguf.cli import tables_expert_usage as display_experts
    from moe2gguf.experts.text import bytes_to_read, read_text
    from moe2gguf.measure.expert_usage import measure_expert_usage
    from moe2gguf.measure.report.expert_usage import make_page
    from moe2gguf.measure.report.page import require_plotly, write_page

    if report:
        require_plotly(report)
    words = read_text(text, bytes_to_read(tokens + n_context if tokens else None))
    found = measure_expert_usage(file, text=words, n_token=tokens or None, n_context=n_context, **options)
    display.warnings(found.notes)
    if report:
        write_page(make_page(found, sys.argv), report)
    emit(found.to_dict(), as_json, lambda: display_experts.print_experts(found))
