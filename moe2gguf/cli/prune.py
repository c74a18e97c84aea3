"""The command prune: a file with fewer experts."""

from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import options as opt
from moe2gguf.cli import tables as display
from moe2gguf.cli.command import Command, NoEffect

NO_EFFECT = (
    NoEffect(("--seed",), without=("--score random",)),
    NoEffect(("--text", "--tokens", "--context", "--device"), beside=("--score random",)),
)


@cloup.command(cls=Command, no_effect=NO_EFFECT)
@cloup.argument("model", type=opt.FILE, help="A GGUF file with experts.")
@cloup.argument("out", type=opt.OUT, help="The GGUF file to write.")
@option_group(
    "Experts",
    option("--keep", type=opt.ONE, required=True, help="Experts that stay in each layer."),
    option("-k", "--used", type=opt.ONE, help="Experts used per token.  [default: as before, as far as they stay]"),
    option(
        "--score",
        type=click.Choice(["reap", "total", "frequency", "random"]),
        default="reap",
        show_default=True,
        help="What tells which experts stay.",
    ),
    opt.seed_option,
)
@option_group(
    "Text",
    opt.text_option,
    opt.number("--tokens", default=8192, type=opt.NONE, help="Tokens to read; 0 means all."),
    opt.context_option,
)
@option_group("Running", opt.device_option, opt.threads_option)
@option_group("Output", opt.shard_size_option, opt.force_option, opt.json_option)
def prune(model: Path, out: Path, text: Path | None, tokens: int, as_json: bool, **options: Any) -> None:
    """Leave out the experts that a text needs least.

    The model reads the text in llama.cpp. The score reap is the mean length of what an expert adds to a token that
    chose it, total is the sum of these lengths and best for a sliced file, frequency is how many tokens chose it, and
    random is there to compare with. What stays is copied as it is stored: no weight is decoded or changed. Measure
    with compare, on more than one kind of text, what was lost.

    \b
    Example:
      moe2gguf prune Qwen3-30B-A3B-Q4_K_M.gguf smaller.gguf --keep 96 --text code.txt
      moe2gguf compare smaller.gguf --reference Qwen3-30B-A3B-Q4_K_M.gguf --text other.txt
    """
    from moe2gguf.experts.text import bytes_to_read, read_text
    from moe2gguf.measure.grid import note_long_windows
    from moe2gguf.recipes.prune import PruneOptions
    from moe2gguf.recipes.prune import prune as write_pruned

    options["n_token"] = tokens or None
    settings = opt.take(PruneOptions, options)
    words = read_text(text, bytes_to_read(tokens + settings.n_context if tokens else None))
    done = write_pruned(model, out, settings, words, progress=display.progress, **options)
    windows = [] if settings.score == "random" else note_long_windows([model], settings.n_context)
    display.warnings([*done.notes, *windows])
    opt.emit(done.to_dict(), as_json, lambda: display.out().print(done.describe(), markup=False))
    display.next_steps(["moe2gguf", "compare", out, "--reference", model])
