"""Why tensors of a folder are others than config.json says, where there is one reason for many of them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from moe2gguf.errors import list_names
from moe2gguf.graphs import graph_sizes
from moe2gguf.hf.families import (
    DENSE,
    EMBEDDING,
    HEAD,
    MLP,
    is_derived,
    is_ignored,
    list_expected_shapes,
    list_expected_tensors,
)
from moe2gguf.hf.safetensors import ADAPTER, DTYPES, StoredTensor
from moe2gguf.spec import Model

QUANTIZED_BY = {
    "bitsandbytes": (".absmax", ".quant_map", ".SCB", ".weight_format"),
    "GPTQ or AWQ": (".qweight", ".qzeros", ".g_idx"),
    "compressed-tensors or FP8": (".weight_packed", ".weight_scale", ".weight_scale_inv", ".input_scale"),
    "MLX": (".scales", ".biases"),
}
"""Which tool leaves tensors whose names end in this beside its packed weights."""

_WITHOUT = (
    "transformers leaves them out: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT) writes a folder that "
    "converts"
)
_KINDS = {
    r"(.+\.)?(vision_?|visual|image_?|audio_?|speech_?|mm_|multi_modal_)\w*\..+": "are of a part for pictures or "
    f"sound, which no GGUF file of a language model holds; {_WITHOUT}",
    r"(.+\.)?(v_head|value_head|reward_head|score|classifier)\..+": f"are of a head for values or classes; {_WITHOUT}",
    r"(.+\.)?(mtp|nextn|medusa|eagle)\w*\..+": f"predict further tokens (MTP), which is not done here; {_WITHOUT}",
    r".+\.(qkv_proj|query_key_value|c_attn|W_?pack|w?qkv|gate_up_proj)\.\w+": "are several projections in one; split "
    "them into q_proj, k_proj, v_proj, gate_proj and up_proj, as LlamaForCausalLM has them, and save the model again",
}
"""Tensors that a class does not have, by pattern, and what is said of them."""

_BEYOND = (
    "are of layers beyond num_hidden_layers, which transformers does not run; correct config.json if the model has "
    f"them. If they predict further tokens (MTP), {_WITHOUT}"
)
_LAYER = re.compile(r"model\.layers\.(\d+)\..+")
_EXPERT = re.compile(r"model\.layers\.\d+\..+\.experts\.(\d+)\..+")
_SIZES = {
    "n_vocab": "vocab_size",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "d_expert": "moe_intermediate_size",
    "d_shared": "moe_intermediate_size times n_shared_experts",
    "d_q": "head_dim times num_attention_heads",
    "d_kv": "head_dim times num_key_value_heads",
    "n_expert": "num_local_experts",
}
"""Size of `graph_sizes` -> the key of config.json that it is from."""
_SIZES_BESIDE_SHARED = _SIZES | {"n_expert": "n_routed_experts"}

_PROJECTION = re.compile(r".+\.(q|k|v|gate|up)_proj\.\w+")


def find_cause(
    values: Mapping[str, Any], model: Model, mlp: MLP, tensors: Mapping[str, StoredTensor], warnings: list[str]
) -> list[str]:
    """Return the one reason, or one of each kind, if that is all that is wrong with the names of tensors."""
    return (
        _find_quantization(values, model, mlp, tensors, warnings)
        or _find_foreign_names(model, mlp, tensors)
        or _find_other_numbers(model, mlp, tensors)
        or _find_other_parts(model, mlp, tensors)
        or _find_no_experts(model)
    )


def _find_quantization(
    values: Mapping[str, Any], model: Model, mlp: MLP, tensors: Mapping[str, StoredTensor], warnings: list[str]
) -> list[str]:
    """Return one problem where the weights are quantized; a quantization_config beside plain weights is a warning."""
    wanted = list_expected_tensors(model, mlp).keys()
    extra = [name for name in tensors.keys() - wanted if not is_ignored(name)]
    tool = next((tool for tool, ends in QUANTIZED_BY.items() if any(name.endswith(ends) for name in extra)), None)
    packed = sorted(name for name in wanted & tensors.keys() if tensors[name].dtype not in DTYPES)
    if tool or (packed and values.get("quantization_config")):
        settings = values.get("quantization_config")
        tool = tool or (str(settings.get("quant_method"))[:40] if isinstance(settings, dict) else "quantization_config")
        return [
            f"the weights are quantized ({tool}); convert the original f32, f16 or bf16 checkpoint instead, or write "
            "one: model.dequantize().save_pretrained(DIR) in transformers"
        ]
    if values.get("quantization_config"):
        warnings.append("config.json: quantization_config is ignored: the weights are not quantized")
    return []


def _find_foreign_names(model: Model, mlp: MLP, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return one problem where all tensors have other names than transformers gives them, for one reason."""
    wanted = list_expected_tensors(model, mlp).keys()
    if "tok_embeddings.weight" in tensors:
        return [
            "the tensors have the names of the original LLaMA or Mistral release, not of transformers; take the "
            "Hugging Face version of the model, or write one with transformers' convert_llama_weights_to_hf.py"
        ]
    if any(".lora_A." in name or ".base_layer." in name for name in tensors):
        return [ADAPTER]
    suffix = EMBEDDING.removeprefix("model.")
    for name in tensors:
        prefix = name.removesuffix(suffix)
        if not name.endswith(suffix) or prefix == "model.":
            continue
        if {prefix + other.removeprefix("model.") for other in wanted if other != HEAD} <= tensors.keys():
            return [
                f"the names of all tensors begin with {prefix!r} instead of 'model.', as a model inside of another has "
                "them (a wrapper, or a base model without its head); load it with the class that wrote it, then save "
                "the inner ...ForCausalLM with save_pretrained(DIR)"
            ]
    return []


