"""Why hardly a tensor of a folder is as config.json says, where there is one reason for all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe2gguf.hf.families import EMBEDDING, HEAD, MLP, is_ignored, list_expected_tensors
from moe2gguf.hf.safetensors import ADAPTER, DTYPES, StoredTensor
from moe2gguf.spec import Model

QUANTIZED_BY = {
    "bitsandbytes": (".absmax", ".quant_map", ".SCB", ".weight_format"),
    "GPTQ or AWQ": (".qweight", ".qzeros", ".g_idx"),
    "compressed-tensors or FP8": (".weight_packed", ".weight_scale", ".weight_scale_inv", ".input_scale"),
    "MLX": (".scales", ".biases"),
}
"""Which tool leaves tensors whose names end in this beside its packed weights."""


def find_cause(
    values: Mapping[str, Any], model: Model, mlp: MLP, tensors: Mapping[str, StoredTensor], warnings: list[str]
) -> list[str]:
    """Return the one reason, if there is one, why hardly a tensor is as expected."""
    return _find_quantization(values, model, mlp, tensors, warnings) or _find_foreign_names(model, mlp, tensors)


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
