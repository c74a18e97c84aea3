"""`--target-size` and `--target-bpw`: the room that the tensors which may change have, and rules that fill it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Container, Sequence

from moe2gguf.errors import PlanError
from moe2gguf.gguf import types
from moe2gguf.gguf.file import TensorType
from moe2gguf.gguf.writer import OutputTensor
from moe2gguf.progress import Progress
from moe2gguf.quant.assign import may_quantize
from moe2gguf.quant.budget import Budgeted, choose_under_budget, find_range
from moe2gguf.quant.rules import AUTO, VOCABULARY, Rule, TypeOptions

SLACK = 1024
"""Bytes kept free for the keys that say how the file was made."""


def choose_types(
    options: TypeOptions,
    own: Sequence[Rule],
    tensors: Sequence[OutputTensor],
    guided: Container[str],
    header_size: int,
    progress: Progress,
) -> tuple[Rule, ...]:
    """Rules that fill the target of `options` with all tensors that no rule of the user's decides.

    Args:
        options: with a target.
        own: the user's rules.
        tensors: as stored, with their importance and with blocks of numbers, which are read and measured.
        guided: the names of tensors that have an importance for all of their matrices.
        header_size: bytes of the file before its tensors.
        progress: receives the stage "choose types" and the elements measured.

    Raises:
        PlanError: the target cannot be reached; the range that can be is named.
        HarnessError: llama.cpp's kernels are missing.
        CorruptWeightError: a weight is NaN or infinite.
    """
    free, fixed = [], 0
    for tensor in tensors:
        decided = next((rule for rule in own if rule.matches(tensor.name)), None)
        if not may_quantize(tensor.name, tensor.shape):
            fixed += tensor.n_bytes
        elif decided is None:
            free.append(tensor)
        else:
            fixed += types.n_bytes(tensor.shape, decided.type)
    budget = _compute_budget(options, tensors, fixed, header_size)
    # the vocabulary's errors are measured without an importance, so the types that need one are not for it
    names = {t.name for t in free if t.name in guided and not re.fullmatch(VOCABULARY, t.name)}
    least, most = find_range(free, names)
    if not least <= budget <= most:
        raise PlanError([_describe_range(options, least - budget, most - budget, tensors)])
    with progress("choose types", _count_weights(free)) as advance:
        chosen = choose_under_budget(free, names, budget, threads=os.cpu_count() or 1, advance=advance)
    return _make_rules(chosen, "--target-size" if options.target_size is not None else "--target-bpw")


def refuse_target(options: TypeOptions) -> list[str]:
    """Why a target, if there is one, does not go with the other choices."""
    if not options.has_target:
        return []
    table = {
        "--target-size and --target-bpw: give one of them": options.target_size is not None
        and options.target_bpw is not None,
        f"type {options.type}: a target chooses the types; leave it out, or pin some by --tensor-type": (
            options.type.lower() != AUTO
        ),
        "--pure: has no meaning with a target; leave it out": options.pure,
        "--llama-cpp-mix: has no meaning with a target; leave it out": options.llama_cpp_mix,
    }
    return [message for message, applies in table.items() if applies]


def _compute_budget(options: TypeOptions, tensors: Sequence[OutputTensor], fixed: int, header_size: int) -> int:
    """Bytes for the free tensors."""
    if options.target_bpw is not None:
        return int(options.target_bpw * _count_weights(tensors) / 8) - fixed
    padding = 31 * len(tensors)  # to the alignment, at most
    return (options.target_size or 0) - header_size - SLACK - padding - fixed


def _describe_range(options: TypeOptions, below: int, above: int, tensors: Sequence[OutputTensor]) -> str:
    """The range, in the unit that the user chose; `below` and `above` are bytes from the target."""
    if options.target_size is not None:
        low, high = options.target_size + below, options.target_size + above
        return f"--target-size {options.target_size:,}: reachable are {low:,} to {high:,} bytes"
    n, target = _count_weights(tensors), options.target_bpw or 0.0
    low_bits, high_bits = target + 8 * below / n, target + 8 * above / n
    return f"--target-bpw {target:g}: reachable are {low_bits + 0.005:.2f} to {high_bits - 0.005:.2f} bits per weight"


def _count_weights(tensors: Sequence[OutputTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _make_rules(chosen: Budgeted, origin: str) -> tuple[Rule, ...]:
    """A rule per role and type, that lists the layers."""
    groups: dict[tuple[str, TensorType], list[str]] = {}
    for name, kind in chosen.types.items():
        found = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        role, layer = (found[2], found[1]) if found else (name, "")
        groups.setdefault((role, kind), []).append(layer)
    return tuple(
        Rule(rf"blk\.({'|'.join(layers)})\.{re.escape(role)}" if layers != [""] else re.escape(role), kind, origin)
        for (role, kind), layers in groups.items()
    )
