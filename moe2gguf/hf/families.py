"""The supported model families, as data.

A family says which tensors a checkpoint must hold, under which names and shapes, and where each goes in the GGUF file.
Adding a family means adding a row to `FAMILIES`; an architecture that cannot be written gets a row in `REFUSED`.

Targets and their shapes are those of the graph `qwen3` in `moe2gguf.graphs`, which has every tensor of these families.
"""

import re
from dataclasses import dataclass

from moe2gguf.graphs import DENSE_GRAPHS, MIXTRAL, graph_sizes
from moe2gguf.spec import Model


@dataclass(frozen=True)
class Rule:
    """One tensor outside the MLP: its name in the GGUF file and in the checkpoint.

    `{i}` stands for the layer. `permute` names the head count by which rotary halves become rotary pairs.
    `when` names a field of `Model` that must be true for the tensor to exist.
    """

    target: str
    source: str
    permute: str = ""
    when: str = ""

    @property
    def shape(self) -> tuple[str, ...]:
        """Names of its dimensions, the same in both files."""
        return DENSE_GRAPHS["qwen3"].shape_of(self.target)


@dataclass(frozen=True)
class MLP:
    """One layout of the MLP tensors: role -> (source name, shape). `{e}` stands for the expert."""

    tensors: dict[str, tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Family:
    """A row of the table: what is special about one `architectures` entry of config.json."""

    architecture: str
    mlp: tuple[MLP, ...]
    config_flags: tuple[tuple[str, str], ...] = ()  # (field of Model, key of config.json), default false
    always: tuple[str, ...] = ()  # fields of Model that are always true
    d_head: int | None = None  # the same for head_dim; None: the width divided by the heads
    rope_theta: float = 10000.0  # the class default in transformers, used where config.json has no rope_theta


EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_LAYER = "model.layers.{i}."

BASE: tuple[Rule, ...] = (
    Rule("token_embd.weight", EMBEDDING),
    Rule("blk.{i}.attn_norm.weight", _LAYER + "input_layernorm.weight"),
    Rule("blk.{i}.attn_q.weight", _LAYER + "self_attn.q_proj.weight", permute="n_head"),
    Rule("blk.{i}.attn_q.bias", _LAYER + "self_attn.q_proj.bias", permute="n_head", when="bias_qkv"),
    Rule("blk.{i}.attn_q_norm.weight", _LAYER + "self_attn.q_norm.weight", when="head_norms"),
    Rule("blk.{i}.attn_k.weight", _LAYER + "self_attn.k_proj.weight", permute="n_head_kv"),
    Rule("blk.{i}.attn_k.bias", _LAYER + "self_attn.k_proj.bias", permute="n_head_kv", when="bias_qkv"),
    Rule("blk.{i}.attn_k_norm.weight", _LAYER + "self_attn.k_norm.weight", when="head_norms"),
    Rule("blk.{i}.attn_v.weight", _LAYER + "self_attn.v_proj.weight"),
    Rule("blk.{i}.attn_v.bias", _LAYER + "self_attn.v_proj.bias", when="bias_qkv"),
    Rule("blk.{i}.attn_output.weight", _LAYER + "self_attn.o_proj.weight"),
    Rule("blk.{i}.attn_output.bias", _LAYER + "self_attn.o_proj.bias", when="bias_output"),
    Rule("blk.{i}.ffn_norm.weight", _LAYER + "post_attention_layernorm.weight"),
    Rule("output_norm.weight", "model.norm.weight"),
    Rule("output.weight", HEAD, when="untied_embeddings"),
)
"""Every tensor of the supported families that is not part of an MLP."""

DENSE = MLP(
    {
        role: (_LAYER + f"mlp.{role}_proj.weight", MIXTRAL.shape_of(f"blk.{{i}}.ffn_{role}.weight"))
        for role in ("gate", "up", "down")
    }
)

_MOE = _LAYER + "block_sparse_moe."

MIXTRAL_PER_EXPERT = MLP(
    {
        "router": (_MOE + "gate.weight", ("n_expert", "d_model")),
        "gate": (_MOE + "experts.{e}.w1.weight", ("d_ff", "d_model")),
        "up": (_MOE + "experts.{e}.w3.weight", ("d_ff", "d_model")),
        "down": (_MOE + "experts.{e}.w2.weight", ("d_model", "d_ff")),
    }
)

MIXTRAL_FUSED = MLP(
    {
        "router": (_LAYER + "mlp.gate.weight", ("n_expert", "d_model")),
        "gate_up": (_LAYER + "mlp.experts.gate_up_proj", ("n_expert", "2*d_ff", "d_model")),
        "down": (_LAYER + "mlp.experts.down_proj", ("n_expert", "d_model", "d_ff")),
    }
)

_SHARED = _LAYER + "mlp.shared_experts."

GLM4_PER_EXPERT = MLP(
    {
        "router": (_LAYER + "mlp.gate.weight", ("n_expert", "d_model")),
        "bias": (_LAYER + "mlp.gate.e_score_correction_bias", ("n_expert",)),
        "gate": (_LAYER + "mlp.experts.{e}.gate_proj.weight", ("d_expert", "d_model")),
        "up": (_LAYER + "mlp.experts.{e}.up_proj.weight", ("d_expert", "d_model")),
        "down": (_LAYER + "mlp.experts.{e}.down_proj.weight", ("d_model", "d_expert")),
        "shared_gate": (_SHARED + "gate_proj.weight", ("d_shared", "d_model")),
        "shared_up": (_SHARED + "up_proj.weight", ("d_shared", "d_model")),
        "shared_down": (_SHARED + "down_proj.weight", ("d_model", "d_shared")),
    }
)

FOLDER_FORMS = {"mixtral": MIXTRAL_PER_EXPERT, "glm4moe": GLM4_PER_EXPERT}
"""The targets that transformers has a class for, and how that names the tensors of an MLP with experts."""

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        # LLaMA 1, 2, 3, 3.x, SmolLM2, TinyLlama, and everything else that uses this class
        Family(
            "LlamaForCausalLM",
            (DENSE,),
            config_flags=(("bias_qkv", "attention_bias"), ("bias_output", "attention_bias")),
        ),
        Family("MistralForCausalLM", (DENSE,)),
        Family("Qwen2ForCausalLM", (DENSE,), always=("bias_qkv",)),
        Family("Qwen3ForCausalLM", (DENSE,), always=("head_norms",), d_head=128),
        Family("MixtralForCausalLM", (MIXTRAL_PER_EXPERT, MIXTRAL_FUSED), rope_theta=1e6),
        # only such as moe2gguf writes: see `moe2gguf.hf.config.read_shared`
        Family(
            "Glm4MoeForCausalLM",
            (GLM4_PER_EXPERT,),
            config_flags=(("bias_qkv", "attention_bias"), ("head_norms", "use_qk_norm")),
        ),
    )
}

