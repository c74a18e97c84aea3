"""What several commands share: option decorators, parameter types, and printing a result."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from cloup import option, option_group

from moe2gguf.quant.repairs import REPAIRS

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
PATH = click.Path(path_type=Path)


class AlwaysOn(click.ParamType):  # type: ignore[type-arg]
    """A number of experts, or "auto" (-1): see `moe2gguf.recipes.options`."""

    name = "number or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; -1 for auto."""
        if value == "auto":
            return -1
        try:
            return max(int(value), 0)
        except ValueError:
            self.fail(f"{value!r} is no number, nor auto", param, ctx)


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


json_option = option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
resume_option = option(
    "--resume/--no-resume",
    default=True,
    help="Continue a stopped run of the same command (unfinished work of another is refused), or start anew.  "
    "[default: resume]",
)
shard_size_option = option(
    "--shard-size", type=Size(), metavar="2GB", help="Write files of at most this size; llama.cpp opens the first."
)
threads_option = option(
    "--threads", type=click.IntRange(1), help="Threads to use.  [default: the number of cores, at most 4]"
)


def whole_numbers(_context: click.Context, _parameter: click.Parameter, text: str | None) -> list[int]:
    """Parse `8,6,4`."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of whole numbers such as 8,6,4") from error


def words(_context: click.Context, _parameter: click.Parameter, text: str | None) -> list[str]:
    """Parse `q8_0,q4_k_m`."""
    return [part.strip() for part in text.split(",") if part.strip()] if text else []


type_options = option_group(
    "Types of single tensors",
    option(
        "--tensor-type",
        "tensor_types",
        multiple=True,
        metavar="PATTERN=TYPE",
        help="Another type for tensors whose whole name matches this regular expression; the first match decides.",
    ),
    option("--type-rules", type=FILE, help="A TOML or JSON file of such rules, tried after them."),
    option("--pure", is_flag=True, help="The type for every matrix, those of the vocabulary included."),
    option("--allow-fallback", is_flag=True, help="Where a type does not fit, take llama.cpp's substitute, listed."),
    option("--target-size", type=Size(), metavar="SIZE", help="Choose the types with the least error for this size."),
    option("--target-bpw", type=click.FloatRange(0.5, 32), metavar="BITS", help="The same, in bits per weight."),
    option("--imatrix", type=FILE, help="An importance matrix, of this file or of its dense parent (.gguf or .dat)."),
    option(
        "--imatrix-repair",
        type=click.Choice([*REPAIRS]),
        default="none",
        show_default=True,
        help="What tensors and experts without data get: " + "; ".join(f"{k}: {v}" for k, v in REPAIRS.items()) + ".",
    ),
    option("--llama-cpp-mix", is_flag=True, help="Choose for experts as llama.cpp does, not as for the dense parent."),
)


llama_threads_option = option("--threads", type=click.IntRange(1), help="Threads to use.  [default: all]")
used_list_option = option(
    "-k", "--used", callback=whole_numbers, metavar="K,K", help="Experts per token.  [default: what the file says]"
)
devices_option = option("--device", metavar="D,D", help="Of cpu, gpu and gpu:experts-on-cpu.  [default: cpu]")
rpc_option = option("--rpc", metavar="HOST:PORT,..", help="A device made of these llama.cpp RPC servers.")


def devices_from(device: str | None, rpc: str | None) -> list[str]:
    """Return the names of devices; RPC servers alone are no reason to run on the CPU too."""
    from moe2gguf.llama.devices import rpc_device

    named = device.split(",") if device else [] if rpc else ["cpu"]
    return [*named, rpc_device(rpc.split(","))] if rpc else named


def emit(result: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    """JSON on stdout, or the text that `show` prints."""
    if as_json:
        click.echo(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        show()
