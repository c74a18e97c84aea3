"""What llama.cpp can run: which tensors a graph has, and how many experts a layer may have and use per token.

llama.cpp reserves its compute graph from the number of tensors in the file and aborts the whole process, with no
exception to catch, when a graph does not fit. So these limits are known before a file is written.

Derivation, for architecture `llama` at llama.cpp 0c1e57098. Per layer, 48 + 2 k nodes are built for k used experts
(k >= 2) with flash attention off, which is the larger graph:

    norms 4, q/k/v products 3 and reshapes 3, rope 2, writing the cache 6, reading it 2,
    attention 9, output product 1, the two residual sums 2                                      = 32
    router 11 (product, softmax, argsort, view, reshape, get_rows, reshape, sum, clamp, div,
    reshape), expert input reshape 1, gate, up, SwiGLU, down 4, weighting 1                     = 17
    one view per used expert and one sum less than that                                         = 2 k - 1

plus one node per attention bias and four per expert-scale tensor; outside the layers there are 6 nodes and 7 inputs.
Two tests must hold:

1. every node and input is an object in a pool of `max(1024, 8 * n_tensor)` objects
   (https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-context.cpp#L2396,
   https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-graph.cpp#L1348);
2. nodes plus leaves (inputs, weights, two cache tensors per layer) fit the scheduler's hash table, whose size is the
   first listed prime that is not below that pool's size
   (https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-backend.cpp#L1979,
   https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml.c#L6640).

The first test gives 16 for files without biases, and more with them. The second binds where the pool is just below a
prime: without biases the limit is then 10 to 15, at 11, 12, 23 to 25, 45 to 50 and 90 to 102 layers.
Against 2940 real runs on a CPU (1 to 126 layers, with and without biases, scales, `rope_freqs` and an output matrix, at
the limit and one above it) the formula without `SPARE_LEAVES` was never wrong. Batch size does not change the graph;
from the source, neither does a GPU, apart from weights it duplicates, for which the spare leaves stand.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from moe2gguf.graphs import MIXTRAL, Graph

MORE_NODES = {
    "deepseek2": 24,
    "deepseek32": 32,
    "gemma4": 13,
    "glm-dsa": 32,
    "granitemoe": 4,
    "grok": 9,
    "hunyuan-moe": 2,
    "phimoe": 1,
}
"""Nodes per layer beyond Mixtral's and one per further tensor, of architectures that are not written here.

Measured by the largest count that llama.cpp 0c1e57098 runs: the other architectures that `prune` knows need none.
"""


def estimate_graph(architecture: str) -> Graph:
    """A graph with room for no more experts than that of another architecture has; its tensors are Mixtral's."""
    nodes = MIXTRAL.layer_nodes + MORE_NODES.get(architecture, 0)
    return replace(MIXTRAL, architecture=architecture, layer_nodes=nodes)


MAX_EXPERTS = 1024
"""LLAMA_MAX_EXPERTS (https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-hparams.h#L12). Older builds stop
at 512, 256, 128 or 60 (https://github.com/ggml-org/llama.cpp/issues/11378)."""

POOL_MINIMUM = 1024
POOL_PER_TENSOR = 8
HASH_SIZES = (1031, 2053, 4099, 8209, 16411, 32771, 65537, 131101)
"""The primes of ggml's hash tables, from the one above `POOL_MINIMUM` on."""

GLOBAL_TENSORS = 2
"""Embedding and output norm; an output matrix and `rope_freqs` may follow."""

_ROUTER = re.compile(r"blk\.(\d{1,9})\.ffn_gate_inp\.weight")

GLOBAL_NODES = 6
SCALE_NODES = 4
NORM_NODES = 2
NODES_PER_EXPERT = 2
SPARE_LEAVES = 4
"""Copies of the tied output matrix and of `rope_freqs` that a GPU build makes: a slot each, on up to four devices."""


@dataclass(frozen=True)
class Setting:
    """A way to run llama.cpp: its name in messages, its nodes per layer beyond a graph's own, its inputs."""

    name: str
    more_nodes: int
    inputs: int


DEFAULT = Setting("default settings", more_nodes=0, inputs=7)
"""One key/value stream, unquantized cache, flash attention off or on (on needs 3 to 5 nodes less). With flash attention
on, several streams (`llama-perplexity`) need at most one less and fit as well."""

SEPARATE_STREAMS = Setting("flash attention off and a cache per sequence (llama-perplexity -fa off)", 1, 7)
QUANTIZED_CACHE = Setting("a quantized key/value cache (-ctk q8_0 -ctv q8_0)", more_nodes=9, inputs=9)
"""Rotations before and after attention, where the head size is a multiple of 64
(https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-kv-cache.cpp#L321); worst case of several streams."""


