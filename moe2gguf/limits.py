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

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from moe2gguf.spec import Dimensions, MetadataValue, Model


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
    ending    "bias" for a tensor `NAME.bias` that is no companion of a weight
    """

    name: str
    shape: tuple[str, ...]
    when: Literal["always", "dense", "experts", "fused", "split"] = "always"
    required: bool = True
    bias: bool = False
    scales: bool = False
    f32: bool = False
    ending: str = "weight"


@dataclass(frozen=True)
class Graph:
    """A graph that llama.cpp builds for a file: the file's architecture, and every tensor and key that it needs.

    gating          the weight of a chosen expert: its part of the chosen ones' softmax ("renormalized", which depends
                    on how many are chosen), its sigmoid, or its part of the softmax over all experts
    keys            what the graph must be told besides counts and widths, without the architecture's prefix
    rotates_halves  the rotary embedding turns element j of a head with j + d_head / 2, as Hugging Face's models do, and
                    not with its neighbor
    layer_nodes     nodes per layer besides the used experts', flash attention off: see above
    since           when llama.cpp got the graph
    hf_class        the class of transformers that computes the same, if there is one
    """

    architecture: str
    tensors: tuple[GraphTensor, ...]
    gating: Literal["renormalized", "sigmoid", "softmax"] = "renormalized"
    keys: Mapping[str, MetadataValue] = field(default_factory=dict)
    rotates_halves: bool = False
    layer_nodes: int = 48
    since: str = ""
    hf_class: str | None = None

    @property
    def has_shared(self) -> bool:
        """Whether the graph has a shared expert of its own, beside those that the router chooses."""
        return any("_shexp" in tensor.name for tensor in self.tensors)

    @property
    def has_selection_bias(self) -> bool:
        """Whether a bias is added to what the router finds when experts are chosen, and not when they are weighed."""
        return _SELECTION_BIAS in self.tensors

    @property
    def layer_tensors(self) -> int:
        """Tensors of a layer with experts; all others are biases, norms of heads or scales."""
        return sum("{i}" in one.name and one.required and one.when not in ("dense", "fused") for one in self.tensors)

    def shape_of(self, name: str) -> tuple[str, ...]:
        """The shape of a weight or bias, by its full name with `{i}` for the layer."""
        stem, _, ending = name.rpartition(".")
        shape = next(tensor.shape for tensor in self.tensors if tensor.name == stem)
        return shape if ending == "weight" else shape[:1]

    def rename(self, name: str) -> str:
        """The name here of a tensor of the graph `mixtral`: a layer's second norm may be called otherwise."""
        here = {tensor.name for tensor in self.tensors}
        return name if "blk.{i}.ffn_norm" in here else name.replace(".ffn_norm.", ".post_attention_norm.")

    @property
    def weight_scale(self) -> float:
        """What the weights of chosen experts are multiplied by."""
        return float(str(self.keys.get("expert_weights_scale", 1.0)))

    def weight_of_expert(self, n_routed: int) -> float:
        """The weight of a chosen expert at a router of zeros, whatever the number of chosen ones is.

        Raises:
            ValueError: it depends on that number.
        """
        if self.gating == "renormalized":
            raise ValueError(f"{self.architecture}: the weight of an expert depends on how many are used")
        return self.weight_scale * (0.5 if self.gating == "sigmoid" else 1 / n_routed)


