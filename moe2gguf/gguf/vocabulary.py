"""The `tokenizer.*` keys of a GGUF file."""

from __future__ import annotations

from moe2gguf.spec import MetadataValue, Vocabulary

_IDS = {
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
    for role, key in _IDS.items():
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
