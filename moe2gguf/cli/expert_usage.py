"""The command expert-usage: show which experts a text uses."""

import sys
from pathlib import Path
from typing import Any

import cloup
from cloup import option, option_group

from moe2gguf.cli import options as opt
from moe2gguf.cli.command import Command, NoEffect


@cloup.command(
    "expert-usage",
    cls=Command,
    no_effect=[
        NoEffect(("--used", "--report"), beside=("--needed",)),
        NoEffect(("--divergence",), without=("--needed",)),
        NoEffect(("--force",), without=("--report",)),
    ],
)
@cloup.argument("file", type=opt.FILE, help="A GGUF file with experts.")
@option_group(
    "Running",
    opt.used_option,
    opt.device_option,
    opt.threads_option,
    opt.number(
        "--timeout", default=3600.0, type=opt.SECONDS, help="Seconds for the whole run; with --needed for a window."
    ),
)
@option_group(
    "Need",
    option("--needed", is_flag=True, help="Instead, show how many experts each token's prediction needs."),
    opt.number("--divergence", "limit", default=0.1, type=opt.Number(1e-6), help="How near it must be, in nats."),
)
@option_group(
    "Text",
    opt.text_option,
    opt.number("--tokens", default=4096, type=opt.NONE, help="Tokens to read, with --needed to score; 0 means all."),
    opt.context_option,
)
@option_group("Results", opt.json_option, opt.report_option, opt.pages_force_option)
def expert_usage(
    file: Path,
    text: Path | None,
    tokens: int,
    n_context: int,
    as_json: bool,
    report: Path | None,
    needed: bool,
    limit: float,
    **options: Any,
) -> None:
    """Show which experts a text uses, layer by layer.

    Counts the choices of the routers while llama.cpp reads a text: how evenly the experts are used, which are always
    used, never used or overloaded, which are used together, and how far that is from the calibration. JSON and report
    also have the tokens that are typical of each expert.

    With --needed the text is scored at every count of experts instead. The file must be sliced for a target whose
    weights do not depend on the count, such as glm4moe. The result says how many experts the tokens need, and what an
    engine that knew it could gain at best.

    \b
    Example:
      moe2gguf expert-usage moe.gguf --text wiki.test.raw
      moe2gguf expert-usage moe.gguf --used 4 --tokens 16384 --report experts.html
      moe2gguf expert-usage moe.gguf --needed --divergence 0.3
    """
    from moe2gguf.cli import tables as display
    from moe2gguf.cli import tables_expert_usage as display_experts
    from moe2gguf.experts.text import bytes_to_read, read_text
    from moe2gguf.measure.expert_usage import measure_expert_usage
    from moe2gguf.measure.needed_experts import measure_needed_experts
    from moe2gguf.measure.report.expert_usage import make_page
    from moe2gguf.measure.report.page import plotly_script, write_page

    if needed:
        options.pop("used")
        words = read_text(text, bytes_to_read(3 * tokens + n_context if tokens else None))  # half of a window is scored
        settings = {"text": words, "n_token": tokens or None, "n_context": n_context, **options}
        need = measure_needed_experts(file, limit=limit, progress=display.progress, **settings)
        display.warnings(need.notes)
        opt.emit(need.to_dict(), as_json, lambda: display_experts.print_needed(need))
        return
    if report:
        plotly_script()
    words = read_text(text, bytes_to_read(tokens + n_context if tokens else None))
    found = measure_expert_usage(file, text=words, n_token=tokens or None, n_context=n_context, **options)
    display.warnings(found.notes)
    if report:
        write_page(make_page(found, sys.argv), report)
    opt.emit(found.to_dict(), as_json, lambda: display_experts.print_experts(found))
