"""The command publish: a folder of measured files with a model card, and its way to the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import options as opt
from moe2gguf.cli import tables as display
from moe2gguf.cli.command import Command, ContinuedOutput, NoEffect
from moe2gguf.graphs import GRAPHS

if TYPE_CHECKING:
    from moe2gguf.measure.publish import Publication
    from moe2gguf.recipes.plan import Plan

SAME_TEXT = (
    "the experts are measured on the text that they are fitted to, which flatters them: give another with --text"
)


@cloup.command(cls=Command, no_effect=[NoEffect(("--private",), without=("--upload",))])
@cloup.argument("model", type=opt.ANY, help="A Hugging Face folder or id, or a dense GGUF file.")
@cloup.argument("folder", type=ContinuedOutput(path_type=Path), help="The folder to make.")
@option_group(
    "What to publish",
    option(
        "--types",
        callback=opt.words,
        default="q8_0,q4_k_m",
        show_default=True,
        metavar="T,T",
        help="Types of the files.",
    ),
    option(
        "-k",
        "--used",
        callback=opt.whole_numbers,
        metavar="K,K",
        help="Experts used per token.  [default: all]",
    ),
    option("-e", "--experts", type=int, help="Experts per layer.  [default: as convert]"),
    option("--target", type=click.Choice([*GRAPHS]), help="Graph of llama.cpp to write for.  [default: mixtral]"),
    option("--name", help="Name of the model in metadata and file names."),
    option(
        "--calibration", type=opt.FILE, help="Text to fit the experts to.  [default: a built-in mix of eight genres]"
    ),
    option("--calibration-tokens", type=opt.ONE, help="Tokens of this text.  [default: as convert]"),
    option("--imatrix", type=opt.FILE, help="Importance matrix of the dense model, for the types."),
)
@option_group(
    "How to measure",
    opt.text_option,
    opt.tokens_option,
    opt.context_option,
    option("--speed", is_flag=True, help="Also measure the speed."),
    opt.threads_option,
)
@option_group(
    "Where to",
    option("--upload", metavar="OWNER/NAME", help="Send the folder to this repository on the Hugging Face Hub."),
    option("--private", is_flag=True, help="Make a new repository private."),
    opt.resume_option,
    opt.json_option,
)
def publish(
    model: Path,
    folder: Path,
    types: list[str],
    used: list[int],
    experts: int | None,
    target: str | None,
    name: str | None,
    calibration: Path | None,
    calibration_tokens: int | None,
    imatrix: Path | None,
    text: Path | None,
    tokens: int,
    n_context: int,
    speed: bool,
    threads: int | None,
    upload: str | None,
    private: bool,
    resume: bool,
    as_json: bool,
) -> None:
    """Make a folder of measured files with a model card.

    FOLDER gets a GGUF file for every type and count (or one for all counts, with --target glm4moe), and a README.md
    with what each of them loses, how it was made and how to run it. The dense model in the same types is measured
    beside them. An interrupted run goes on where it was.

    \b
    Example:
      moe2gguf publish SmolLM2-135M-Instruct published --experts 16 --used 16,12 --types q8_0,q4_k_m
      moe2gguf publish HuggingFaceTB/SmolLM2-135M-Instruct published --experts 16 --used 12 --upload me/smollm2-moe
    """
    from moe2gguf.cli.tables_compare import row_done
    from moe2gguf.measure.bench import Timing
    from moe2gguf.measure.compare import make_settings
    from moe2gguf.measure.publish import PublishSettings
    from moe2gguf.measure.publish import publish as make
    from moe2gguf.quant.rules import TypeOptions
    from moe2gguf.recipes.options import CalibrationOptions, Options

    if upload and upload.count("/") != 1:
        raise click.UsageError(f"--upload {upload}: a repository is OWNER/NAME")
    options = Options(
        experts,
        name=name,
        target=target,
        types=TypeOptions(imatrix=imatrix),
        calibration=CalibrationOptions(text=calibration, n_token=calibration_tokens),
    )
    quality = make_settings(text, tokens or None, n_context=n_context, threads=threads, resume=resume)
    timing = Timing(n_prompt=256, n_generate=64, repeat=3, threads=threads) if speed else None
    done = make(
        model,
        folder,
        PublishSettings(tuple(types), tuple(used), options, quality, timing),
        upload=upload,
        private=private,
        resume=resume,
        progress=display.progress,
        on_plan=warn_once(SAME_TEXT if text == calibration else ""),
        on_row=row_done,
    )
    opt.emit(done.to_dict(), as_json, lambda: _print(done))
    if not upload:
        display.next_steps(["hf", "upload", "OWNER/NAME", done.folder])


def warn_once(of_text: str = "") -> Callable[[Plan], None]:
    """What shows the warnings of plans of one model, and other token ids than its own, each once; and `of_text` where a
    plan is fitted to a text.
    """
    from moe2gguf.measure.token_ids import warn_of_token_ids

    seen, compared = set[str](), set[Path]()

    def show(plan: Plan) -> None:
        found = [*plan.warnings, *([of_text] if of_text and plan.calibration else [])]
        lines = [line for line in found if line not in seen]
        if plan.source.path not in compared:
            compared.add(plan.source.path)
            lines += warn_of_token_ids(plan.source)
        display.warnings(lines)
        seen.update(lines)

    return show


def _print(done: Publication) -> None:
    from moe2gguf.cli.tables_compare import comparison

    display.warnings(done.found.notes)
    comparison(done.found)
    files = f"{len(done.files)} GGUF file{'s' if len(done.files) > 1 else ''}"
    display.out().print(f"made {done.folder}: {files} and README.md", markup=False)
    if done.url:
        display.out().print(f"sent to {done.url}", markup=False)