@dataclass(frozen=True)
class Size:
    """What the room of a graph depends on.

    n_layer   transformer blocks; at least 1
    n_tensor  all tensors of the file; attention biases are what exceeds `Graph.layer_tensors`
    n_scale   optional expert-scale tensors per layer (`ffn_down_exps.scale` ...), 0 to 3
    n_norm    norms of heads per layer (`attn_q_norm`, `attn_k_norm`), 0 to 2
    graph     the target graph
    n_dense   leading layers without experts
    """

    n_layer: int
    n_tensor: int
    n_scale: int = 0
    n_norm: int = 0
    graph: Graph = MIXTRAL
    n_dense: int = 0

    @classmethod
    def of(cls, names: Collection[str], n_layer: int, graph: Graph = MIXTRAL) -> Size:
        """The size of a file with tensors of these names; `n_layer` below 1 counts as 1."""
        n_dense = find_first_router(names)
        first = [name for name in names if name.startswith(f"blk.{n_dense}.")]
        n_scale = sum(name.endswith("_exps.scale") for name in first)
        n_norm = sum(name.endswith(("attn_q_norm.weight", "attn_k_norm.weight")) for name in first)
        return cls(max(1, n_layer), len(names), n_scale, n_norm, graph, n_dense)


def find_first_router(names: Collection[str]) -> int:
    """Return the number of the first layer that has a router, 0 where none has: the layers before it are dense."""
    return min((int(match[1]) for name in names if (match := _ROUTER.fullmatch(name))), default=0)


def max_experts_used(size: Size, setting: Setting = DEFAULT) -> int:
    """Return the most experts per token that llama.cpp runs under `setting`, a shared one apart; one more may abort it.

    The result is exact in nearly all shapes and never too high. `SPARE_LEAVES` can make it 1 too low; below three
    layers, where an output matrix cannot be told from a bias, it can be 2 too low (of more than 200).
    """
    pool = max(POOL_MINIMUM, POOL_PER_TENSOR * size.n_tensor)
    # A dense layer counts as one with experts: it has fewer nodes, and may have no fewer biases.
    with_experts = size.n_tensor + size.n_dense * size.graph.more_with_experts
    per_layer = (with_experts - GLOBAL_TENSORS) // size.n_layer
    n_bias = max(0, per_layer - size.graph.layer_tensors - size.n_scale - size.n_norm)
    nodes = size.graph.layer_nodes + setting.more_nodes + n_bias
    nodes += SCALE_NODES * size.n_scale + NORM_NODES * size.n_norm
    fixed = size.n_layer * nodes + GLOBAL_NODES + setting.inputs
    leaves = size.n_tensor + 2 * size.n_layer + min(size.n_layer, SPARE_LEAVES)
    room = min(pool, _hash_size(pool) - leaves) - fixed
    return max(0, min(MAX_EXPERTS, room // (NODES_PER_EXPERT * size.n_layer)))


def check_expert_counts(n_expert: int, n_expert_used: int, size: Size, n_shared: int = 0) -> list[str]:
    """Return every reason, as a sentence with its fix, why llama.cpp cannot run these counts; empty if it can.

    Both counts contain the `n_shared` experts that are one shared expert in the file, in a graph that has such.
    """
    refusals = []
    limit = max_experts_used(size) + n_shared
    if n_expert < 1:
        refusals.append(f"{n_expert} experts: a layer needs at least 1.")
    if n_expert - n_shared > MAX_EXPERTS:
        refusals.append(
            f"{n_expert} experts: llama.cpp loads at most {MAX_EXPERTS} per layer (older builds 60 to 512) and aborts "
            f"above. Make {MAX_EXPERTS} or fewer."
        )
    if n_expert_used < 1:
        refusals.append(f"{n_expert_used} experts per token: at least 1 must run.")
    elif n_expert_used <= n_shared:
        refusals.append(
            f"{n_expert_used} experts per token: the {n_shared} shared ones always run, and at least one more must. "
            f"Use {n_shared + 1} or more."
        )
    if n_expert_used > n_expert >= 1:
        most = min(n_expert, limit)
        refusals.append(f"{n_expert_used} experts per token: there are only {n_expert}. Use {most} or fewer.")
    elif n_expert_used > limit:
        refusals.append(
            f"{n_expert_used} experts per token: llama.cpp can run {limit} in this model of {size.n_layer} layers and "
            f"{size.n_tensor} tensors. Its graph has room for about {POOL_PER_TENSOR} nodes per tensor and each used "
            f"expert costs {NODES_PER_EXPERT} per layer; above the limit the process aborts. Use {limit} or fewer."
        )
    return refusals


def expert_count_warnings(n_expert_used: int, size: Size, n_shared: int = 0) -> list[str]:
    """Return a sentence per common setting, other than the default, under which llama.cpp would abort.

    The counts are those of `check_expert_counts`.
    """
    limits = {
        setting.name: max_experts_used(size, setting) + n_shared for setting in (SEPARATE_STREAMS, QUANTIZED_CACHE)
    }
    return [
        f"{n_expert_used} experts per token: with {name} llama.cpp can run {limit} in this model and aborts above. "
        f"Use {limit} or fewer if you run it that way."
        for name, limit in limits.items()
        if n_expert_used > limit
    ]


def _hash_size(pool: int) -> int:
    """Slots of the scheduler's table; beyond the listed primes (16384 tensors) no slot is promised past the pool."""
    return next((size for size in HASH_SIZES if size >= pool), pool)