_GLOBALS = (
    GraphTensor("token_embd", ("n_vocab", "d_model")),
    GraphTensor("output_norm", ("d_model",)),
    GraphTensor("output", ("n_vocab", "d_model"), required=False, scales=True),
)
_ATTENTION = (
    GraphTensor("blk.{i}.attn_norm", ("d_model",)),
    GraphTensor("blk.{i}.attn_q", ("d_q", "d_model"), "split", bias=True, scales=True),
    GraphTensor("blk.{i}.attn_k", ("d_kv", "d_model"), "split", bias=True, scales=True),
    GraphTensor("blk.{i}.attn_v", ("d_kv", "d_model"), "split", bias=True, scales=True),
    GraphTensor("blk.{i}.attn_qkv", ("d_q+2*d_kv", "d_model"), "fused", bias=True, scales=True),
)
_ROPE_FACTORS = (
    GraphTensor("rope_freqs", ("d_head/2",), required=False, f32=True),
    GraphTensor("rope_factors_long", ("d_head/2",), required=False, f32=True),
    GraphTensor("rope_factors_short", ("d_head/2",), required=False, f32=True),
)
_HEAD_NORMS = (
    GraphTensor("blk.{i}.attn_q_norm", ("d_head",), required=False),
    GraphTensor("blk.{i}.attn_k_norm", ("d_head",), required=False),
)
_EXPERTS = (
    GraphTensor("blk.{i}.ffn_gate_inp", ("n_expert", "d_model"), "experts", f32=True),
    GraphTensor("blk.{i}.ffn_gate_exps", ("n_expert", "d_expert", "d_model"), "experts", scales=True),
    GraphTensor("blk.{i}.ffn_up_exps", ("n_expert", "d_expert", "d_model"), "experts", scales=True),
    GraphTensor("blk.{i}.ffn_down_exps", ("n_expert", "d_model", "d_expert"), "experts", scales=True),
)
_SHARED_EXPERT = (
    GraphTensor("blk.{i}.ffn_gate_shexp", ("d_shared", "d_model"), "experts"),
    GraphTensor("blk.{i}.ffn_up_shexp", ("d_shared", "d_model"), "experts"),
    GraphTensor("blk.{i}.ffn_down_shexp", ("d_model", "d_shared"), "experts"),
)
_SELECTION_BIAS = GraphTensor("blk.{i}.exp_probs_b", ("n_expert",), "experts", f32=True, ending="bias")


def _dense_mlp(*, extras: bool) -> tuple[GraphTensor, ...]:
    """The MLP of a layer without experts; with `extras` it may have biases and scales."""
    shapes = {"gate": ("d_ff", "d_model"), "up": ("d_ff", "d_model"), "down": ("d_model", "d_ff")}
    return tuple(
        GraphTensor(f"blk.{{i}}.ffn_{role}", shape, "dense", bias=extras, scales=extras)
        for role, shape in shapes.items()
    )


GRAPHS = {
    "mixtral": Graph(
        "llama",
        (
            *_GLOBALS,
            *_ROPE_FACTORS,
            *_ATTENTION,
            GraphTensor("blk.{i}.attn_output", ("d_model", "d_q"), bias=True, scales=True),
            GraphTensor("blk.{i}.ffn_norm", ("d_model",)),
            *_dense_mlp(extras=True),
            *_EXPERTS,
        ),
        since="December 2023",
        hf_class="MixtralForCausalLM",
    ),
    "glm4moe": Graph(
        "glm4moe",
        (
            *_GLOBALS,
            *_ATTENTION,
            *_HEAD_NORMS,
            GraphTensor("blk.{i}.attn_output", ("d_model", "d_q"), scales=True),
            GraphTensor("blk.{i}.post_attention_norm", ("d_model",)),
            *_dense_mlp(extras=False),
            *_EXPERTS,
            _SELECTION_BIAS,
            *_SHARED_EXPERT,
        ),
        gating="sigmoid",
        keys={"expert_gating_func": 2, "expert_weights_norm": False, "expert_weights_scale": 2.0},
        rotates_halves=True,
        layer_nodes=50,
        since="August 2025",
        hf_class="Glm4MoeForCausalLM",
    ),
    "deepseek": Graph(
        "deepseek",
        (
            *_GLOBALS,
            *_ATTENTION,
            GraphTensor("blk.{i}.attn_output", ("d_model", "d_q"), scales=True),
            GraphTensor("blk.{i}.ffn_norm", ("d_model",)),
            *_dense_mlp(extras=False),
            *_EXPERTS,
            *_SHARED_EXPERT,
        ),
        gating="softmax",
        layer_nodes=48,
        since="December 2024",
    ),
}
"""Every target graph, as llama.cpp has it.

* `mixtral`: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/models/llama.cpp#L39-L91 and, for the scales,
  https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-model.cpp#L1635. Biases of q, k and v are known beside
  a fused matrix too.
* `glm4moe`: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/models/glm4-moe.cpp. It has no rotary factors and
  no bias of the attention's output.
* `deepseek`: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/models/deepseek.cpp. Its q and o are d_model
  wide. `expert_weights_scale` is left out, since older builds do not read it: what the softmax divides by is multiplied
  into the down projections of the routed experts.
"""

MIXTRAL = GRAPHS["mixtral"]

