"""The command merge: fine-tunes of one model become the experts of one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import options as opt
from moe2gguf.cli import tables as display
from moe2gguf.cli.command import Command, NoEffect

if TYPE_CHECKING:
    from moe2gguf.recipes.merge_options import Merge


@cloup.command(
    cls=Command,
    no_effect=[
        NoEffect(("--seed",), beside=("--prompts",), without=("--router random",)),
        NoEffect(("--tokens",), beside=("--router random",), without=("--prompts",)),
    ],
    afterwards=["the table of its routers"],
)
@cloup.argument(
    "base",
    type=opt.MODEL,
    help="The dense model that attention, norms and embeddings are taken from; or a recipe (.yaml).",
)
@cloup.argument("donors", type=opt.MODEL, nargs=-1, metavar="[DONORS]", help="The dense models that become experts.")
@cloup.argument("out", type=opt.OUT, help="The GGUF file to write.")
@option_group(
    "Experts",
    option("--prompts", type=opt.FILE, multiple=True, help="What an expert is for: text or JSONL, one file per donor."),
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
    option("--used", type=opt.ONE, help="Experts used per token.  [default: 2]"),
    opt.number(
        "--tokens", "n_token", default=2048, type=opt.ONE, help="Tokens of each expert's prompts that are read."
    ),
    opt.seed_option,
)
@option_group(
    "Output",
    option(
        "--type", type=click.Choice(["f32", "f16", "bf16"]), help="Type of all matrices.  [default: as they are stored]"
    ),
    option("--name", help="The model's name in the metadata."),
    opt.force_option,
    opt.threads_option,
    opt.json_option,
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
    from moe2gguf.measure.token_ids import warn_of_token_ids
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
        recipe.base,
        recipe.donors,
        out,
        settings,
        force=force,
        threads=threads,
        progress=display.progress,
        on_plan=lambda plan: display.warnings(warn_of_token_ids(plan.source)),
    )
    display.warnings(done.notes)
    opt.emit(done.to_dict(), as_json, lambda: _print(done))
    display.next_steps(["moe2gguf", "compare", out, "--reference", recipe.base])


def _print(done: Merge) -> None:
    n, k = len(done.experts), done.options.used
    display.out().print(f"wrote {done.path}: {n} experts, {k} used per token", markup=False)
    if not done.layers:
        return
    table = display.make_table("layer", "accuracy", *(f"expert {e}" for e in range(n)), numbers=slice(None))
    for one in done.layers:
        shares = ["" if first is None else f"{first:.0%}" for first in one.first]
        if k < n:
            shares = [f"{share} ({runs:.0%})" if share else "" for share, runs in zip(shares, one.runs, strict=True)]
        table.add_row(str(one.layer), f"{one.accuracy:.1%}", *shares)
    display.print_table(table)
    console = display.out()
    for e, name in enumerate(done.experts):
        console.print(f"expert {e}: {name}", markup=False)
    more = " (in brackets: that run it at all)" if k < n else ""
    console.print(
        f"Of tokens that no router has seen {done.accuracy:.1%} choose the expert first whose prompt they are from, "
        f"over all layers; by guessing it were {1 / n:.1%}. By expert: its own tokens that choose it first{more}.",
        markup=False,
    )
