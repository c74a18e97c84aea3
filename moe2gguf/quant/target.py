"""`--target-size` and `--target-bpw`: the types with the least error under a size.

Every tensor's error is measured in every type that fits, then bytes go where they help. A tensor's error is the share
of its outputs' energy that quantization turns into noise, estimated from some rows: sum m (w - q)^2 / sum m w^2, with m
the mean square of the input column (1 without an importance matrix). A model's loss changes by about a weighted sum
of such shares (https://arxiv.org/abs/2411.17525, the linearity theorem). The weights are measured: see `HEAD`.

Per tensor only the lower convex hull of (bytes, error) matters; taking its steps by error saved per byte is optimal but
for the last step.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import PlanError
from moe2gguf.gguf import kernels, types
from moe2gguf.gguf.file import TensorType
from moe2gguf.gguf.kernels import NEEDS_IMPORTANCE
from moe2gguf.gguf.layout import Entry
from moe2gguf.gguf.system import count_processors
from moe2gguf.gguf.writer import OutputTensor
from moe2gguf.progress import Progress
from moe2gguf.quant.assign import UNGUIDED_GARBAGE, may_quantize
from moe2gguf.quant.rules import AUTO, VOCABULARY, Rule, TypeOptions

SLACK = 1024
"""Bytes kept free for the keys that say how the file was made."""

ROWS = 32
"""Rows of each tensor (spread over all its experts) that are quantized to measure a type."""

SHORTLIST = 0.6
"""Types of fewer bits than this share of the target are not tried, unless the target cannot be reached otherwise."""

YOUNG = ("NVFP4", "Q1_0", "Q2_0")
"""Types that only the newest llama.cpp reads: for those who ask for them by name."""

HEAD = 35.0
GUIDED = {"attn_v": 0.9, "ffn_down": 0.5}
UNGUIDED = {"attn_v": 1.9, "ffn_down": 1.9}
"""How much a tensor's error changes the model's output, against ffn_up's: KL divergence per error with all tensors of a
role in Q4_0, on SmolLM2-135M, 255 tokens of WikiText-2. The roles that are not listed were not measured and count 1.
With an importance the roles differ less, which is what the theory says. `HEAD` is for the matrix that makes logits and
the embedding, measured where they are one; their errors are always measured without an importance."""


@dataclass(frozen=True)
class Option:
    """One type for one tensor: its bytes and what it costs."""

    type: TensorType
    n_bytes: int
    error: float


@dataclass(frozen=True)
class Budgeted:
    """The chosen types by tensor name, and the sum of weighted errors."""

    types: Mapping[str, TensorType]
    error: float


def choose_types(
    options: TypeOptions,
    own: Sequence[Rule],
    tensors: Sequence[OutputTensor],
    guided: Container[str],
    header_size: int,
    progress: Progress,
    on_size: Callable[[int], None],
) -> tuple[Rule, ...]:
    """Return rules that fill the target of `options` with all tensors that no rule of the user's decides.

    Args:
        options: with a target.
        own: the user's rules.
        tensors: as stored, with their importance and with blocks of numbers, which are read and measured.
        guided: the names of tensors that have an importance for all of their matrices.
        header_size: bytes of the file before its tensors.
        progress: receives the stage "choose types" and the elements measured.
        on_size: is given the bytes of the file to come, if they can be reached, before a weight is read.

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
    on_size(header_size + fixed + budget)
    with progress("choose types", _count_weights(free)) as advance:
        chosen = choose_under_budget(free, names, budget, threads=count_processors(), advance=advance)
    return _make_rules(chosen, "--target-size" if options.target_size is not None else "--target-bpw")


def refuse_target(options: TypeOptions) -> list[str]:
    """Why a target, if there is one, does not go with the other choices."""
    if not options.has_target:
        return []
    refusals = []
    if options.target_size is not None and options.target_bpw is not None:
        refusals.append("--target-size and --target-bpw: give one of them")
    if options.type.lower() != AUTO:
        refusals.append(f"type {options.type}: a target chooses the types; leave it out, or pin some by --tensor-type")
    flags = {"--pure": options.pure, "--llama-cpp-mix": options.llama_cpp_mix}
    refusals += [f"{name}: has no meaning with a target; leave it out" for name, given in flags.items() if given]
    return refusals


