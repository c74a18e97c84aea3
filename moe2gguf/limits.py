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

from dataclasses import dataclass
from typing import Literal

from moe2gguf.spec import Dimensions, Model

MAX_EXPERTS = 1024
"""LLAMA_MAX_EXPERTS (https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-hparams.h#L12). Older builds stop
at 512, 256, 128 or 60 (https://github.com/ggml-org/llama.cpp/issues/11378)."""

POOL_MINIMUM = 1024
POOL_PER_TENSOR = 8
HASH_SIZES = (1031, 2053, 4099, 8209, 16411, 32771, 65537, 131101)
"""The primes of ggml's hash tables, from the one above `POOL_MINIMUM` on."""

LAYER_TENSORS = 10
"""Tensors of a MoE layer: two norms, q, k, v, output, router, gate, up, down. All others are biases or scales."""

GLOBAL_TENSORS = 2
"""Embedding and output norm; an output matrix and `rope_freqs` may follow."""

GLOBAL_NODES = 6
SCALE_NODES = 4
NODES_PER_EXPERT = 2
SPARE_LEAVES = 4
"""Copies of the tied output matrix and of `rope_freqs` that a GPU build makes: a slot each, on up to four devices."""


@dataclass(frozen=True)
class Setting:
    """A way to run llama.cpp: its name in messages, its nodes per layer besides the used experts', its inputs."""

    name: str
    layer_nodes: int
    inputs: int


DEFAULT = Setting("default settings", layer_nodes=48, inputs=7)
"""One key/value stream, unquantized cache, flash attention off or on (on needs 43 to 45 nodes). With flash attention
on, several streams (`llama-perplexity`) need at most 47 and fit as well."""

SEPARATE_STREAMS = Setting("flash attention off and a cache per sequence (llama-perplexity -fa off)", 49, 7)
QUANTIZED_CACHE = Setting("a quantized key/value cache (-ctk q8_0 -ctv q8_0)", layer_nodes=57, inputs=9)
"""Rotations before and after attention, where the head size is a multiple of 64
(https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-kv-cache.cpp#L321); worst case of several streams."""


