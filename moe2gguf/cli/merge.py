"""The command merge: fine-tunes of one model become the experts of one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import tables as display
from moe2gguf.cli.command import Command, NoEffect
from moe2gguf.cli.options import (
    FILE,
    MODEL,
    ONE,
    OUT,
    emit,
    force_option,
    json_option,
    number,
    seed_option,
    threads_option,
)


@cloup.command(
    cls=Command,
    no_effect=[
        NoEffect(("--seed",), beside=("--prompts",), without=("--router random",)),
        NoEffect(("--tokens",), beside=("--router random",), without=("--prompts",)),
    ],
)
@cloup.argument(
    "base", type=MODEL, help="The dense model that attention, norms and embeddings are taken from; or a recipe (.yaml)."
)
@cloup.argument("donors", type=MODEL, nargs=-1, metavar="[DONORS]", help="The dense models that become experts.")
@cloup.argument("out", type=OUT, help="The GGUF file to write.")
@option_group(
    "Experts",
    option("--prompts", type=FILE, multiple=True, help="What an expert is for: text or JSONL, one file per donor."),
    option(
        "--router",
        type=click.Choice(["regression", "hidden", "random"]),
        help="Learn whose prompt a token is from, compare with the mean of the prompts, or draw lots.  "
        "[default: regression]",
    ),
    option(
        "--attention",
        type=click.Choice(["base", "average"]),
        help="Whose attention and norms: the base's, or the mean of the donors'.  [default: base]",
    ),
    option("--used", type=ONE, help="Experts used per token.  [default: 2]"),
    number("--tokens", "n_token", default=2048, type=ONE, help="Tokens of each expert's prompts that are read."),
    seed_option,
)
@option_group(
    "Output",
    option(
        "--type", type=click.Choice(["f32", "f16", "bf16"]), help="Type of all matrices.  [default: as they are stored]"
    ),
    option("--name", help="The model's name in the metadata."),
    force_option,
    threads_option,
    json_option,
)
def merge(
    base: Path,
    donors: tuple[Path, ...],
    out: Path,
    prompts: tuple[Path, ...],
    as_json: bool,
    force: bool,
    threads: int | None,
    **options: Any,
) -> None:
    """Merge dense models of one shape into one file, an expert each.

    The MLPs of fine-tunes of one model are stacked as they are stored; attention, norms and embeddings are those of
    BASE, whose own MLPs are in the file only if it is named as a donor too. Routers learn from prompts which expert
    should run, and the table says how often they are right on prompts that they have not seen. In place of models and
    prompts there may be one recipe of mergekit-moe's form.

    \b
    Example:
      moe2gguf merge base.gguf code.gguf wiki.gguf both.gguf --prompts code.txt --prompts wiki.txt
      moe2gguf merge base.gguf base.gguf code.gguf both.gguf --router random --used 1
      moe2gguf merge recipe.yaml both.gguf
    """
    from moe2gguf.cli.tables_merge import print_merge
    from moe2gguf.recipes.merge import merge as write_merged
    from moe2gguf.recipes.merge_inputs import Recipe, read_donors, read_recipe
    from moe2gguf.recipes.merge_options import MergeOptions

    given = {name: value for name, value in options.items() if value is not None}
    if not donors and base.suffix in (".yaml", ".yml"):
        if prompts:
            raise click.UsageError("--prompts: the recipe has prompts; leave it out.")
        recipe = read_recipe(base)
    else:
        recipe = Recipe(str(base), read_donors(donors, prompts, given["n_token"]), {})
    settings = MergeOptions(**{**recipe.options, **given})
    done = write_merged(
        recipe.base, recipe.donors, out, settings, force=force, threads=threads, progress=display.progress
    )
    display.warnings(done.notes)
    emit(done.to_dict(), as_json, lambda: print_merge(done))
    display.next_steps(["moe2gguf", "compare", out, "--reference", recipe.base])
