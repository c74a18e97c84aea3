"""What a file's metadata promises: the keys llama.cpp reads for a target graph, and the tensors that must follow."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from gguf import GGMLQuantizationType as GGMLType
from gguf import GGUFValueType as Kind

from moe2gguf.errors import list_names
from moe2gguf.gguf.counts import find_graph
from moe2gguf.gguf.file import Findings, GGUFFile, TensorInfo, ValueType, quote_text
from moe2gguf.gguf.layout import SCALARS
from moe2gguf.graphs import DENSE_GRAPHS, GRAPHS, Graph, GraphTensor, graph_sizes
from moe2gguf.limits import MAX_EXPERTS, Size, find_first_router, max_experts_used
from moe2gguf.spec import Dimensions, MetadataValue

MAX_LAYERS = 512  # https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-hparams.h#L11
MOST = 2**31 - 1
MOST_NAMES = 1000
"""Tensors that a message names: all of a real file, not the hundred thousand of a hostile one."""

Shape = tuple[int, ...]


def check_architecture(file: GGUFFile, found: Findings) -> None:
    """Compare the tensors of a file with its keys; an architecture that is no target graph is noted, not judged."""
    architecture = file.metadata.get("general.architecture")
    kind = file.metadata.get("general.type", "model")
    if architecture is None:
        found.problems.append("metadata 'general.architecture' is missing")
        return
    if not isinstance(architecture, str):
        found.problems.append(f"metadata general.architecture: expected a STRING, found {_quote_value(architecture)}")
        return
    graph = find_graph(architecture) if kind == "model" else None
    predicts = file.metadata.get(f"{architecture}.nextn_predict_layers", 0) != 0
    if graph is None or (not is_sliced(file) if graph.empty_layer else predicts):
        known = ", ".join(dict.fromkeys([*DENSE_GRAPHS, *GRAPHS]))
        words = f"architecture {_quote_value(architecture)}, type {_quote_value(kind)}"
        found.notes.append(f"{words}: shapes are only checked for plain models of {known}")
    else:
        _check_graph(file, graph, found)


def _quote_value(value: object) -> str:
    """A metadata value for a message: escaped and short."""
    return quote_text(value) if isinstance(value, str) else repr(value)[:80]


def _check_graph(file: GGUFFile, graph: Graph, found: Findings) -> None:
    before = len(found.problems)
    dimensions = read_dimensions(file, graph, found.problems)
    _check_vocabulary(file, found)
    unneeded = () if dimensions.n_expert else ("d_expert",)
    needed = dimensions._asdict().keys() - {"n_expert", "d_shared", *unneeded}
    if len(found.problems) > before and any(getattr(dimensions, name) == 0 for name in needed):
        found.notes.append("the tensors' shapes were not checked, because the metadata does not say what they must be")
        return
    n_dense = _count_leading_dense(file, graph, dimensions.n_layer, found.problems)
    expected = graph_tensors(graph, dimensions, fused="blk.0.attn_qkv.weight" in file.tensors, n_dense=n_dense)
    _check_tensor_set(file.tensors, expected, found.problems)
    n_used = file.metadata.get(key := f"{graph.architecture}.expert_used_count")
    limit = max_experts_used(Size.of(file.tensors, dimensions.n_layer, graph))
    if dimensions.n_expert and isinstance(n_used, int) and limit < n_used <= dimensions.n_expert:
        found.problems.append(
            f"metadata {key}: llama.cpp can run {limit} experts per token in a file of this many "
            f"layers and tensors, found {n_used}; it would abort"
        )


def _count_leading_dense(file: GGUFFile, graph: Graph, n_layer: int, problems: list[str]) -> int:
    """Layers, the first, that llama.cpp expects to be dense; 0 where the file says what cannot be."""
    if not graph.has_shared:
        return 0
    if graph.leading_key is None:
        return find_first_router(file.tensors)
    return read_count(file, f"{graph.architecture}.{graph.leading_key}", problems, 0, n_layer)


def _check_tensor_set(tensors: dict[str, TensorInfo], expected: dict[str, ExpectedTensor], problems: list[str]) -> None:
    """Every required tensor is there, no other than the expected ones, and each has its shape and type."""
    missing = [name for name, one in expected.items() if one.required and name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {list_names(missing, MOST_NAMES)}")
    if unexpected:
        names = list_names([quote_text(name) for name in unexpected], MOST_NAMES)
        problems.append(f"{len(unexpected)} tensors are unexpected, llama.cpp refuses a file with such: {names}")
    known = [(name, tensor, expected[name]) for name, tensor in tensors.items() if name in expected]
    problems += [
        f"tensor {name}: expected the shape {one.shape}, found {tensor.shape}"
        for name, tensor, one in known
        if tensor.shape != one.shape
    ]
    problems += [
        f"tensor {quote_text(name)} must be F32, found {tensor.type.name}"
        for name, tensor, one in known
        if one.f32 and tensor.type != GGMLType.F32
    ]


class ExpectedTensor(NamedTuple):
    """What a graph wants of a tensor; `f32`: it must be F32."""

    shape: Shape
    required: bool
    f32: bool


def graph_tensors(graph: Graph, m: Dimensions, *, fused: bool, n_dense: int = 0) -> dict[str, ExpectedTensor]:
    """Every tensor that a file of this graph and size may have, by name.

    `fused`: q, k and v are one matrix; the first `n_dense` layers are dense, whatever the others are.
    """
    sizes, found = graph_sizes(m), dict[str, ExpectedTensor]()
    for tensor in graph.tensors:
        shape = tuple(sizes[name] for name in tensor.shape)
        for i in range(m.n_layer) if "{i}" in tensor.name else (0,):
            absent = {"dense" if m.n_expert and i >= n_dense else "experts", "split" if fused else "fused"}
            family = _tensor_family(tensor, shape, tensor.when in absent)
            found |= {tensor.name.format(i=i) + ending: one for ending, one in family.items()}
    return found


def _tensor_family(tensor: GraphTensor, shape: Shape, is_left_out: bool) -> dict[str, ExpectedTensor]:
    """The weight of a tensor and its companions, by ending; none if it is left out, but a bias of split q, k, v."""
    bias = {".bias": ExpectedTensor(shape[:1], False, False)} if tensor.bias else {}
    if is_left_out:
        return bias if tensor.when == "split" else {}
    family = {f".{tensor.ending}": ExpectedTensor(shape, tensor.required, tensor.f32), **bias}
    if tensor.scales:
        scale = ExpectedTensor((shape[0] if len(shape) == 3 else 1,), False, True)
        family |= {".scale": scale, ".input_scale": scale}
    return family


# The values with which keys that arch `llama` does not read mean what it does anyway.
# https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/models/llama.cpp#L203
_UNREAD: dict[str, tuple[object, ...]] = {
    "expert_weights_scale": (0, 1),
    "expert_weights_norm": (True,),
    "expert_gating_func": (0, 1),
    "expert_shared_count": (0,),
    "leading_dense_block_count": (0,),
    "expert_group_count": (0,),
}


def read_count(file: GGUFFile, key: str, problems: list[str], default: int | None = None, limit: int = MOST) -> int:
    """A UINT32 from 1 to `limit` (0 only by default); 0 stands for a problem that is now listed."""
    value = file.metadata.get(key)
    if value is None:
        if default is None:
            problems.append(f"metadata {key} is missing")
        return default or 0
    kind = file.types[key]
    if kind != ValueType(Kind.UINT32):
        problems.append(f"metadata {key}: expected a UINT32, found {kind}")
    elif not isinstance(value, int) or not (1 if default != 0 else 0) <= value <= limit:
        problems.append(f"metadata {key}: expected 1 to {limit}, found {value}")
    else:
        return value
    return 0


class _Keys:
    """Reads a graph's keys the way llama.cpp does: a value of another type than it wants is a problem."""

    def __init__(self, file: GGUFFile, graph: Graph, problems: list[str]) -> None:
        self.file, self.graph, self.problems = file, graph, problems
        self.n_layer = 0  # set as soon as it is known

    def name(self, key: str) -> str:
        """The whole key."""
        return f"{self.graph.architecture}.{key}"

    def value(self, key: str) -> MetadataValue | None:
        """The value of a key, None where it is missing."""
        return self.file.metadata.get(self.name(key))

    def count(self, key: str, default: int | None = None, limit: int = MOST) -> int:
        """As `read_count`."""
        return read_count(self.file, self.name(key), self.problems, default, limit)

    def require(self, wanted: Mapping[str, MetadataValue]) -> None:
        """Every key has the value for which the experts of a sliced file are cut, in the type that llama.cpp wants."""
        for key, value in wanted.items():
            if kind := SCALARS.get(type(value)):
                self.expect_type(key, kind)
            if (found := self.value(key)) != value:
                self.problems.append(
                    f"metadata {self.name(key)}: these experts are cut for {value!r}, found {_quote_value(found)}"
                )

    def expect_type(self, key: str, kind: Kind) -> None:
        """A value that is there is stored as this type."""
        stored = self.file.types.get(self.name(key))
        if stored not in (None, ValueType(kind)):
            self.problems.append(f"metadata {self.name(key)}: expected a {kind.name}, found {stored}")

    def alike(self, key: str, default: int | None = None) -> int:
        """A count, or an array that gives every layer the same one."""
        value = self.value(key)
        if not isinstance(value, list):
            return self.count(key, default)
        if len(value) == self.n_layer and len(set(value)) == 1 and isinstance(value[0], int) and value[0] > 0:
            return value[0]
        self.problems.append(
            f"metadata {self.name(key)}: {len(value)} values for {self.n_layer} layers, where llama.cpp uses one for "
            "all"
        )
        return 0


