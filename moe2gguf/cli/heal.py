"""The command heal: train a sliced model to need fewer experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import tables as display
from moe2gguf.cli import tables_heal
from moe2gguf.cli.command import Command, NoEffect
from moe2gguf.cli.options import (
    FILE,
    FOLDER,
    NONE,
    ONE,
    OUT,
    Number,
    context_option,
    emit,
    force_option,
    json_option,
    number,
    resume_option,
    seed_option,
    whole_numbers,
)
from moe2gguf.experts import methods

RATE = Number(0)


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
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            self.fail(f"{value!r} has its larger count first; turn it around", param, ctx)
        return low, high


def fill(record: type[Any], options: Mapping[str, Any], **others: Any) -> Any:
    """The record with the options that are named as its fields, and `others`."""
    return record(**{field.name: options[field.name] for field in fields(record) if field.name in options} | others)


OF_STEPS = ("--lr", "--accumulate", "--top", "--next-token", "--precision", "--checkpointing", "--evaluate-every")
NO_EFFECT = (
    NoEffect(("--lora-rank",), without=("--train lora",)),
    NoEffect(("--router-lr",), beside=("--train",), without=("--train router",)),
    NoEffect(("--layer-lr",), beside=("--layerwise 0",)),
    NoEffect(OF_STEPS, beside=("--steps 0",)),
)


@cloup.command(cls=Command, no_effect=NO_EFFECT)
@cloup.argument("student", type=FOLDER, help="The sliced model: a folder made by convert --format hf.")
@cloup.argument("out", type=OUT, help="The folder to write.")
@option_group(
    "What to train on",
    option("--teacher", required=True, type=FOLDER, metavar="DENSE", help="Folder of the dense model it was cut from."),
    option("--text", "texts", required=True, multiple=True, type=FILE, help="Training text; may be repeated."),
    option("--held-out", type=FILE, help="Text to evaluate on.  [default: the last tenth of --text]"),
    option(
        "--tokens", "n_token", default=65536, show_default=True, type=click.IntRange(1024), help="Tokens of the text."
    ),
    context_option,
)
@option_group(
    "Training",
    option("--used-range", type=CountRange(), required=True, metavar="A..B", help="Experts used; each step draws one."),
    option(
        "--train",
        multiple=True,
        type=click.Choice([*methods.TRAINED]),
        help="What to train; may be repeated.  [default: router, experts]",
    ),
    number("--layerwise", default=1, type=NONE, help="Passes that train layer by layer."),
    number("--steps", default=200, type=NONE, help="Steps that train the whole model."),
    number("--batch", default=4, type=ONE, help="Windows per step."),
    number("--layer-lr", default=1e-3, type=RATE, help="Learning rate of the layer-wise passes."),
    number("--lr", default=2e-4, type=RATE, help="Learning rate of the steps."),
    number("--router-lr", default=5e-5, type=RATE, help="Learning rate of the routers."),
    seed_option,
)
@option_group(
    "Running",
    option("--torch-device", "device", help="Device of the layer-wise passes in torch; cpu keeps everything there."),
    option(
        "--precision",
        default="no",
        show_default=True,
        type=click.Choice(["no", "bf16", "fp16"]),
        help="Mixed precision.",
    ),
    option("--checkpointing", is_flag=True, help="Recompute activations, which saves memory and costs time."),
)
@option_group("Output", force_option, resume_option, json_option)
@option_group(
    "Expert options",
    number("--top", default=0, type=NONE, help="Compare the N likeliest tokens; 0: all."),
    number("--next-token", default=0.0, type=RATE, help="Weight of the loss on the text itself."),
    number("--accumulate", default=1, type=ONE, help="Parts that a step is computed in."),
    number("--weight-decay", default=0.0, type=RATE, help="Weight decay of AdamW."),
    option("--warmup", default=0.05, show_default=True, type=Number(0, 1), help="Share of steps that warm up."),
    number("--clip", default=1.0, type=RATE, help="Largest norm of the gradient."),
    number("--lora-rank", default=16, type=ONE, help="Rank with --train lora."),
    option(
        "--evaluate-at",
        callback=whole_numbers,
        metavar="K,K",
        help="Counts to score.  [default: both ends of the range]",
    ),
    number("--evaluate-every", default=50, type=ONE, help="Steps between scores and checkpoints."),
    number("--held-out-tokens", "n_held_out", default=4096, type=ONE, help="Tokens to score."),
    hidden=True,
)
def heal(
    student: Path,
    teacher: Path,
    out: Path,
    force: bool,
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a sliced model so that it needs fewer experts.

    The dense model is the teacher: first layer by layer, with one layer in memory, then for the whole model, by the KL
    divergence of the predictions. Weights that are not trained stay unchanged. An interrupted run continues where it
    stopped.

    \b
    Example:
      moe2gguf heal half healed --teacher SmolLM2-135M-Instruct --text wiki.txt --used-range 4..16
      moe2gguf heal half healed --teacher dense --text a.txt --used-range 8 --layerwise 0 --train router --steps 100
      accelerate launch "$(which moe2gguf)" heal half healed --teacher dense --text a.txt --used-range 8 --layerwise 0
    """
    from moe2gguf.experts.heal import settings
    from moe2gguf.recipes.heal import HealText, is_main
    from moe2gguf.recipes.heal import heal as heal_folder

    used = tuple(options["evaluate_at"] or sorted(set(options["used_range"])))
    data = fill(HealText, options, files=options["texts"])
    parts = options["train"] or settings.Training.parts
    choices = settings.HealSettings(
        fill(settings.Training, options, parts=parts),
        fill(settings.Loss, options),
        fill(settings.Optimizer, options),
        settings.Evaluation(used, options["evaluate_every"]),
        fill(settings.Compute, options),
    )
    done = heal_folder(
        student,
        teacher,
        data,
        out,
        choices,
        force=force,
        resume=resume,
        progress=display.progress,
        on_line=tables_heal.print_heal_line,
    )
    if is_main():
        emit(done.to_dict(), as_json, lambda: tables_heal.print_healing(done))
        display.next_steps(["moe2gguf", "convert", out, f"{out}.gguf"])
