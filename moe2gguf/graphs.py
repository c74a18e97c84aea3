"""The graphs of llama.cpp that files are written for: their architectures, tensors, keys and gating, as one table.

How many experts such a graph has room for is in `moe2gguf.limits`.
"""

from collections.abc import Mapping
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
    shared_key      the key with the shared expert's width: in experts (`expert_shared_count`) or in neurons
    empty_layer     one more layer is declared than the graph computes, and has no tensors: see `GRAPHS`
    leading_key     the key with the number of leading layers that are dense; None where a layer without a router is
    layer_nodes     nodes per layer besides the used experts', flash attention off: see above
    since           when llama.cpp got the graph
    hf_class        the class of transformers that computes the same, if there is one
    """

    architecture: str
    tensors: tuple[GraphTensor, ...]
    gating: Literal["renormalized", "sigmoid", "softmax"] = "renormalized"
    keys: Mapping[str, MetadataValue] = field(default_factory=dict)
    rotates_halves: bool = False
    shared_key: str = "expert_shared_count"
    empty_layer: bool = False
    leading_key: str | None = "leading_dense_block_count"
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
    def counts_shared(self) -> bool:
        """Whether the key with the shared expert's width counts experts, not neurons."""
        return self.shared_key == "expert_shared_count"

    @property
    def has_rotary_factors(self) -> bool:
        """Whether the graph divides the rotary frequencies, as LLaMA 3.1 and 3.2 need it."""
        return _ROPE_FACTORS[0] in self.tensors

    @property
    def needs_output(self) -> bool:
        """Whether a file must hold an output matrix, also where it is the embedding."""
        return any(tensor.name == "output" and tensor.required for tensor in self.tensors)

    @property
    def layer_tensors(self) -> int:
        """Tensors of a layer with experts; all others are biases, norms of heads or scales."""
        return sum("{i}" in one.name and one.required and one.when not in ("dense", "fused") for one in self.tensors)

    @property
    def more_with_experts(self) -> int:
        """How many tensors a layer with experts has more than one with a dense MLP."""
        return sum({"experts": 1, "dense": -1}.get(one.when, 0) for one in self.tensors if one.required)

    def shape_of(self, name: str) -> tuple[str, ...]:
        """The shape of a weight or bias, by its full name with `{i}` for the layer."""
        stem, _, ending = name.rpartition(".")
        shape = next(tensor.shape for tensor in self.tensors if tensor.name == stem)
        return shape if ending == "weight" else shape[:1]

    def rename(self, name: str) -> str:
        """The name here of a tensor of the graph `mixtral`: a layer's second norm may be called otherwise."""
        here = {tensor.name for tensor in self.tensors}
        return name if "blk.{i}.ffn_norm" in here else name.replace(".ffn_norm.", ".post_attention_norm.")

    def describe_layers(self, n_layer: int, d_head: int, theta: float) -> dict[str, MetadataValue]:
        """Return the keys of a graph with an empty layer that depend on the model; none of another graph."""
        if not self.empty_layer:
            return {}
        return {
            "block_count": n_layer + 1,
            "nextn_predict_layers": 1,
            "attention.sliding_window": 1,  # llama-server computes again what a longer one may still hold
            "attention.sliding_window_pattern": [0] * n_layer + [1],
            "rope.dimension_count": 2 * d_head,
            "rope.dimension_count_swa": d_head,
            "rope.freq_base_swa": theta,
        }

    def describe_leading_dense(self, n_dense: int) -> dict[str, MetadataValue]:
        """Return the key that says how many leading layers are dense, where some are and the graph reads one."""
        return {self.leading_key: n_dense} if n_dense and self.leading_key else {}

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
_OUTPUT = GraphTensor("blk.{i}.attn_output", ("d_model", "d_q"), scales=True)
_BIASED_OUTPUT = replace(_OUTPUT, bias=True)
_FFN_NORM = GraphTensor("blk.{i}.ffn_norm", ("d_model",))
_SECOND_NORM = replace(_FFN_NORM, name="blk.{i}.post_attention_norm")
_HEAD_NORMS = (
    GraphTensor("blk.{i}.attn_q_norm", ("d_head",), required=False),
    GraphTensor("blk.{i}.attn_k_norm", ("d_head",), required=False),
)
_DENSE_MLP = (
    GraphTensor("blk.{i}.ffn_gate", ("d_ff", "d_model"), "dense"),
    GraphTensor("blk.{i}.ffn_up", ("d_ff", "d_model"), "dense"),
    GraphTensor("blk.{i}.ffn_down", ("d_model", "d_ff"), "dense"),
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
_SIGMOID_EXPERTS = (*_EXPERTS, _SELECTION_BIAS, *_SHARED_EXPERT)
_DENSE_WITH_EXTRAS = tuple(replace(tensor, bias=True, scales=True) for tensor in _DENSE_MLP)

_PLAIN_SIGMOIDS: Mapping[str, MetadataValue] = {
    "expert_gating_func": 2,
    "expert_weights_norm": False,
    "expert_weights_scale": 2.0,
}

GRAPHS = {
    "mixtral": Graph(
        "llama",
        (*_GLOBALS, *_ROPE_FACTORS, *_ATTENTION, _BIASED_OUTPUT, _FFN_NORM, *_DENSE_WITH_EXTRAS, *_EXPERTS),
        since="December 2023",
        hf_class="MixtralForCausalLM",
    ),
    "glm4moe": Graph(
        "glm4moe",
        (*_GLOBALS, *_ATTENTION, *_HEAD_NORMS, _OUTPUT, _SECOND_NORM, *_DENSE_MLP, *_SIGMOID_EXPERTS),
        gating="sigmoid",
        keys=_PLAIN_SIGMOIDS,
        rotates_halves=True,
        layer_nodes=50,
        since="August 2025",
        hf_class="Glm4MoeForCausalLM",
    ),
    "deepseek": Graph(
        "deepseek",
        (*_GLOBALS, *_ATTENTION, _OUTPUT, _FFN_NORM, *_DENSE_MLP, *_EXPERTS, *_SHARED_EXPERT),
        gating="softmax",
        layer_nodes=48,
        since="December 2024",
    ),
    "step35": Graph(
        "step35",
        (
            *_GLOBALS[:2],
            replace(_GLOBALS[2], required=True),
            *_ROPE_FACTORS,
            *_ATTENTION,
            *_HEAD_NORMS,
            _OUTPUT,
            _FFN_NORM,
            *_DENSE_MLP,
            *_SIGMOID_EXPERTS,
        ),
        gating="sigmoid",
        keys=_PLAIN_SIGMOIDS,
        rotates_halves=True,
        shared_key="expert_shared_feed_forward_length",
        empty_layer=True,
        leading_key=None,
        layer_nodes=50,
        since="June 2026",
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
* `step35`: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/models/step35.cpp. It has rotary factors, but not
  in layers with a sliding window, and llama.cpp wants one such layer
  (https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-model.cpp#L2807). So a layer that predicts a second
  token is declared behind the others: it has the window and no tensors, and the graph does not compute it. The other
  layers rotate half of `rope.dimension_count`.
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
