"""The command quantize: a GGUF file is written again with smaller types."""

from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option, option_group

from moe2gguf.cli import options as opt
from moe2gguf.cli import tables as display
from moe2gguf.cli import tables_convert
from moe2gguf.cli.command import Command, NoEffect

NO_EFFECT = (
    NoEffect(("--imatrix-repair",), without=("--imatrix",)),
    NoEffect(("--llama-cpp-mix",), beside=("--pure",)),
)


@cloup.command(cls=Command, no_effect=NO_EFFECT)
@cloup.argument("source", type=opt.FILE, help="The GGUF file to quantize, in f32, f16 or bf16.")
@cloup.argument("out", type=opt.OUT, help="The GGUF file to write.")
@cloup.argument("type", required=False, help="q4_k_m, iq4_xs, q8_0 or another of llama.cpp; auto keeps them as stored.")
@option_group(
    "Types",
    *opt.type_rules,
    option("--allow-requantize", is_flag=True, help="Also convert tensors that are quantized already."),
)
@option_group("Output", opt.shard_size_option, opt.force_option, opt.resume_option, opt.threads_option, opt.json_option)
@option_group("Before", option("--plan", "plan_only", is_flag=True, help="Print what would be written and stop."))
@option_group("More: types", *opt.expert_type_rules, hidden=True)
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
    """Quantize a GGUF file to smaller types.

    The kernels are llama.cpp's, and each tensor gets the type that llama-quantize chooses for the dense model. A type
    that does not fit a tensor is an error that lists the alternatives; nothing is substituted silently.

    \b
    Example:
      moe2gguf quantize moe.gguf moe-q4.gguf q4_k_m --allow-fallback
      moe2gguf quantize moe.gguf moe-q8.gguf q8_0 --shard-size 2GB
      moe2gguf quantize moe.gguf moe-q5.gguf q5_k --tensor-type 'blk\\..*\\.ffn_down_exps\\.weight=q6_k' --plan
    """
    from moe2gguf.quant.rules import TypeOptions
    from moe2gguf.recipes.quantize import plan_quantization
    from moe2gguf.recipes.quantize import quantize as write

    if options["type"] is None:
        if options["target_size"] is None and options["target_bpw"] is None:
            raise click.UsageError("Missing argument 'TYPE' (only --target-size and --target-bpw work without).")
        options["type"] = "auto"
    types = TypeOptions(**options)
    arguments: dict[str, Any] = {"allow_requantize": allow_requantize, "shard_size": shard_size}
    if plan_only:
        with opt.refusals_as_json(as_json):
            plan = plan_quantization(source, types, **arguments, progress=display.progress)
        display.warnings(plan.warnings)
        opt.emit(plan.to_dict(), as_json, lambda: tables_convert.print_quantization_plan(plan))
        return
    done = write(
        source,
        out,
        types,
        **arguments,
        force=force,
        resume=resume,
        threads=threads,
        progress=display.progress,
        on_plan=lambda plan: display.warnings(plan.warnings),
    )
    opt.emit(done.to_dict(), as_json, lambda: tables_convert.print_quantization(done))
    run = display.suggest_running(done.path, done.plan.metadata)
    display.next_steps(run, ["moe2gguf", "compare", done.path, "--reference", source])
