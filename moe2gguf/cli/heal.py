"""The command heal: train a sliced model to need fewer experts."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup
from cloup import option, option_group
from rich.markup import escape

from moe2gguf.cli import options as opt
from moe2gguf.cli import tables as display
from moe2gguf.cli.command import Command, NoEffect
from moe2gguf.experts import methods
from moe2gguf.experts.heal.log import LayerLine, LogLine, ScoreLine

if TYPE_CHECKING:
    from moe2gguf.recipes.heal import Healing

RATE = opt.Number(0)


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


OF_STEPS = ("--lr", "--accumulate", "--top", "--next-token", "--precision", "--checkpointing", "--evaluate-every")
NO_EFFECT = (
    NoEffect(("--lora-rank",), without=("--train lora",)),
    NoEffect(("--router-lr",), beside=("--train",), without=("--train router",)),
    NoEffect(("--layer-lr",), beside=("--layerwise 0",)),
    NoEffect(OF_STEPS, beside=("--steps 0",)),
)


@cloup.command(cls=Command, no_effect=NO_EFFECT)
@cloup.argument("student", type=opt.FOLDER, help="The sliced model: a folder made by convert --format hf.")
@cloup.argument("out", type=opt.OUT, help="The folder to write.")
@option_group(
    "What to train on",
    option(
        "--teacher", required=True, type=opt.FOLDER, metavar="DENSE", help="Folder of the dense model it was cut from."
    ),
    option("--text", "files", required=True, multiple=True, type=opt.FILE, help="Training text; may be repeated."),
    option("--held-out", type=opt.FILE, help="Text to evaluate on.  [default: the last tenth of --text]"),
    option("--tokens", "n_token", default=65536, show_default=True, type=opt.Whole(1024), help="Tokens of the text."),
    opt.context_option,
)
@option_group(
    "Training",
    option("--used-range", type=CountRange(), required=True, metavar="A..B", help="Experts used; each step draws one."),
    option(
        "--train",
        "parts",
        multiple=True,
        type=click.Choice([*methods.TRAINED]),
        help="What to train; may be repeated.  [default: router, experts]",
    ),
    opt.number("--layerwise", default=1, type=opt.NONE, help="Passes that train layer by layer."),
    opt.number("--steps", default=200, type=opt.NONE, help="Steps that train the whole model."),
    opt.number("--batch", default=4, type=opt.ONE, help="Windows per step."),
    opt.number("--layer-lr", default=1e-3, type=RATE, help="Learning rate of the layer-wise passes."),
    opt.number("--lr", default=2e-4, type=RATE, help="Learning rate of the steps."),
    opt.number("--router-lr", default=5e-5, type=RATE, help="Learning rate of the routers."),
    opt.seed_option,
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
@option_group("Output", opt.force_option, opt.resume_option, opt.json_option)
@option_group(
    "More",
    opt.number("--top", default=0, type=opt.NONE, help="Compare the N likeliest tokens; 0: all."),
    opt.number("--next-token", default=0.0, type=RATE, help="Weight of the loss on the text itself."),
    opt.number("--accumulate", default=1, type=opt.ONE, help="Parts that a step is computed in."),
    opt.number("--weight-decay", default=0.0, type=RATE, help="Weight decay of AdamW."),
    option("--warmup", default=0.05, show_default=True, type=opt.Number(0, 1), help="Share of steps that warm up."),
    opt.number("--clip", default=1.0, type=RATE, help="Largest norm of the gradient."),
    opt.number("--lora-rank", default=16, type=opt.ONE, help="Rank with --train lora."),
    option(
        "--evaluate-at",
        callback=opt.whole_numbers,
        metavar="K,K",
        help="Counts to score.  [default: both ends of the range]",
    ),
    opt.number("--evaluate-every", default=50, type=opt.ONE, help="Steps between scores and checkpoints."),
    opt.number("--held-out-tokens", "n_held_out", default=4096, type=opt.ONE, help="Tokens to score."),
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

    used = tuple(options.pop("evaluate_at") or sorted(set(options["used_range"])))
    options["parts"] = options["parts"] or settings.Training.parts
    data = opt.take(HealText, options)
    choices = settings.HealSettings(
        opt.take(settings.Training, options),
        opt.take(settings.Loss, options),
        opt.take(settings.Optimizer, options),
        settings.Evaluation(used, options["evaluate_every"]),
        opt.take(settings.Compute, options),
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
        on_line=_print_line,
    )
    if is_main():
        opt.emit(done.to_dict(), as_json, lambda: _print(done))
        display.next_steps(["moe2gguf", "convert", out, f"{out}.gguf"])


def _print_line(line: LogLine) -> None:
    """One line of a healing run on stderr: every layer, every evaluation, every tenth step."""
    if isinstance(line, LayerLine):
        text = f"layer {line.layer}: held-out error {line.error_before:.4f} -> {line.error_after:.4f}"
    elif isinstance(line, ScoreLine):
        scores = ", ".join(f"k = {k}: {kl:.4f}" for k, kl in line.kl.items())
        text = f"step {line.step}: held-out KL {scores}{' (best)' if line.best else ''}"
    elif line.step % 10 == 0:
        text = f"step {line.step}: loss {line.loss:.4f} with {line.used} experts"
        text += f", {line.tokens_per_second:.0f} tokens/s"
    else:
        return
    display.err().print(text, markup=False)


def _print(done: Healing) -> None:
    """The first and the best scores on held-out text, for each number of experts."""
    console = display.out()
    if scores := done.scores:
        best = min(scores, key=lambda line: line.kl_mean)
        columns = ("experts used", "KL before", "KL after", "perplexity after", "of the dense model")
        table = display.make_table(*columns, numbers=slice(None))
        for k in best.kl:
            values = (scores[0].kl[k], best.kl[k], math.exp(best.nll[k]), math.exp(best.nll_dense))
            table.add_row(k, *(f"{value:.4g}" for value in values))
        console.print(table)
    console.print(f"wrote {escape(str(done.path))}")
