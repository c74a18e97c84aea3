"""Hyper-parameters and vocabulary -> the `general.*`, `tokenizer.*`, `moe2gguf.*` and the graph's own keys of the file.

llama.cpp's reading side: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-model.cpp#L1320-L1456 and
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/models/llama.cpp#L3-L37. Keys that arch `llama` does not honor
(`expert_weights_scale`, per-layer expert counts) are not written.
"""

import math
from importlib.metadata import version

import numpy as np
from gguf import GGML_QUANT_VERSION
from numpy.typing import NDArray

from moe2gguf.graphs import GRAPHS, Graph, find_graph_of
from moe2gguf.spec import Calibration, MetadataValue, Model, Rope, Slicing, Vocabulary

SOURCE_DIGEST = "moe2gguf.source.sha256"
DIGEST_PLACEHOLDER = "0" * 64
"""Stands in the header until every source tensor has been read and hashed."""

CALIBRATION_LOAD = "moe2gguf.calibration.load"
"""Share of the calibration's tokens that ran each expert, (layers with experts * n_expert,) layer after layer; zeros
stand there until the experts are made."""


def model_metadata(model: Model, slicing: Slicing | None, file_type: int) -> dict[str, MetadataValue]:
    """The keys llama.cpp needs to run `model`, sliced or (slicing None) as it is."""
    graph = GRAPHS[slicing.target] if slicing else find_graph_of(model)
    architecture = graph.architecture
    result: dict[str, MetadataValue] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.quantization_version": int(GGML_QUANT_VERSION),
        "general.file_type": int(file_type),
        **{f"{architecture}.{key}": value for key, value in _describe_model(model).items()},
    }
    if slicing:
        result |= expert_metadata(model, slicing)
    elif model.n_shared:
        counts = model.n_expert, model.n_expert_used, model.leading_dense
        result |= _describe_shared(graph, model, model.n_shared, model.d_expert, *counts)
    elif model.n_expert:
        result |= {"llama.expert_count": model.n_expert, "llama.expert_used_count": model.n_expert_used}
    return result


def _describe_model(model: Model) -> dict[str, MetadataValue]:
    """The keys behind the architecture's name that every graph reads."""
    return {
        "block_count": model.n_layer,
        "context_length": model.n_context,
        "embedding_length": model.d_model,
        "feed_forward_length": model.d_ff,
        "attention.head_count": model.n_head,
        "attention.head_count_kv": model.n_head_kv,
        "attention.key_length": model.d_head,
        "attention.value_length": model.d_head,
        "attention.layer_norm_rms_epsilon": model.rms_epsilon,
        "vocab_size": model.n_vocab,
        "rope.dimension_count": model.d_head,
        "rope.freq_base": model.rope.theta,
        **_rope_scaling(model.rope),
    }


def expert_metadata(model: Model, slicing: Slicing) -> dict[str, MetadataValue]:
    """The keys in which a sliced model differs from the dense one."""
    graph, n, k = GRAPHS[slicing.target], slicing.n_routed, slicing.n_routed_used
    if graph.has_shared:
        return _describe_shared(graph, model, slicing.in_shared, slicing.d_expert, n, k, slicing.leading_dense)
    keys = {"feed_forward_length": slicing.d_expert, "expert_count": n, "expert_used_count": k}
    return {f"{graph.architecture}.{key}": value for key, value in keys.items()}


def _describe_shared(
    graph: Graph, model: Model, n_shared: int, d_expert: int, n_routed: int, n_used: int, leading_dense: int
) -> dict[str, MetadataValue]:
    """The keys of a graph with a shared expert of its own."""
    keys: dict[str, MetadataValue] = {
        "feed_forward_length": model.d_ff,
        "expert_count": n_routed,
        "expert_used_count": n_used,
        "expert_feed_forward_length": d_expert,
        graph.shared_key: n_shared * (1 if graph.counts_shared else d_expert),
        **graph.keys,
        **graph.describe_leading_dense(leading_dense),
        **graph.describe_layers(model.n_layer, model.d_head, model.rope.theta),
    }
    return {f"{graph.architecture}.{key}": value for key, value in keys.items()}


def _rope_scaling(rope: Rope) -> dict[str, MetadataValue]:
    """llama3 scaling has no keys: it is a tensor, see `rope_frequencies`."""
    if rope.kind not in ("linear", "yarn"):
        return {}
    result: dict[str, MetadataValue] = {"rope.scaling.type": rope.kind, "rope.scaling.factor": rope.factor}
    if rope.original_context:
        result["rope.scaling.original_context_length"] = rope.original_context
    if rope.attention_factor is not None:
        # llama.cpp computes 1 + 0.1 ln(factor) itself and multiplies by this key; `yarn_attn_factor` is overwritten:
        # https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-context.cpp#L177-L214
        result["rope.scaling.attn_factor"] = rope.attention_factor / yarn_attention(rope.factor)
    return result


def yarn_attention(factor: float) -> float:
    """The attention factor that llama.cpp computes itself from a yarn scaling factor."""
    return 1 + 0.1 * math.log(factor) if factor > 1 else 1.0


