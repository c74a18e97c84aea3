"""`--target-size` and `--target-bpw`: the room that the tensors which may change have, and rules that fill it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Container, Sequence

from moe2gguf.errors import PlanError
from moe2gguf.gguf import types
from moe2gguf.gguf.file import TensorType
from moe2gguf.gguf.layout import Layout
from moe2gguf.gguf.writer import OutputTensor
from moe2gguf.quant.assign import may_quantize
from moe2gguf.quant.budget import Budgeted, choose, reachable
from moe2gguf.quant.rules import AUTO, VOCABULARY, Rule, TypeOptions, own_rules

SLACK = 1024
"""Bytes kept free for the keys that say how the file was made."""


def target_rules(
    options: TypeOptions, tensors: Sequence[OutputTensor], guided: Container[str], layout: Layout
) -> tuple[Rule, ...] | None:
    """Rules for all tensors that no rule of the user's decides, None without a target; weights are read and measured.

    `tensors` come as stored, with their importance and with blocks of numbers; `layout` is theirs.

    Raises:
        PlanError: the target cannot be reached (the reachable range is named), or goes with other choices.
    """
    if not options.has_target:
        return None
    if refusals := _refuse(options):
        raise PlanError(refusals)
    own = own_rules(options)
    free, fixed = [], 0
    for tensor in tensors:
        decided = next((rule for rule in own if rule.matches(tensor.name)), None)
        if not may_quantize(tensor.name, tensor.shape):
            fixed += tensor.n_bytes
        elif decided is None:
            free.append(tensor)
        else:
            fixed += _n_bytes(tensor, decided.type)
    budget = _budget(options, tensors, fixed, layout)
    # the vocabulary's errors are measured without an importance, so the types that need one are not for it
    names = {t.name for t in free if t.name in guided and not re.fullmatch(VOCABULARY, t.name)}
    least, most = reachable(free, names)
    if not least <= budget <= most:
        raise PlanError([_unreachable(options, least - budget, most - budget, tensors)])
    chosen = choose(free, names, budget, threads=os.cpu_count() or 1)
    return _rules(chosen, "--target-size" if options.target_size is not None else "--target-bpw")


def _refuse(options: TypeOptions) -> list[str]:
    refusals = []
    if options.target_size is not None and options.target_bpw is not None:
        refusals.append("--target-size and --target-bpw: give one of them")
    if options.type.lower() != AUTO:
        refusals.append(
            f"--type {options.type}: a target chooses the types; leave it out, or pin some by --tensor-type"
        )
    switches = {"--pure": options.pure, "--llama-cpp-mix": options.llama_cpp_mix}
    return refusals + [
        f"{name}: has no meaning with a target; leave it out" for name, is_set in switches.items() if is_set
    ]


def _budget(options: TypeOptions, tensors: Sequence[OutputTensor], fixed: int, layout: Layout) -> int:
    """Bytes for the free tensors."""
    if options.target_bpw is not None:
        return int(options.target_bpw * _n_weight(tensors) / 8) - fixed
    padding = 31 * len(tensors)  # to the alignment, at most
    return (options.target_size or 0) - len(layout.header) - SLACK - padding - fixed


def _unreachable(options: TypeOptions, below: int, above: int, tensors: Sequence[OutputTensor]) -> str:
    """The range, in the unit that the user chose; `below` and `above` are bytes from the target."""
    if options.target_size is not None:
        low, high = options.target_size + below, options.target_size + above
        return f"--target-size {options.target_size:,}: reachable are {low:,} to {high:,} bytes"
    n, target = _n_weight(tensors), options.target_bpw or 0.0
    low_bits, high_bits = target + 8 * below / n, target + 8 * above / n
    return f"--target-bpw {target:g}: reachable are {low_bits + 0.005:.2f} to {high_bits - 0.005:.2f} bits per weight"


def _n_weight(tensors: Sequence[OutputTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _n_bytes(tensor: OutputTensor, kind: TensorType) -> int:
    return types.n_bytes(tensor.shape, kind)


def _rules(chosen: Budgeted, origin: str) -> tuple[Rule, ...]:
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