def read_dimensions(file: GGUFFile, graph: Graph, problems: list[str]) -> Dimensions:
    """The dimensions that the metadata promises; a 0 stands for one that is missing or wrong, and is listed."""
    keys = _Keys(file, graph, problems)
    keys.n_layer = n_layer = max(0, keys.count("block_count", limit=MAX_LAYERS) - graph.empty_layer)
    keys.count("context_length")
    d_model, d_ff = keys.count("embedding_length"), keys.alike("feed_forward_length")
    n_head = keys.alike("attention.head_count")
    n_head_kv = keys.alike("attention.head_count_kv", n_head)
    if n_head_kv and n_head % n_head_kv:
        problems.append(
            f"{graph.architecture}.attention.head_count {n_head} is not a multiple of head_count_kv {n_head_kv}"
        )
    share = d_model // n_head if n_head else 0
    d_head = keys.count("attention.key_length", share)
    lengths = {"attention.value_length": share}
    if graph in DENSE_GRAPHS.values() or (is_sliced(file) and not graph.empty_layer):
        lengths["rope.dimension_count"] = d_head
    for key, default in lengths.items():
        if (other := keys.count(key, default)) not in (0, d_head):
            wanted = f"arch {graph.architecture} wants the length of a key, {d_head}"
            problems.append(f"metadata {keys.name(key)}: {wanted}, found {other}")
    theta = keys.value("rope.freq_base")
    keys.require(graph.describe_layers(n_layer, d_head, theta if isinstance(theta, float) else 10000.0))
    _check_norm_and_scaling(keys)
    n_expert = _n_expert(keys)
    d_expert, d_shared = _expert_widths(keys, d_ff) if n_expert else (0, 0)
    n_vocab = _n_vocab(file, keys)
    return Dimensions(n_layer, d_model, d_ff, n_head, n_head_kv, d_head, n_vocab, n_expert, d_expert, d_shared)