def rope_frequencies(rope: Rope, d_head: int) -> NDArray[np.float32]:
    """llama3's divisors of the rotary frequencies, (d_head / 2,), for the tensor `rope_freqs.weight`.

    Wavelengths shorter than original_context / high_freq_factor stay, those longer than original_context /
    low_freq_factor are stretched by `factor`, and between the two the frequencies are blended. Source:
    https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py (apply_scaling).
    """
    context = float(rope.original_context or 0)
    frequencies = rope.theta ** -(np.arange(0, d_head, 2, dtype=np.float64) / d_head)
    wavelengths = 2 * np.pi / frequencies
    smooth = (context / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = 1 / ((1 - smooth) / rope.factor + smooth)
    short = wavelengths < context / rope.high_freq_factor
    long = wavelengths > context / rope.low_freq_factor
    return np.where(short, 1.0, np.where(long, rope.factor, blended)).astype(np.float32)


def provenance(
    model: Model, slicing: Slicing | None, calibration: Calibration | None = None
) -> dict[str, MetadataValue]:
    """`moe2gguf.*`: what made this file, from what, how. No path, no time: equal inputs give equal bytes."""
    result: dict[str, MetadataValue] = {
        "moe2gguf.version": version("moe2gguf"),
        "moe2gguf.source.architecture": model.architecture,
        SOURCE_DIGEST: DIGEST_PLACEHOLDER,
    }
    if slicing:
        result |= {
            "moe2gguf.slicing.group": slicing.method.group,
            "moe2gguf.slicing.router": slicing.method.router,
            "moe2gguf.slicing.refit": slicing.method.refit,
            "moe2gguf.slicing.amplify": slicing.method.amplify,
            "moe2gguf.slicing.seed": slicing.method.seed,
            "moe2gguf.slicing.expert_count": slicing.n_expert,
            "moe2gguf.slicing.expert_used_count": slicing.n_expert_used,
            "moe2gguf.slicing.dense_feed_forward_length": model.d_ff,
            "moe2gguf.slicing.padding": slicing.n_expert * slicing.d_expert - model.d_ff,
            "moe2gguf.slicing.align": slicing.align,
            **({"moe2gguf.slicing.scale_tensor": True} if slicing.scale_tensor else {}),
            **({"moe2gguf.slicing.target": slicing.target} if slicing.in_shared else {}),
            **({"moe2gguf.slicing.leading_dense": slicing.leading_dense} if slicing.leading_dense else {}),
        }
        if slicing.in_shared:
            result["moe2gguf.slicing.amplification"] = 1 / GRAPHS[slicing.target].weight_of_expert(slicing.n_routed)
        elif slicing.method.amplify in ("exact", "used"):
            count = slicing.n_expert if slicing.method.amplify == "exact" else slicing.n_expert_used
            result["moe2gguf.slicing.amplification"] = float(count)
        if slicing.method.n_shared is not None:
            result["moe2gguf.slicing.always_on"] = slicing.method.n_shared
    if calibration:
        result |= {
            "moe2gguf.calibration.text": calibration.label,
            "moe2gguf.calibration.sha256": calibration.digest,
            "moe2gguf.calibration.tokens": calibration.n_token,
        }
    if calibration and slicing:
        result[CALIBRATION_LOAD] = [0.0] * ((model.n_layer - slicing.leading_dense) * slicing.n_expert)
    return result


_TOKEN_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "fim_pre": "fim_pre_token_id",
    "fim_suf": "fim_suf_token_id",
    "fim_mid": "fim_mid_token_id",
}
"""Role -> key, spelled as llama.cpp spells it:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/gguf-py/gguf/constants.py#L323"""


def vocabulary_metadata(vocabulary: Vocabulary) -> dict[str, MetadataValue]:
    """Return the vocabulary as metadata, keys in a fixed order; what the vocabulary lacks has no key.

    The unnamed chat template is `tokenizer.chat_template`, the others are `tokenizer.chat_template.NAME`, listed in
    `tokenizer.chat_templates`.
    """
    metadata: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": vocabulary.model,
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": list(vocabulary.tokens),
        "tokenizer.ggml.token_type": list(vocabulary.types),
    }
    if vocabulary.scores is not None:
        metadata["tokenizer.ggml.scores"] = list(vocabulary.scores)
    if vocabulary.merges is not None:
        metadata["tokenizer.ggml.merges"] = list(vocabulary.merges)
    for role, key in _TOKEN_KEYS.items():
        if role in vocabulary.special_ids:
            metadata[f"tokenizer.ggml.{key}"] = vocabulary.special_ids[role]
    for flag, value in sorted(vocabulary.flags.items()):
        metadata[f"tokenizer.ggml.{flag}"] = value
    named = sorted(set(vocabulary.chat_templates) - {"default"})
    if named:
        metadata["tokenizer.chat_templates"] = named
    for name in named:
        metadata[f"tokenizer.chat_template.{name}"] = vocabulary.chat_templates[name]
    if "default" in vocabulary.chat_templates:
        metadata["tokenizer.chat_template"] = vocabulary.chat_templates["default"]
    return metadata
