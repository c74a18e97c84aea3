"""The command heal: train a sliced model to need fewer experts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import tables as display
from moe2gguf.cli import tables_heal
from moe2gguf.cli.options import FILE, emit, json_option, whole_numbers
from moe2gguf.experts import methods

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


class CountRange(click.ParamType):  # type: ignore[type-arg]
    """`4..16`, or one number."""

    name = "range"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """(least, most)."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(value))
        if not match:
            self.fail(f"{value!r} is not a range of counts such as 4..16", param, ctx)
        return int(match[1]), int(match[2] or match[1])


@cloup.command()
@cloup.argument("student", type=FOLDER, help="The sliced model: a folder made by convert --format hf.")
@option_group(
    "What",
    option("--teacher", required=True, type=FOLDER, metavar="DENSE", help="Folder of the dense model it was cut from."),
    option("--text", "texts", required=True, multiple=True, type=FILE, help="Text to train on; may be given again."),
    option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write."),
    option("--held-out", type=FILE, help="Text to evaluate on.  [default: the last tenth of --text]"),
)
@option_group(
    "Training",
    option("--train", multiple=True, type=click.Choice([*methods.TRAINED]), help="Parts.  [default: router, experts]"),
    option("--used-range", type=CountRange(), required=True, metavar="A..B", help="Experts per token, drawn per step."),
    option(
        "--layerwise", default=1, show_default=True, type=click.IntRange(0), help="Layer-wise passes over the text."
    ),
    option(
        "--steps", default=200, show_default=True, type=click.IntRange(0), help="Steps of the whole model after it."
    ),
    option("--tokens", "n_token", default=65536, show_default=True, type=click.IntRange(1024), help="Of the text."),
    option(
        "--context", "n_context", default=512, show_default=True, type=click.IntRange(8), help="Tokens of a window."
    ),
    option("--batch", default=4, show_default=True, type=click.IntRange(1), help="Windows per step."),
    option("--accumulate", default=1, show_default=True, type=click.IntRange(1), help="Parts a step is computed in."),
    option(
        "--layer-lr", default=1e-3, show_default=True, type=click.FloatRange(0), help="Rate of the layer-wise stage."
    ),
    option("--lr", default=2e-4, show_default=True, type=click.FloatRange(0), help="Rate of the steps."),
    option("--router-lr", default=5e-5, show_default=True, type=click.FloatRange(0), help="That of the routers."),
    option("--weight-decay", default=0.0, show_default=True, type=click.FloatRange(0), help="Of AdamW."),
    option("--warmup", default=0.05, show_default=True, type=click.FloatRange(0, 1), help="Share of the steps."),
    option("--clip", default=1.0, show_default=True, type=click.FloatRange(0), help="Largest norm of the gradient."),
    option("--lora-rank", default=16, show_default=True, type=click.IntRange(1), help="Of --train lora."),
    option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1), help="Of order and counts."),
)
@option_group(
    "Losses of the whole-model steps, as weights (the KL divergence has 1)",
    option(
        "--top", default=0, show_default=True, type=click.IntRange(0), help="Compare the N likeliest tokens; 0: all."
    ),
    option(
        "--next-token",
        default=0.0,
        show_default=True,
        type=click.FloatRange(0),
        help="The text itself: fits its domain.",
    ),
)
@option_group(
    "Running",
    option("--evaluate-at", callback=whole_numbers, metavar="K,K", help="Counts.  [default: both ends of the range]"),
    option("--evaluate-every", default=50, show_default=True, type=click.IntRange(1), help="Steps."),
    option("--save-every", default=50, show_default=True, type=click.IntRange(1), help="Steps between checkpoints."),
    option(
        "--held-out-tokens", "n_held_out", default=4096, show_default=True, type=click.IntRange(1), help="Evaluated."
    ),
    option("--checkpointing", is_flag=True, help="Recompute activations: less memory, more time."),
    option("--precision", default="no", show_default=True, type=click.Choice(["no", "bf16", "fp16"]), help="Mixed."),
    option("--device", help="torch device of the layer-wise stage; cpu keeps all of it there."),
)
@option_group(
    "Output",
    option("-f", "--force", is_flag=True, help="Replace OUT if moe2gguf wrote it."),
    json_option,
)
def heal(
    student: Path,
    teacher: Path,
    texts: tuple[Path, ...],
    out: Path,
    held_out: Path | None,
    n_token: int,
    n_held_out: int,
    n_context: int,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a sliced model to need fewer experts.

    The dense model teaches: first layer by layer, one in memory, then the whole model by the divergence of its
    predictions. What does not train stays bit for bit. A run that was stopped goes on where it stood.

    \b
    Example:
      moe2gguf heal half --teacher SmolLM2-135M-Instruct --text wiki.txt -o healed --used-range 4..16
      moe2gguf heal half --teacher dense --text a.txt -o healed --used-range 8 --layerwise 0 --train router --steps 100
      accelerate launch "$(which moe2gguf)" heal half --teacher dense --text a.txt -o out --used-range 8 --layerwise 0
    """
    from moe2gguf.experts.heal.plan import HealSettings
    from moe2gguf.recipes.heal import heal as heal_folder
    from moe2gguf.recipes.heal import is_main

    options["train"] = options["train"] or HealSettings.train
    options["evaluate_at"] = tuple(options["evaluate_at"] or sorted(set(options["used_range"])))
    done = heal_folder(
        student,
        teacher,
        texts,
        out,
        HealSettings(**options),
        held_out=held_out,
        n_token=n_token,
        n_held_out=n_held_out,
        n_context=n_context,
        force=force,
        progress=display.progress,
        on_line=tables_heal.heal_line,
    )
    if is_main():
        emit(done.to_dict(), as_json, lambda: tables_heal.healing(done))
