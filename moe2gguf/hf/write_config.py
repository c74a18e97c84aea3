"""A model's hyper-parameters in the words of config.json, the inverse of `moe2gguf.hf.config.read_model`.

Both generations of readers find their keys: `rope_theta` and `rope_scaling` are understood by transformers 4 and 5 and
by vLLM.
"""

from typing import Any

from moe2gguf.graphs import GRAPHS
from moe2gguf.spec import Model, Rope

GROUPED_ROW_BYTES = 16
"""transformers' default way to compute experts (`grouped_mm`) wants the rows of every matrix to be a multiple of this.

https://github.com/pytorch/pytorch/blob/2295ac79eeea7cd69460598a018ea14eaef34f5c/aten/src/ATen/native/GroupedMMUtils.h
"""


def describe_config(model: Model) -> dict[str, Any]:
    """config.json of `model`, under the class that has its tensors, whatever class it came from.

    Glm4Moe where a shared expert is beside the others, Mixtral where there are experts alone, Qwen3 where heads are
    normalized, Qwen2 where q, k and v alone have biases, else LLaMA, which computes what Mistral does.
    """
    return {
        **_describe_class(model),
        "hidden_act": "silu",
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.n_head_kv,
        "head_dim": model.d_head,
        "max_position_embeddings": model.n_context,
        "rms_norm_eps": model.rms_epsilon,
        "rope_theta": model.rope.theta,
        "rope_scaling": _describe_rope(model.rope),
        "tie_word_embeddings": model.tied_embeddings,
        "vocab_size": model.n_vocab,
        "use_cache": True,
    }


def _describe_class(model: Model) -> dict[str, Any]:
    """Return the class, and the settings that only it has."""
    if model.n_shared:
        return _describe_glm4(model)
    if model.n_expert:
        counts = {"num_local_experts": model.n_expert, "num_experts_per_tok": model.n_expert_used}
        return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **counts}
    if model.head_norms:
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    if model.bias_qkv and not model.bias_output:
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    biases = {"attention_bias": model.bias_output, "mlp_bias": False}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **biases}


def _describe_glm4(model: Model) -> dict[str, Any]:
    """Return the class that computes the graph `glm4moe`, told to compute just that.

    https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/glm4_moe/configuration_glm4_moe.py
    """
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "attention_bias": model.bias_qkv,
        "use_qk_norm": model.head_norms,
        "partial_rotary_factor": 1.0,
        "moe_intermediate_size": model.d_expert,
        "n_routed_experts": model.n_expert,
        "n_shared_experts": model.n_shared,
        "num_experts_per_tok": model.n_expert_used,
        "norm_topk_prob": False,
        "routed_scaling_factor": GRAPHS["glm4moe"].keys["expert_weights_scale"],
        "first_k_dense_replace": model.leading_dense,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
    }


def _describe_rope(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "none":
        return None
    values: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.original_context:
        values["original_max_position_embeddings"] = rope.original_context
    if rope.kind == "llama3":
        values |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.attention_factor is not None:
        values["attention_factor"] = rope.attention_factor
    return values