_QK_NORM = "its attention normalizes queries and keys, which llama.cpp's arch `llama` has no tensors for"

REFUSED: dict[str, str] = {
    "OlmoForCausalLM": "its layer norms have no weights and it may clip q/k/v",
    "Olmo2ForCausalLM": _QK_NORM,
    "Gemma3ForCausalLM": _QK_NORM,
    "GemmaForCausalLM": "its MLP uses GELU, and its norms and embedding are scaled",
    "Gemma2ForCausalLM": "its MLP uses GELU, and it has extra norms and logit caps",
    "PhiForCausalLM": "its MLP has no gate projection",
    "Phi3ForCausalLM": "its projections are fused (qkv_proj, gate_up_proj)",
    "GPT2LMHeadModel": "its MLP has no gate projection and it has no rotary embedding",
    "GPTNeoXForCausalLM": "its MLP has no gate projection",
    "FalconForCausalLM": "its MLP has no gate projection",
    "StableLmForCausalLM": "it uses LayerNorm and rotates only part of each head",
    "CohereForCausalLM": "it uses LayerNorm, a parallel block and a logit scale",
    "GraniteForCausalLM": "it scales embeddings, residuals, attention and logits",
    "SmolLM3ForCausalLM": "some of its layers have no rotary embedding",
    "MllamaForConditionalGeneration": "it is multimodal: cross-attention layers do not exist in arch `llama`",
}
"""Dense architectures people try, and why each does not fit the target graph; `mixtures` has those with experts."""