DENSE_GRAPHS = {
    "llama": MIXTRAL,
    "qwen2": replace(MIXTRAL, architecture="qwen2", rotates_halves=True),
    "qwen3": replace(MIXTRAL, architecture="qwen3", tensors=(*MIXTRAL.tensors, *_HEAD_NORMS), rotates_halves=True),
}
"""The graphs of dense files, by architecture; qwen2 and qwen3 have no experts.

https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/models/qwen2.cpp and
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/models/qwen3.cpp
"""


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


def find_graph_of(model: Model) -> Graph:
    """The graph that computes `model` as it is."""
    if model.n_shared:
        return GRAPHS["glm4moe"]
    return DENSE_GRAPHS["qwen3" if model.head_norms else "llama"]


def graph_sizes(m: Model | Dimensions) -> dict[str, int]:
    """The value of every name in a shape: `d_q` and `d_kv` are the widths of all query and all key heads.

    In the graph `mixtral` a checkpoint's `d_ff` is that of one expert where there are experts.
    """
    d_q, d_kv = m.n_head * m.d_head, m.n_head_kv * m.d_head
    d_expert = m.d_expert or m.d_ff
    d_shared = m.d_shared if isinstance(m, Dimensions) else m.n_shared * d_expert
    return {
        "n_vocab": m.n_vocab,
        "d_model": m.d_model,
        "d_ff": m.d_ff,
        "2*d_ff": 2 * m.d_ff,
        "d_expert": d_expert,
        "d_shared": d_shared,
        "d_q": d_q,
        "d_kv": d_kv,
        "d_q+2*d_kv": d_q + 2 * d_kv,
        "d_head": m.d_head,
        "d_head/2": m.d_head // 2,
        "n_expert": m.n_expert,
    }


EXPERT_COMMANDS = "inspect, expert-usage, set-used, prune, quantize, imatrix, compare and bench"
"""What works on GGUF files with experts of other origin too."""

MAX_EXPERTS = 1024
"""LLAMA_MAX_EXPERTS (https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-hparams.h#L12). Older builds stop
at 512, 256, 128 or 60 (https://github.com/ggml-org/llama.cpp/issues/11378)."""

POOL_MINIMUM = 1024
POOL_PER_TENSOR = 8
HASH_SIZES = (1031, 2053, 4099, 8209, 16411, 32771, 65537, 131101)
"""The primes of ggml's hash tables, from the one above `POOL_MINIMUM` on."""

GLOBAL_TENSORS = 2
"""Embedding and output norm; an output matrix and `rope_freqs` may follow."""

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

    n_layer   transformer blocks, all of them with experts; at least 1
    n_tensor  all tensors of the file; attention biases are what exceeds `Graph.layer_tensors`
    n_scale   optional expert-scale tensors per layer (`ffn_down_exps.scale` ...), 0 to 3
    n_norm    norms of heads per layer (`attn_q_norm`, `attn_k_norm`), 0 to 2
    graph     the target graph
    """

    n_layer: int
    n_tensor: int
    n_scale: int = 0
    n_norm: int = 0
    graph: Graph = MIXTRAL

    @classmethod
    def of(cls, names: Collection[str], n_layer: int, graph: Graph = MIXTRAL) -> Size:
        """The size of a file with tensors of these names; `n_layer` below 1 counts as 1."""
        first = [name for name in names if name.startswith("blk.0.")]
        n_scale = sum(name.endswith("_exps.scale") for name in first)
        n_norm = sum(name.endswith(("attn_q_norm.weight", "attn_k_norm.weight")) for name in first)
        return cls(max(1, n_layer), len(names), n_scale, n_norm, graph)


def max_experts_used(size: Size, setting: Setting = DEFAULT) -> int:
    """Return the most experts per token that llama.cpp runs under `setting`, a shared one apart; one more may abort it.

    The result is exact in nearly all shapes and never too high. `SPARE_LEAVES` can make it 1 too low; below three
    layers, where an output matrix cannot be told from a bias, it can be 2 too low (of more than 200).
    """
    pool = max(POOL_MINIMUM, POOL_PER_TENSOR * size.n_tensor)
    per_layer = (size.n_tensor - GLOBAL_TENSORS) // size.n_layer
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
        refusals.append(f"{n_expert_used} experts per token: there are only {n_expert}. Use {n_expert} or fewer.")
    if n_expert_used > limit:
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