def max_experts_used(*, n_layer: int, n_tensor: int, n_scale: int = 0, setting: Setting = DEFAULT) -> int:
    """Return the largest number of experts per token that llama.cpp runs under `setting`; one more may abort it.

    Args:
        n_layer: transformer blocks, all of them MoE; at least 1.
        n_tensor: all tensors of the file. Attention biases are what exceeds ten tensors per layer.
        n_scale: optional expert-scale tensors per layer (`ffn_down_exps.scale` ...), 0 to 3.
        setting: how llama.cpp is run.

    The result is exact in nearly all shapes and never too high. `SPARE_LEAVES` can make it 1 too low; below three
    layers, where an output matrix cannot be told from a bias, it can be 2 too low (of more than 200).
    """
    pool = max(POOL_MINIMUM, POOL_PER_TENSOR * n_tensor)
    n_bias = max(0, (n_tensor - GLOBAL_TENSORS) // n_layer - LAYER_TENSORS - n_scale)
    fixed = n_layer * (setting.layer_nodes + n_bias + SCALE_NODES * n_scale) + GLOBAL_NODES + setting.inputs
    leaves = n_tensor + 2 * n_layer + min(n_layer, SPARE_LEAVES)
    room = min(pool, _hash_size(pool) - leaves) - fixed
    return max(0, min(MAX_EXPERTS, room // (NODES_PER_EXPERT * n_layer)))


def check_expert_counts(
    n_expert: int, n_expert_used: int, *, n_layer: int, n_tensor: int, n_scale: int = 0
) -> list[str]:
    """Return every reason, as a sentence with its fix, why llama.cpp cannot run these counts; empty if it can.

    Args: see `max_experts_used`, which gives the limit under default settings.
    """
    refusals = []
    if n_expert < 1:
        refusals.append(f"{n_expert} experts: a layer needs at least 1.")
    if n_expert > MAX_EXPERTS:
        refusals.append(
            f"{n_expert} experts: llama.cpp loads at most {MAX_EXPERTS} per layer (older builds 60 to 512) and aborts "
            f"above. Make {MAX_EXPERTS} or fewer."
        )
    if n_expert_used < 1:
        refusals.append(f"{n_expert_used} experts per token: at least 1 must run.")
    if n_expert_used > n_expert >= 1:
        refusals.append(f"{n_expert_used} experts per token: there are only {n_expert}. Use {n_expert} or fewer.")
    limit = max_experts_used(n_layer=n_layer, n_tensor=n_tensor, n_scale=n_scale)
    if n_expert_used > limit:
        refusals.append(
            f"{n_expert_used} experts per token: llama.cpp can run {limit} in this model of {n_layer} layers and "
            f"{n_tensor} tensors. Its graph has room for about {POOL_PER_TENSOR} nodes per tensor and each used expert "
            f"costs {NODES_PER_EXPERT} per layer; above the limit the process aborts. Use {limit} or fewer."
        )
    return refusals


def expert_count_warnings(n_expert_used: int, *, n_layer: int, n_tensor: int, n_scale: int = 0) -> list[str]:
    """Return a sentence per common setting, other than the default, under which llama.cpp would abort.

    Args: see `max_experts_used`.
    """
    limits = {
        setting.name: max_experts_used(n_layer=n_layer, n_tensor=n_tensor, n_scale=n_scale, setting=setting)
        for setting in (SEPARATE_STREAMS, QUANTIZED_CACHE)
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


@dataclass(frozen=True)
class GraphTensor:
    """A tensor `NAME.weight` of a target graph, and what may come with it.

    name      `{i}` stands for the layer
    shape     in numpy order, names of the glossary in `moe2gguf.spec` and those of `graph_sizes`
    when      only for a dense MLP or for experts; of q, k and v only one fused matrix or three
    required  llama.cpp refuses a file without it
    bias      there may be a `NAME.bias`, one number per row
    scales    there may be a `NAME.scale` and a `NAME.input_scale`, one number per matrix
    f32       llama.cpp takes it only in F32
    """

    name: str
    shape: tuple[str, ...]
    when: Literal["always", "dense", "experts", "fused", "split"] = "always"
    required: bool = True
    bias: bool = False
    scales: bool = False
    f32: bool = False


@dataclass(frozen=True)
class Graph:
    """A graph that llama.cpp builds for a file: the file's architecture, and every tensor that it may have."""

    architecture: str
    tensors: tuple[GraphTensor, ...]

    def shape_of(self, name: str) -> tuple[str, ...]:
        """The shape of a weight or bias, by its full name with `{i}` for the layer."""
        stem, _, ending = name.rpartition(".")
        shape = next(tensor.shape for tensor in self.tensors if tensor.name == stem)
        return shape if ending == "weight" else shape[:1]


GRAPHS = {
    "mixtral": Graph(
        "llama",
        (
            GraphTensor("token_embd", ("n_vocab", "d_model")),
            GraphTensor("output_norm", ("d_model",)),
            GraphTensor("output", ("n_vocab", "d_model"), required=False, scales=True),
            GraphTensor("rope_freqs", ("d_head/2",), required=False, f32=True),
            GraphTensor("rope_factors_long", ("d_head/2",), required=False, f32=True),
            GraphTensor("rope_factors_short", ("d_head/2",), required=False, f32=True),
            GraphTensor("blk.{i}.attn_norm", ("d_model",)),
            GraphTensor("blk.{i}.attn_q", ("d_q", "d_model"), "split", bias=True, scales=True),
            GraphTensor("blk.{i}.attn_k", ("d_kv", "d_model"), "split", bias=True, scales=True),
            GraphTensor("blk.{i}.attn_v", ("d_kv", "d_model"), "split", bias=True, scales=True),
            GraphTensor("blk.{i}.attn_qkv", ("d_q+2*d_kv", "d_model"), "fused", bias=True, scales=True),
            GraphTensor("blk.{i}.attn_output", ("d_model", "d_q"), bias=True, scales=True),
            GraphTensor("blk.{i}.ffn_norm", ("d_model",)),
            GraphTensor("blk.{i}.ffn_gate", ("d_ff", "d_model"), "dense", bias=True, scales=True),
            GraphTensor("blk.{i}.ffn_up", ("d_ff", "d_model"), "dense", bias=True, scales=True),
            GraphTensor("blk.{i}.ffn_down", ("d_model", "d_ff"), "dense", bias=True, scales=True),
            GraphTensor("blk.{i}.ffn_gate_inp", ("n_expert", "d_model"), "experts", f32=True),
            GraphTensor("blk.{i}.ffn_gate_exps", ("n_expert", "d_ff", "d_model"), "experts", scales=True),
            GraphTensor("blk.{i}.ffn_up_exps", ("n_expert", "d_ff", "d_model"), "experts", scales=True),
            GraphTensor("blk.{i}.ffn_down_exps", ("n_expert", "d_model", "d_ff"), "experts", scales=True),
        ),
    )
}
"""Every target graph. `mixtral`: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/models/llama.cpp#L39-L91 and,
for the scales, https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-model.cpp#L1635. Biases of q, k and v are
known beside a fused matrix too; a `d_ff` is that of one expert where there are experts."""


def graph_sizes(m: Model | Dimensions) -> dict[str, int]:
    """The value of every name in a shape: `d_q` and `d_kv` are the widths of all query and all key heads."""
    d_q, d_kv = m.n_head * m.d_head, m.n_head_kv * m.d_head
    return {
        "n_vocab": m.n_vocab,
        "d_model": m.d_model,
        "d_ff": m.d_ff,
        "2*d_ff": 2 * m.d_ff,
        "d_q": d_q,
        "d_kv": d_kv,
        "d_q+2*d_kv": d_q + 2 * d_kv,
        "d_head/2": m.d_head // 2,
        "n_expert": m.n_expert,
    }