_IGNORED = re.compile(
    r"(.+\.)?(rotary_emb\.((original_)?inv_freq|(cos|sin)(_cached)?|freqs_cis)"
    r"|(self_attn|attention|attn)\.(bias|masked_bias|causal_mask)|position_ids)"
)


def is_ignored(source: str) -> bool:
    """True for tensors that follow from config.json: rotary frequencies, cosines and sines, masks, numbers of places.

    transformers leaves them out as well (`_keys_to_ignore_on_load_unexpected` of its models).
    """
    return _IGNORED.fullmatch(source) is not None


def is_derived(model: Model | None, name: str) -> bool:
    """True for tensors that carry no numbers of their own: they are computed, or the head of tied embeddings."""
    return is_ignored(name) or (model is not None and model.tied_embeddings and name == HEAD)


@dataclass(frozen=True)
class MLPPlace:
    """Stands in `lay_out_tensors` where the tensors of layer `i`'s MLP belong."""

    i: int


def lay_out_tensors(model: Model) -> list[tuple[Rule, int | None] | MLPPlace]:
    """List what `model` has in file order: the rules that apply, those of layers once per layer, each MLP's place."""
    applicable = [rule for rule in BASE if not rule.when or holds(model, rule.when)]
    before = [rule for rule in applicable if "{i}" not in rule.target and not rule.target.startswith("output")]
    layers = [rule for rule in applicable if "{i}" in rule.target]
    after = [rule for rule in applicable if rule.target.startswith("output")]
    places: list[tuple[Rule, int | None] | MLPPlace] = [(rule, None) for rule in before]
    for i in range(model.n_layer):
        places += [*((rule, i) for rule in layers), MLPPlace(i)]
    return [*places, *((rule, None) for rule in after)]


def list_rules(model: Model) -> list[tuple[Rule, int | None]]:
    """Return the rules that apply to `model`, in file order, without the MLPs."""
    return [place for place in lay_out_tensors(model) if not isinstance(place, MLPPlace)]


def holds(model: Model, condition: str) -> bool:
    """Return whether a rule's `when` is true for `model`."""
    if condition == "untied_embeddings":
        return not model.tied_embeddings
    return bool(getattr(model, condition))


def find_layout(mlp: MLP, model: Model, i: int) -> MLP:
    """Return the layout of layer `i`'s MLP in a model that has the layout `mlp` behind its dense layers."""
    return DENSE if i < model.leading_dense else mlp


def list_mlp_tensors(mlp: MLP, model: Model) -> dict[str, tuple[str, ...]]:
    """Source name -> shape (names) of every MLP tensor of the whole model, in layer and expert order."""
    result = {}
    for i in range(model.n_layer):
        for source, shape in find_layout(mlp, model, i).tensors.values():
            experts = range(model.n_expert) if "{e}" in source else (0,)
            result.update({source.format(i=i, e=e): shape for e in experts})
    return result


def list_expected_shapes(model: Model, mlp: MLP) -> dict[str, tuple[str, ...]]:
    """Source name -> shape (names) of every tensor the checkpoint must hold."""
    return {rule.source.format(i=i): rule.shape for rule, i in list_rules(model)} | list_mlp_tensors(mlp, model)


def list_expected_tensors(model: Model, mlp: MLP) -> dict[str, tuple[int, ...]]:
    """Source name -> shape of every tensor the checkpoint must hold."""
    size = graph_sizes(model)
    return {name: tuple(size[d] for d in shape) for name, shape in list_expected_shapes(model, mlp).items()}
