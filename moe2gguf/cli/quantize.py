"""The command quantize: a GGUF file is written again with smaller types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import tables as display
from moe2gguf.cli import tables_convert
from moe2gguf.cli.options import (
    FILE,
    emit,
    json_option,
    resume_option,
    shard_size_option,
    type_options,
)
from moe2gguf.errors import PlanError


@cloup.command()
@cloup.argument("source", type=FILE, help="The GGUF file to quantize (f32, f16 or bf16).")
@cloup.argument("out", type=click.Path(path_type=Path), help="The GGUF file to write.")
@cloup.argument(
    "type", required=False, help="A type of llama.cpp, such as q4_k_m, iq4_xs or q8_0; auto keeps what no rule names."
)
@type_options
@option_group(
    "Output",
    option("--allow-requantize", is_flag=True, help="Also change tensors that are quantized already."),
    shard_size_option,
    option("-f", "--force", is_flag=True, help="Replace OUT if it exists."),
    resume_option,
    option("--threads", type=click.IntRange(1), help="Threads that quantize.  [default: one per core]"),
)
@option_group(
    "Looking first",
    option("--plan", "plan_only", is_flag=True, help="Print what would be written and stop."),
    json_option,
)
def quantize(
    source: Path,
    out: Path,
    plan_only: bool,
    as_json: bool,
    allow_requantize: bool,
    shard_size: int | None,
    force: bool,
    resume: bool,
    threads: int | None,
    **options: Any,
) -> None:
    """Write a GGUF file again with smaller types.

    With llama.cpp's own kernels, and the choice of types of its quantizer for the dense model. A type that does not
    fit a tensor is an error that lists the ways out, never a silent substitute.

    \b
    Example:
      moe2gguf quantize moe.gguf moe-q4.gguf q4_k_m --allow-fallback
      moe2gguf quantize moe.gguf moe-q8.gguf q8_0 --shard-size 2GB
      moe2gguf quantize moe.gguf moe-q5.gguf q5_k --tensor-type 'blk\\..*\\.ffn_down_exps\\.weight=q6_k' --plan
    """
    from moe2gguf.quant.rules import TypeOptions
    from moe2gguf.recipes.quantize import plan_quantization, write_quantization

    if options["type"] is None:
        if options["target_size"] is None and options["target_bpw"] is None:
            raise click.UsageError("Missing argument 'TYPE' (only --target-size and --target-bpw work without).")
        options["type"] = "auto"
    try:
        plan = plan_quantization(
            source, TypeOptions(**options), allow_requantize=allow_requantize, shard_size=shard_size
        )
    except PlanError as error:
        if as_json and plan_only:
            emit({"refusals": error.refusals}, as_json, lambda: None)
        raise
    display.warnings(plan.warnings)
    if plan_only:
        emit(plan.to_dict(), as_json, lambda: tables_convert.quantization_plan(plan))
        return
    done = write_quantization(plan, out, force=force, resume=resume, threads=threads, progress=display.progress)
    emit(done.to_dict(), as_json, lambda: tables_convert.quantization(done))