def _compute_budget(options: TypeOptions, tensors: Sequence[OutputTensor], fixed: int, header_size: int) -> int:
    """Return the bytes that are left for the free tensors."""
    if options.target_bpw is not None:
        return int(options.target_bpw * _count_weights(tensors) / 8) - fixed
    padding = 31 * len(tensors)  # to the alignment, at most
    return (options.target_size or 0) - header_size - SLACK - padding - fixed


def _describe_range(options: TypeOptions, below: int, above: int, tensors: Sequence[OutputTensor]) -> str:
    """Return the range, in the unit that the user chose; `below` and `above` are bytes from the target."""
    if options.target_size is not None:
        low, high = options.target_size + below, options.target_size + above
        return f"--target-size {options.target_size:,}: reachable are {low:,} to {high:,} bytes"
    n, target = _count_weights(tensors), options.target_bpw or 0.0
    low_bits, high_bits = target + 8 * below / n, target + 8 * above / n
    return f"--target-bpw {target:g}: reachable are {low_bits + 0.005:.2f} to {high_bits - 0.005:.2f} bits per weight"


def _count_weights(tensors: Sequence[Entry]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _make_rules(chosen: Budgeted, origin: str) -> tuple[Rule, ...]:
    """Return a rule per role and type, that lists the layers."""
    groups: dict[tuple[str, TensorType], list[str]] = {}
    for name, kind in chosen.types.items():
        found = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        role, layer = (found[2], found[1]) if found else (name, "")
        groups.setdefault((role, kind), []).append(layer)
    return tuple(
        Rule(rf"blk\.({'|'.join(layers)})\.{re.escape(role)}" if layers != [""] else re.escape(role), kind, origin)
        for (role, kind), layers in groups.items()
    )


# --- choosing ---


def list_types(tensor: Entry, *, guided: bool) -> list[TensorType]:
    """List the types that a tensor may have: blocks that fit its rows, small ones only with an importance; and F16."""
    width = tensor.shape[-1]
    return [
        kind
        for kind in (types.find_type("f16"), *types.BLOCKS)
        if kind.name not in YOUNG
        and width % types.block_size(kind) == 0
        and (guided or not (kind in NEEDS_IMPORTANCE or kind.name in UNGUIDED_GARBAGE))
    ]


def find_range(tensors: Sequence[Entry], guided: Container[str]) -> tuple[int, int]:
    """Return the fewest and the most bytes that these tensors can take."""
    sizes = [[types.n_bytes(t.shape, kind) for kind in list_types(t, guided=t.name in guided)] for t in tensors]
    return sum(map(min, sizes)), sum(map(max, sizes))


def choose_under_budget(
    tensors: Sequence[OutputTensor],
    guided: Container[str],
    budget: int,
    *,
    threads: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Budgeted:
    """Choose types for `tensors` in at most `budget` bytes, which must do; `advance` is told the measured elements.

    The same inputs give the same types.

    Raises:
        HarnessError: llama.cpp's kernels are missing.
        CorruptWeightError: a weight is NaN or infinite.
    """
    fitting = {t.name: list_types(t, guided=t.name in guided) for t in tensors}
    candidates = _shorten_lists(tensors, fitting, budget)
    kernels.require({kind for kinds in candidates.values() for kind in kinds} & {*types.BLOCKS})
    options = {}
    with ThreadPoolExecutor(threads) as pool:
        for tensor in tensors:
            options[tensor.name] = _measure_types(tensor, candidates[tensor.name], pool)
            advance(math.prod(tensor.shape))
    return spend_budget(options, budget)


def _shorten_lists(
    tensors: Sequence[Entry], candidates: Mapping[str, list[TensorType]], budget: int
) -> Mapping[str, list[TensorType]]:
    """Leave out the types far below the target's bits, which are slow to measure, unless the budget needs them."""
    target_bits = 8 * budget / max(_count_weights(tensors), 1)
    short = {
        name: [kind for kind in kinds if types.bits_per_weight(kind) >= SHORTLIST * target_bits]
        for name, kinds in candidates.items()
    }
    smallest = sum(
        min((types.n_bytes(tensor.shape, kind) for kind in short[tensor.name]), default=budget + 1)
        for tensor in tensors
    )
    return short if smallest <= budget else candidates


def spend_budget(options: Mapping[str, Sequence[Option]], budget: int) -> Budgeted:
    """Choose one option per tensor, at most `budget` bytes together: the least error in sum, but for the last step."""
    # Start every tensor at its smallest option.
    hulls = {name: lower_hull(choices) for name, choices in options.items()}
    at = dict.fromkeys(hulls, 0)
    room = budget - sum(points[0].n_bytes for points in hulls.values())
    # List every step from one option to the next larger one: change of error per byte, below zero.
    steps = [
        (_slope(a, b), order, i, name)
        for order, (name, points) in enumerate(hulls.items())
        for i, (a, b) in enumerate(pairwise(points))
    ]
    # Take the steps that save the most error per byte first. On a hull the steps of one tensor come in their order; a
    # step that has no room is skipped, and so are those of its tensor behind it.
    for _, _, i, name in sorted(steps):
        cost = hulls[name][i + 1].n_bytes - hulls[name][i].n_bytes
        if at[name] == i and cost <= room:
            at[name], room = i + 1, room - cost
    chosen = {name: points[at[name]] for name, points in hulls.items()}
    return Budgeted({name: one.type for name, one in chosen.items()}, sum(one.error for one in chosen.values()))


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """Return the options that are best for some price of a byte: more bytes, less error, each step gaining less."""
    points: list[Option] = []
    # From the smallest to the largest: leave out what costs more bytes for no less error, and take back the last point
    # while the line past it falls more steeply than the line to it.
    for one in sorted(options, key=lambda option: (option.n_bytes, option.error)):
        if points and one.error >= points[-1].error:
            continue
        while len(points) > 1 and _slope(points[-2], one) <= _slope(points[-2], points[-1]):
            points.pop()
        points.append(one)
    return points


def _slope(a: Option, b: Option) -> float:
    return (b.error - a.error) / (b.n_bytes - a.n_bytes)


def _measure_types(tensor: OutputTensor, kinds: Sequence[TensorType], pool: ThreadPoolExecutor) -> list[Option]:
    """Return the bytes and the weighted error of the tensor in each type, from some of its rows."""
    head = re.fullmatch(VOCABULARY, tensor.name) is not None
    samples = _sample_rows(dataclasses.replace(tensor, importance=None) if head else tensor)
    weight = HEAD if head else sensitivity(tensor.name, guided=tensor.importance is not None)

    def measure(kind: TensorType) -> Option:
        noise = energy = 0.0
        for rows, importance in samples:
            m = 1.0 if importance is None else importance.astype(np.float64)
            noise += float((m * (rows - _round_rows(rows, kind, tensor.name, importance)) ** 2).sum())
            energy += float((m * rows.astype(np.float64) ** 2).sum())
        return Option(kind, types.n_bytes(tensor.shape, kind), weight * noise / energy if energy else 0.0)

    return [*pool.map(measure, kinds)]


def sensitivity(name: str, *, guided: bool) -> float:
    """Return the weight of the error of a layer's tensor."""
    weights = GUIDED if guided else UNGUIDED
    return next((weight for role, weight in weights.items() if f".{role}" in name), 1.0)


def _sample_rows(tensor: OutputTensor) -> list[tuple[NDArray[np.float32], NDArray[np.float32] | None]]:
    """Read evenly spread rows, with the importance of the matrix that they are of."""
    height = tensor.shape[-2]
    n_row = math.prod(tensor.shape[:-1])
    wanted = np.unique(np.linspace(0, n_row - 1, min(ROWS, n_row)).astype(np.int64))
    matrices = tensor.importance() if tensor.importance else None
    rows: dict[int, list[NDArray[np.float32]]] = {}
    first = 0
    for block in tensor.blocks():
        flat = block.reshape(-1, block.shape[-1])
        here = wanted[(wanted >= first) & (wanted < first + len(flat))]
        picked = flat[here - first].astype(np.float32)
        types.require_finite(picked, tensor.name)
        for row, matrix in zip(picked, here // height, strict=True):
            rows.setdefault(int(matrix), []).append(row)
        first += len(flat)
    return [(np.stack(group), None if matrices is None else matrices[matrix]) for matrix, group in rows.items()]


def _round_rows(
    rows: NDArray[np.float32], kind: TensorType, name: str, importance: NDArray[np.float32] | None
) -> NDArray[np.float64]:
    """Encode `rows` in a type and decode them, in float64."""
    data = np.frombuffer(types.encode(rows, kind, name, importance), np.uint8)
    if kind in types.FLOATS:
        return data.view(types.FLOATS[kind]).astype(np.float64).reshape(rows.shape)
    return kernels.dequantize(data, kind).astype(np.float64).reshape(rows.shape)
