"""Rules give every tensor a type, and everything that does not fit is named before anything is written."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from moe2gguf.errors import list_names, list_ways
from moe2gguf.gguf import types
from moe2gguf.gguf.file import TensorType
from moe2gguf.gguf.kernels import NEEDS_IMPORTANCE
from moe2gguf.gguf.layout import Entry
from moe2gguf.quant.presets import FILE_TYPE_NAMES, Network
from moe2gguf.quant.rules import VOCABULARY, Rule, TypeOptions, make_base_rules, read_own_rules

FALLBACKS: dict[str, str] = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""What stands in for a type whose blocks do not fit, and F16 where that does not fit either:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-quant.cpp#L390"""

UNGUIDED_GARBAGE = ("IQ3_XXS", "IQ2_S", "IQ1_M")


T = TypeVar("T", bound=Entry)


@dataclass(frozen=True)
class Fallback:
    """A tensor whose rows do not fit the `wanted` type and that is `used` instead."""

    tensor: str
    wanted: TensorType
    used: TensorType

    @property
    def extra_bits(self) -> float:
        """Bits per weight that it costs (negative: saves)."""
        return types.bits_per_weight(self.used) - types.bits_per_weight(self.wanted)


@dataclass(frozen=True)
class Assignment:
    """A type for every tensor, how many tensors each rule decided, and what does not fit.

    `file_type` is the number for `general.file_type`: a preset's, else that of most of the bytes.
    """

    types: Mapping[str, TensorType]
    counts: tuple[tuple[Rule, int], ...]
    fallbacks: tuple[Fallback, ...]
    refusals: tuple[str, ...]
    file_type: int

    def set_types(self, tensors: Sequence[T]) -> tuple[T, ...]:
        """Return the same tensors with their types."""
        return tuple(dataclasses.replace(tensor, type=self.types[tensor.name]) for tensor in tensors)

    @property
    def warnings(self) -> list[str]:
        """One sentence per kind of fallback, with its cost."""
        groups: dict[tuple[TensorType, TensorType], list[str]] = {}
        for one in self.fallbacks:
            groups.setdefault((one.wanted, one.used), []).append(one.tensor)
        return [
            f"{wanted.name} does not fit {list_names(names)}: {used.name} instead, {_compare_bits(used, wanted)}"
            for (wanted, used), names in groups.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return rules and fallbacks as JSON types."""
        return {
            "rules": [
                {"pattern": rule.pattern, "type": rule.type.name, "origin": rule.origin, "tensors": count}
                for rule, count in self.counts
            ],
            "fallbacks": [
                {
                    "tensor": one.tensor,
                    "wanted": one.wanted.name,
                    "used": one.used.name,
                    "extra_bits_per_weight": one.extra_bits,
                }
                for one in self.fallbacks
            ],
        }


_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_(inp|tid2eid)\.weight|ssm_conv1d|shortconv\.conv\.|indexer\.[kq]_proj|altup|laurel"
    r"|per_layer_model_proj|time_mix_(first|[wva][012]|g[12]|decay_w[12]|lerp_fused)\.|attn_rel_b"
    r"|^(position_embd|token_types)\.weight"
)
"""Matrices that llama.cpp's quantizer leaves as they are; its graphs read some of them in one type only."""


def may_quantize(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor may have another type than the one it is stored in: a matrix, and none of `_KEPT`.

    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-quant.cpp#L287
    """
    n_dims = len(shape) - next((i for i, n in enumerate(shape) if n != 1), len(shape))
    return n_dims >= 2 and name.endswith("weight") and not _KEPT.search(name)


def find_stored_type(name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> TensorType:
    """Return the type that keeps a checkpoint's tensor as it is; F32 for vectors and routers, as llama.cpp wants."""
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return types.find_type("F32")
    return types.find_float(dtype)


def assign(
    tensors: Sequence[Entry],
    options: TypeOptions,
    network: Network,
    guided: Container[str] = (),
    base: Sequence[Rule] | None = None,
    own: Sequence[Rule] | None = None,
    *,
    list_cuts: Callable[[int], list[str]] = lambda _block: [],
) -> Assignment:
    """Choose the type of every tensor.

    Args:
        tensors: with the type in which they are stored.
        options: what the user says about types.
        network: what presets depend on.
        guided: the names of tensors that have an importance.
        base: rules in place of those that `--type` stands for.
        own: the user's rules (None: they are read, see `read_own_rules`).
        list_cuts: ways to give experts a width of whole blocks, which refusals advise where it can still be chosen.

    Raises:
        PlanError: the options name unknown types, broken patterns or an unreadable file, or the preset is not known for
            this architecture.
    """
    own = read_own_rules(options) if own is None else own
    rules = (*own, *(make_base_rules(options, network) if base is None else base))

    # The first rule that matches a matrix decides; all else keeps the type in which it is stored.
    chosen = {tensor.name: tensor.type for tensor in tensors}
    counts: Counter[int] = Counter()
    for tensor in tensors:
        matching = (i for i, rule in enumerate(rules) if rule.matches(tensor.name))
        if may_quantize(tensor.name, tensor.shape) and (decided := next(matching, None)) is not None:
            counts[decided] += 1
            chosen[tensor.name] = rules[decided].type

    # Where blocks do not fit the rows, llama.cpp's substitute is taken, or the type refused.
    fallbacks, misfits = _fit_blocks(tensors, chosen, options.allow_fallback, list_cuts)
    refusals = [
        *_refuse_idle_rules([rule for i, rule in enumerate(own) if not counts[i]], tensors),
        *misfits,
        *_refuse_without_importance(tensors, chosen, options, guided),
    ]

    used = tuple((rule, counts[i]) for i, rule in enumerate(rules) if counts[i])
    preset = FILE_TYPE_NAMES.get(options.type.upper())
    file_type = types.file_type(preset) if preset else _find_file_type(tensors, chosen)
    return Assignment(chosen, used, tuple(fallbacks), tuple(refusals), file_type)


def _refuse_idle_rules(rules: Sequence[Rule], tensors: Sequence[Entry]) -> list[str]:
    """Return a sentence per rule of the user's that decides nothing, with the reason."""
    refusals = []
    for rule in rules:
        names = [tensor for tensor in tensors if rule.matches(tensor.name)]
        if any(may_quantize(tensor.name, tensor.shape) for tensor in names):
            why = "every tensor that it matches is decided by an earlier pattern"
        elif names:
            why = f"it matches only tensors that are never quantized ({list_names([t.name for t in names])})"
        else:
            why = "no tensor's whole name matches it; --plan --verbose lists the names"
        refusals.append(f"{rule.origin}: pattern {rule.pattern!r} decides nothing: {why}")
    return refusals


def _fit_blocks(
    tensors: Sequence[Entry], chosen: dict[str, TensorType], allow: bool, list_cuts: Callable[[int], list[str]]
) -> tuple[list[Fallback], list[str]]:
    """Write substitutes for the types whose blocks do not fit their rows into `chosen`; return them, and refusals."""
    fallbacks, misfits = [], dict[int, list[Entry]]()
    for tensor in tensors:
        kind, width = chosen[tensor.name], tensor.shape[-1] if tensor.shape else 1
        if width % types.block_size(kind) == 0:
            continue
        substitute = _find_substitute(kind, width)
        if allow and substitute:
            fallbacks.append(Fallback(tensor.name, kind, substitute))
            chosen[tensor.name] = substitute
        else:
            misfits.setdefault(types.block_size(kind), []).append(tensor)
    return fallbacks, [_describe_misfits(block, misfit, chosen, list_cuts) for block, misfit in misfits.items()]


def _find_substitute(kind: TensorType, width: int) -> TensorType | None:
    """Return what llama.cpp writes instead of `kind`; None where it gives up."""
    if kind.name not in FALLBACKS and types.block_size(kind) > 32:
        return None
    substitute = types.find_type(FALLBACKS.get(kind.name, kind.name))
    return types.find_type("F16") if width % types.block_size(substitute) else substitute


def _describe_misfits(
    block: int, tensors: Sequence[Entry], chosen: Mapping[str, TensorType], list_cuts: Callable[[int], list[str]]
) -> str:
    """A sentence for all tensors whose rows are no multiple of `block`, and a line for each way out with its price."""
    widths, instead = dict[int, list[str]](), dict[tuple[TensorType, TensorType], None]()
    more_bytes = 0
    for tensor in tensors:
        kind, width = chosen[tensor.name], tensor.shape[-1]
        widths.setdefault(width, []).append(tensor.name)
        if substitute := _find_substitute(kind, width):
            instead[kind, substitute] = None
            more_bytes += types.n_bytes(tensor.shape, substitute) - types.n_bytes(tensor.shape, kind)
    kinds = [*dict.fromkeys(chosen[tensor.name].name for tensor in tensors)]
    rows = " and ".join(f"{width} ({list_names(names, 1)})" for width, names in widths.items())
    ways = list_cuts(block) if all(re.search(r"ffn_down_\w*exp", tensor.name) for tensor in tensors) else []
    if instead:
        pairs = [f"{used.name} for {wanted.name}, {_compare_bits(used, wanted)}" for wanted, used in instead]
        price = f"{more_bytes:,} bytes more in all"
        ways.append(f"take larger types there with --allow-fallback ({'; '.join([*pairs, price])})")
    ways.append("choose another type, for all or with --tensor-type")
    return (
        f"{' and '.join(kinds)} need{'s' if len(kinds) == 1 else ''} rows whose width is a multiple of {block}, which "
        f"{rows} {'is' if len(widths) == 1 else 'are'} not:" + list_ways(ways)
    )


def _compare_bits(used: TensorType, wanted: TensorType) -> str:
    return f"{types.bits_per_weight(used):g} bits per weight for {types.bits_per_weight(wanted):g}"


def _refuse_without_importance(
    tensors: Sequence[Entry], chosen: Mapping[str, TensorType], options: TypeOptions, guided: Container[str]
) -> list[str]:
    """Refuse types that are garbage without an importance matrix, or abort llama.cpp's kernels:
    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-quant.cpp#L856
    """
    groups: dict[TensorType, list[str]] = {}
    for tensor in tensors:
        kind = chosen[tensor.name]
        if kind == tensor.type or tensor.name in guided:
            continue
        bad = kind.name in UNGUIDED_GARBAGE or (kind.name == "Q2_K" and options.type.upper() == "Q2_K_S")
        if kind in NEEDS_IMPORTANCE or (bad and not re.fullmatch(VOCABULARY, tensor.name)):
            groups.setdefault(kind, []).append(tensor.name)
    return [
        f"{kind.name} needs an importance matrix, for {list_names(names)}; make one with `moe2gguf imatrix` and "
        "give it with --imatrix; the smallest types that do without are q2_k, iq3_s and q3_k_m"
        for kind, names in groups.items()
    ]


def _find_file_type(tensors: Sequence[Entry], chosen: Mapping[str, TensorType]) -> int:
    """Return the file type named after the tensor type that takes the most bytes; GUESSED where there is none."""
    sizes: Counter[TensorType] = Counter()
    for tensor in tensors:
        sizes[chosen[tensor.name]] += types.n_bytes(tensor.shape, chosen[tensor.name])
    largest = max(sizes, key=lambda kind: sizes[kind], default=types.find_type("F32"))
    return types.FILE_TYPES.get(largest, types.file_type("GUESSED"))