def _check_norm_and_scaling(keys: _Keys) -> None:
    """What has no part in a shape: the norms' epsilon, and how the rotary embedding is stretched."""
    epsilon = keys.value(name := "attention.layer_norm_rms_epsilon")
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        keys.problems.append(f"metadata {keys.name(name)}: expected 0 to 1, found {_quote_value(epsilon)}")
    scaling = keys.value(name := "rope.scaling.type")
    if scaling not in (None, "none", "linear", "yarn", "longrope"):
        keys.problems.append(
            f"metadata {keys.name(name)}: llama.cpp does not know {_quote_value(scaling)} and would abort"
        )


def _n_expert(keys: _Keys) -> int:
    """Experts that the router chooses from, 0 for a dense model; a used count that aborts is a problem."""
    n_expert = keys.count("expert_count", 0, MAX_EXPERTS)
    if isinstance(keys.value("expert_used_count"), list):
        keys.problems.append(
            f"metadata {keys.name('expert_used_count')}: one count per layer, which llama.cpp only half follows; "
            "write one number"
        )
        return n_expert
    n_used = keys.count("expert_used_count", 0)
    if (n_used == 0) != (n_expert == 0) or n_used > n_expert:
        keys.problems.append(
            f"metadata {keys.name('expert_used_count')}: expected 1 to {keys.name('expert_count')} ({n_expert}), "
            f"found {n_used}; llama.cpp would abort"
        )
    return n_expert


