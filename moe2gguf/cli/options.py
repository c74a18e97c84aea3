"""What several commands share: option decorators, parameter types, and printing a result."""

import contextlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click
from cloup import option

from moe2gguf.cli.command import Input, NoEffect, Output, allow_replacing
from moe2gguf.errors import PlanError
from moe2gguf.llama.devices import DEVICES

FILE = Input(exists=True, dir_okay=False, path_type=Path)
FOLDER = Input(exists=True, file_okay=False, path_type=Path)
ANY = Input(path_type=Path)
MODEL = Input(exists=True, path_type=Path)
OUT = Output(path_type=Path)
PAGE = Output(dir_okay=False, path_type=Path)

T = TypeVar("T")


class Size(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: 500000000, 500MB, 2GB, 1.5GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes."""
        match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]+)?)\s*(?:([KMGT])(i?))?B?", str(value), re.IGNORECASE)
        if not match:
            self.fail(f"{value!r} is not a size such as 500MB or 2GB", param, ctx)
        number, prefix, binary = match.groups()
        return int(float(number) * (1024 if binary else 1000) ** " KMGT".index((prefix or " ").upper()))


class Whole(click.IntRange):
    """A whole number in a range."""

    name = "integer"


class Number(click.FloatRange):
    """A finite number in a range."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


ONE = Whole(1)
NONE = Whole(0)
"""Counts from 1 and from 0."""

SECONDS = Number(0, 10**9, min_open=True)


def number(*names: str, default: float, type: click.ParamType[Any], help: str) -> Callable[[Any], Any]:
    """An option with a number that has a default, which its help shows."""
    return option(*names, default=default, show_default=True, type=type, help=help)


json_option = option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
force_option = option("-f", "--force", is_flag=True, callback=allow_replacing, help="Replace the output if it exists.")
pages_force_option = option(
    "-f",
    "--force",
    is_flag=True,
    expose_value=False,
    callback=allow_replacing,
    help="Replace these files if they exist.",
)
resume_option = option(
    "--no-resume",
    "resume",
    is_flag=True,
    callback=lambda _context, _parameter, value: not value,
    help="Start anew instead of continuing where the same command was stopped.",
)
shard_size_option = option(
    "--shard-size", type=Size(), metavar="SIZE", help="Split the output into files of at most this size, such as 2GB."
)
threads_option = option(
    "-t",
    "--threads",
    type=ONE,
    help="Number of CPU threads.  [default: one per core; at most 4 to read and write files]",
)
text_option = option(
    "--text", type=FILE, help="Text file, or JSONL with a text field.  [default: a built-in mix of eight genres]"
)
context_option = number("--context", "n_context", default=512, type=Whole(8), help="Tokens per window.")
tokens_option = number("--tokens", default=2048, type=NONE, help="Tokens to score; 0 means all.")
seed_option = number("--seed", default=0, type=Whole(0, 2**31 - 1), help="Seed of the random numbers.")
temperature_option = number("--temperature", default=0.0, type=Number(0), help="0 takes the likeliest token.")
SEED_NEEDS_TEMPERATURE = (
    NoEffect(("--seed",), without=("--temperature",)),
    NoEffect(("--seed",), beside=("--temperature 0",)),
)
report_option = option("--report", type=PAGE, metavar="FILE.html", help="Also write a page with figures.")


def whole_numbers(_context: click.Context, _parameter: click.Parameter, text: str | None) -> list[int]:
    """Parse `8,6,4`."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of whole numbers such as 8,6,4") from error


def words(_context: click.Context, _parameter: click.Parameter, text: str | None) -> list[str]:
    """Parse `q8_0,q4_k_m`."""
    found = [part.strip().lower() for part in (text or "").split(",") if part.strip()]
    if text is not None and not found:
        raise click.BadParameter(f"{text!r} names nothing; give names such as q8_0,q4_k_m")
    return [*dict.fromkeys(found)]


type_rules = (
    option("--target-size", type=Size(), metavar="SIZE", help="Choose the types that lose least at this file size."),
    option("--allow-fallback", is_flag=True, help="Where a type does not fit a tensor, use llama.cpp's substitute."),
    option("--imatrix", type=FILE, help="Importance matrix of this model or its dense original (.gguf or .dat)."),
    option(
        "--tensor-type",
        "tensor_types",
        multiple=True,
        metavar="PATTERN=TYPE",
        help="Type of the tensors whose name matches this regular expression; the first match counts.",
    ),
)
expert_type_rules = (
    option("--type-rules", type=FILE, hidden=True, help="TOML or JSON file with more of these rules."),
    option(
        "--target-bpw",
        type=Number(0.5, 32),
        metavar="BITS",
        help="As --target-size, in bits per weight.",
        hidden=True,
    ),
    option("--pure", is_flag=True, hidden=True, help="Use the type for every matrix, embeddings and output included."),
    option(
        "--imatrix-repair",
        type=click.Choice(["none", "ones"]),
        default="none",
        show_default=True,
        hidden=True,
        help="Tensors and experts that the importance matrix lacks: refuse them, or count all columns alike.",
    ),
    option(
        "--llama-cpp-mix",
        is_flag=True,
        hidden=True,
        help="Choose types as llama.cpp does for a file with experts, not as for the dense model.",
    ),
)


used_option = option("-k", "--used", type=ONE, help="Experts used per token.  [default: as in the file]")
used_list_option = option(
    "-k", "--used", callback=whole_numbers, metavar="K,K", help="Experts used per token.  [default: as in the file]"
)
device_option = option(
    "--device", type=click.Choice([*DEVICES]), default="cpu", show_default=True, help="Where llama.cpp runs."
)
devices_option = option("--device", metavar="D,D", help=f"Where llama.cpp runs: {', '.join(DEVICES)}.  [default: cpu]")
rpc_option = option("--rpc", metavar="HOST:PORT,..", help="Also run on these llama.cpp RPC servers, as one device.")


def devices_from(device: str | None, rpc: str | None) -> list[str]:
    """Return the names of devices; RPC servers alone are no reason to run on the CPU too."""
    from moe2gguf.llama.devices import name_rpc_device

    named = device.split(",") if device else [] if rpc else ["cpu"]
    return [*named, name_rpc_device(rpc.split(","))] if rpc else named


def _is_unicode() -> bool:
    """Whether standard output can show every character."""
    return (sys.stdout.encoding or "").lower().replace("-", "") in ("utf8", "utf16", "utf32")


def take(record: type[T], options: dict[str, Any]) -> T:
    """Move the options that are fields of `record` out of `options` and into one; the fields are named once."""
    return record(**{field.name: options.pop(field.name) for field in fields(record) if field.name in options})  # type: ignore[arg-type]


def emit(result: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    """JSON on stdout, or the text that `show` prints."""
    if as_json:
        click.echo(json.dumps(result, indent=2, ensure_ascii=not _is_unicode()))
    else:
        show()


@contextlib.contextmanager
def refusals_as_json(wanted: bool) -> Iterator[None]:
    """Print the refusals of a plan as JSON too, if that is `wanted`, before they are raised."""
    try:
        yield
    except PlanError as error:
        if wanted:
            emit({"refusals": error.refusals}, True, lambda: None)
        raise
