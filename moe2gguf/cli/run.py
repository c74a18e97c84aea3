"""The command run: generate text."""

import sys
from contextlib import closing
from pathlib import Path

import click
import cloup
from cloup import option

from moe2gguf.cli import options as opt
from moe2gguf.cli import tables as display
from moe2gguf.cli.command import Command


@cloup.command(cls=Command, no_effect=opt.SEED_NEEDS_TEMPERATURE)
@cloup.argument("file", type=opt.FILE, help="The GGUF file to run.")
@cloup.argument("prompt", required=False, default=None, help="What to say to it.  [default: standard input]")
@option("-p", "--prompt", "prompt_option", metavar="PROMPT", help="The same as an option.")
@option("--raw", is_flag=True, help="Use no chat template: the text goes on where the prompt ends.")
@opt.used_option
@opt.number("-n", "--tokens", default=64, type=opt.ONE, help="Tokens to generate.")
@opt.temperature_option
@opt.seed_option
@opt.device_option
@opt.threads_option
def run(
    file: Path,
    prompt: str | None,
    prompt_option: str | None,
    raw: bool,
    used: int | None,
    tokens: int,
    temperature: float,
    seed: int,
    device: str,
    threads: int | None,
) -> None:
    """Generate text with llama.cpp and print the speed.

    A chat model gets the prompt as a message, with its chat template, and its answer is printed. --raw, or a file
    without a template, prints the prompt and how it goes on.

    \b
    Example:
      moe2gguf run moe.gguf "What is the capital of France?"
      moe2gguf run moe.gguf "Once upon a time" --raw --used 4 -n 200
      moe2gguf run moe.gguf < question.txt
    """
    from moe2gguf.gguf.made_for import read_made_for
    from moe2gguf.gguf.shards import read_model
    from moe2gguf.llama.generate import generate
    from moe2gguf.llama.templates import read_template

    text = prompt or prompt_option
    if prompt is prompt_option is None and not sys.stdin.isatty():
        text = sys.stdin.read().strip()
    if not text or (prompt and prompt_option):
        raise click.UsageError("give one prompt: moe2gguf run FILE PROMPT")
    header = read_model(file)
    made_for = read_made_for(header.metadata)
    if used and made_for and (note := made_for.note(file.name, [used])):
        display.warnings([note])
    template = None if raw else read_template(header)
    if template:
        with closing(template):
            whole = template.render([{"role": "user", "content": text}])
    generation = generate(
        file,
        whole if template else text,
        n_token=tokens,
        n_expert_used=used,
        device=device,
        temperature=temperature,
        seed=seed,
        threads=threads,
    )
    display.print_stream("" if template else text, generation)