def _find_other_numbers(model: Model, mlp: MLP, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return one problem where all tensors fit a config.json with other numbers: those, with what they should be."""
    counted = _count_layers_and_experts(model, tensors)
    shapes, said, found = list_expected_shapes(counted, mlp), graph_sizes(model), dict[str, int]()
    if shapes.keys() != {name for name in tensors if name in shapes or not is_derived(model, name)}:
        return []
    for name, shape in shapes.items():
        stored = tensors[name].shape
        if len(stored) != len(shape) or any(found.setdefault(d, n) != n for d, n in zip(shape, stored, strict=True)):
            return []
    pairs = {"first_k_dense_replace": (model.leading_dense, counted.leading_dense)}
    keys = _SIZES_BESIDE_SHARED if model.n_shared else _SIZES
    pairs |= {keys[name]: (said[name], n) for name, n in found.items() if name in keys}
    wrong = [f"{key} is {before} instead of {after}" for key, (before, after) in pairs.items() if before != after]
    if not wrong:
        return []
    return [
        f"config.json is not of these tensors: {', '.join(wrong)}; correct it, or fetch the files that belong to it"
    ]


def _find_no_experts(model: Model) -> list[str]:
    """Return a problem where the dense layers leave none for experts."""
    if model.leading_dense < model.n_layer:
        return []
    return [f"config.json: first_k_dense_replace is {model.leading_dense}, so no layer has experts"]


def _count_layers_and_experts(model: Model, tensors: Mapping[str, StoredTensor]) -> Model:
    """Return the model with as many leading dense layers and experts as the names of its tensors have."""
    if not model.n_expert:
        return model
    experts = {int(match[1]) for name in tensors if (match := _EXPERT.fullmatch(name))}
    gate = DENSE.tensors["gate"][0]
    dense = [i for i in range(model.n_layer) if gate.format(i=i) in tensors]
    return replace(model, n_expert=len(experts) or model.n_expert, leading_dense=len(dense))


def _find_other_parts(model: Model, mlp: MLP, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return one problem for each kind of tensors that another class has, and for layers that are not there."""
    wanted = list_expected_tensors(model, mlp).keys()
    groups, missing = _group_by_kind(model, tensors.keys() - wanted), wanted - tensors.keys()
    layers = {int(match[1]) for name in wanted & tensors.keys() if (match := _LAYER.fullmatch(name))}
    absent = {name for name in wanted if (match := _LAYER.fullmatch(name)) and int(match[1]) >= len(layers)}
    if missing and not groups and missing == absent:
        return [
            f"config.json says num_hidden_layers {model.n_layer}, but the tensors are those of {len(layers)} layers; "
            "correct config.json, or fetch the files that are missing"
        ]
    if "" in groups or not all(_PROJECTION.fullmatch(name) for name in missing):
        return []
    return [f"{len(names)} tensors ({list_names(names)}) {kind}" for kind, names in groups.items()]


def _group_by_kind(model: Model, names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of tensors that are no derived buffers, by what is said of them, see `_describe_kind`."""
    groups = dict[str, list[str]]()
    for name in sorted(names):
        if not is_derived(model, name):
            groups.setdefault(_describe_kind(name, model.n_layer), []).append(name)
    return groups


def _describe_kind(name: str, n_layer: int) -> str:
    """Return what is said of tensors like the one of this name; "" where nothing is known of them."""
    match = _LAYER.fullmatch(name)
    if match and int(match[1]) >= n_layer:
        return _BEYOND
    return next((words for pattern, words in _KINDS.items() if re.fullmatch(pattern, name)), "")