def _expert_widths(keys: _Keys, d_ff: int) -> tuple[int, int]:
    """The widths of an expert and of the shared expert; how the graph weighs experts must be said as it reads it."""
    graph = keys.graph
    if not graph.has_shared:
        for name, harmless in {**_UNREAD, "expert_feed_forward_length": (d_ff,)}.items():
            value = keys.value(name)
            if value is not None and value not in harmless:
                keys.problems.append(
                    f"metadata {keys.name(name)}: arch {graph.architecture} does not read it; {_quote_value(value)} "
                    "has no effect"
                )
        return d_ff, 0
    _check_gating(keys)
    d_expert = keys.count("expert_feed_forward_length")
    return d_expert, keys.count(graph.shared_key) * (d_expert if graph.counts_shared else 1)


def _check_gating(keys: _Keys) -> None:
    """Every key that says how experts are weighed has its type, and a gating function that llama.cpp knows."""
    kinds = {"expert_gating_func": Kind.UINT32, "expert_weights_norm": Kind.BOOL, "expert_weights_scale": Kind.FLOAT32}
    required = keys.graph.keys if is_sliced(keys.file) else {}
    for name, kind in kinds.items():
        if name not in required:  # which are looked at with their values
            keys.expect_type(name, kind)
    if keys.value("expert_gating_func") not in (None, 0, *range(1, 5)):
        keys.problems.append(
            f"metadata {keys.name('expert_gating_func')}: llama.cpp knows 1 to 4, found "
            f"{_quote_value(keys.value('expert_gating_func'))}; it would abort"
        )
    keys.require(required)


def is_sliced(file: GGUFFile) -> bool:
    """Whether the experts of the file are slices of a dense MLP."""
    return "moe2gguf.slicing.expert_count" in file.metadata


def _n_vocab(file: GGUFFile, keys: _Keys) -> int:
    """Rows of the embedding: the length of the token list, without one `llama.vocab_size`, or else what is there."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        return len(tokens)
    embedding = file.tensors.get("token_embd.weight")
    return keys.count("vocab_size", embedding.shape[0] if embedding and embedding.shape else 0)


def _check_vocabulary(file: GGUFFile, found: Findings) -> None:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        found.notes.append("no token list: the file can be loaded only without its vocabulary")
        return
    kind = file.types["tokenizer.ggml.tokens"]
    if kind != ValueType(Kind.ARRAY, Kind.STRING) or not isinstance(tokens, list) or not tokens:
        found.problems.append(f"metadata tokenizer.ggml.tokens: expected an ARRAY of STRING with entries, found {kind}")
        return
    for name in ("scores", "token_type"):
        values = file.metadata.get(f"tokenizer.ggml.{name}", tokens)
        if not isinstance(values, list) or len(values) != len(tokens):
            length = len(values) if isinstance(values, list) else "no list"
            found.problems.append(f"metadata tokenizer.ggml.{name}: expected {len(tokens)} entries, found {length}")


def check_experts_alike(file: GGUFFile, found: Findings) -> None:
    """A kind of expert tensor usually has one shape and one type in all layers; others are noted."""
    kinds: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for tensor in file.tensors.values():
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+_exps\.weight)", tensor.name):
            kinds[match[2]][f"{tensor.type.name} {tensor.shape}"].append(match[1])
    for name, groups in kinds.items():
        if len(groups) > 1:
            parts = "; ".join(f"{group} in layers {', '.join(layers)}" for group, layers in groups.items())
            found.notes.append(f"{name} differs between layers: {parts}")
