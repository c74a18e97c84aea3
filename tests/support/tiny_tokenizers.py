"""Tiny but real tokenizers, trained in code: the folders that every other test converts.

Each function writes the tokenizer files of one checkpoint into `folder` (transformers.AutoTokenizer loads it) and
returns the number of tokens, which is the least number of embedding rows. The same call writes the same bytes.

The pre-tokenizers are spelled as the published checkpoints spell them, apart from moe2gguf's own table.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pretok
from tokenizers import processors as post

CORPUS = [
    "Hello world, hello there! The quick brown fox jumps over the lazy dog, and the dog doesn't mind it at all.",
    "I've been told he's there, 're you sure? WE'LL see. It isn't what they'd said; I'm not so sure they'll make it.",
    "    def forward(self, x):\n        return self.down(self.gate(x) * self.up(x))\n\n\n    # the end of a function\n",
    "In 2024 there were 365 days, 12 months and 52 weeks; 1314151 is a number, so are 3.14159, 100 and 1,000,000.",
    "Привет мир, это маленький текст на русском языке. нещо на Български, мир и весь мир.",
    "我想在苹果工作, 我想在北京工作。 我们都想学习。 日本語のテキスト、テキスト。 한국어 텍스트입니다.",
    "Äpfel und Öl für die Straße, für die Übung. Cửa Việt, été à la crème brûlée, señor niño.",
    "🚀 🚀🚀 ✅ emojis 😁 and 🦙🦙 are here. کتاب और हिन्दी ไทย ------====== !!!!!! ''''''",
    "\t\ttabs\tand  two   three    four spaces \n \n\n mixed \r\n lines \n",
    "camelCase HTTPRequest XMLParser fooBar MACRO_NAME snake_case_name http://example.com/path?query=1&other=2",
] * 3
"""What the tokenizers are trained on: scripts, contractions, code, digits, spaces, emoji."""

BOS, EOS, TOOL = "<|begin|>", "<|end|>", "<tool_call>"
UNREACHABLE = "Ġunreachable"
"""A token of the ignore_merges kinds that no merge makes."""

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}\n"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-"
    "\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_FULLWIDTH = "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"


def _bytes(use_regex: bool = False) -> pretok.PreTokenizer:
    return pretok.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=use_regex)


def _split(pattern: str) -> pretok.PreTokenizer:
    return pretok.Split(Regex(pattern), "isolated")


def _then_bytes(*patterns: str, digits: bool = False) -> pretok.PreTokenizer:
    return pretok.Sequence([*map(_split, patterns), *([pretok.Digits(True)] if digits else []), _bytes()])


PRE_TOKENIZERS: dict[str, Callable[[], pretok.PreTokenizer]] = {
    "gpt-2": lambda: _bytes(use_regex=True),
    "llama-bpe": lambda: _then_bytes(_LLAMA3),
    "dbrx": lambda: _then_bytes(_LLAMA3),
    "qwen2": lambda: _then_bytes(_LLAMA3.replace("{1,3}", "")),
    "stablelm2": lambda: _then_bytes(_LLAMA3.replace("{1,3}", "")),
    "smollm": lambda: pretok.Sequence([pretok.Digits(individual_digits=True), _bytes(use_regex=True)]),
    "starcoder": lambda: pretok.Sequence([pretok.Digits(individual_digits=True), _bytes(use_regex=True)]),
    "tekken": lambda: _then_bytes(_TEKKEN),
    "gpt-4o": lambda: _then_bytes(_O200K),
    "deepseek-llm": lambda: _then_bytes(
        "[\r\n]", rf"\s?[{_LETTERS}]+", rf"\s?[!-/:-~{_FULLWIDTH}]+", r"\s+$", _HAN, digits=True
    ),
    "deepseek-coder": lambda: _then_bytes("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, digits=True),
    "deepseek-v3": lambda: _then_bytes(
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    ),
    "seed-coder": lambda: _then_bytes(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    "minicpm5": lambda: _then_bytes(r"\p{N}{1,3}", _LLAMA3.replace("{1,3}", "+")),
    "falcon": lambda: pretok.Sequence(
        [pretok.Punctuation("contiguous"), _bytes(use_regex=True), pretok.Digits(False), _split("[0-9][0-9][0-9]")]
    ),
    "bloom": lambda: _then_bytes(_BLOOM),
    "viking": lambda: _then_bytes(_BLOOM, digits=True),
}
"""`tokenizer.ggml.pre` -> the pre-tokenizer of a published checkpoint of that kind."""

_IGNORE_MERGES = {"llama-bpe", "tekken", "minicpm5"}
_KEEP_SPACES = {
    *("qwen2", "smollm", "tekken", "gpt-4o", "viking"),
    *("deepseek-llm", "deepseek-coder", "deepseek-v3", "seed-coder"),
}
_WITH_BOS = {"llama-bpe", "tekken", "deepseek-llm", "deepseek-coder", "deepseek-v3"}


def byte_level_bpe(folder: Path, *, pre: str = "llama-bpe", n_vocab: int = 400) -> int:
    """Write a byte-level BPE tokenizer of `n_vocab` tokens whose pre-tokenizer llama.cpp calls `pre`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    unreachable = [UNREACHABLE] if pre in _IGNORE_MERGES else []
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab - 3 - len(unreachable),
        initial_alphabet=sorted(tokenizer_alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    for token in unreachable:
        model["vocab"][token] = len(model["vocab"])
    model["ignore_merges"] = pre in _IGNORE_MERGES
    if len(model["vocab"]) != n_vocab - 3:
        raise ValueError(f"the corpus gives only {len(model['vocab']) + 3} tokens; ask for fewer than {n_vocab}")
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.add_tokens([AddedToken(TOOL, normalized=False, special=False)])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = _bos_first(tokenizer, BOS) if pre in _WITH_BOS else post.ByteLevel(trim_offsets=False)
    config = {"bos_token": BOS, "eos_token": EOS, "clean_up_tokenization_spaces": pre not in _KEEP_SPACES}
    _save(folder, tokenizer, config)
    return tokenizer.get_vocab_size()


def tokenizer_alphabet() -> list[str]:
    """Return the 256 characters that stand for bytes."""
    return pretok.ByteLevel.alphabet()


def sentencepiece_model(folder: Path) -> int:
    """Write a tokenizer.model as LLaMA 1 and 2 have it: BPE, byte fallback, no normalization, split digits."""
    from sentencepiece import SentencePieceProcessor

    data = train_sentencepiece()
    _write(folder / "tokenizer.model", data)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", {**config, "chat_template": CHAT_TEMPLATE})
    _write_json(
        folder / "special_tokens_map.json", {key: config[key] for key in ("bos_token", "eos_token", "unk_token")}
    )
    return SentencePieceProcessor(model_proto=data).GetPieceSize()


def llama_json_only(folder: Path, *, spaces: str = "prepend") -> int:
    """Write the vocabulary of `sentencepiece_model` as a tokenizer.json alone.

    `spaces`: "prepend" as in Llama 2 and TinyLlama (normalizer), "first" as in Mistral (Metaspace), "never" without
    a space prefix, "split" a Metaspace that cuts words apart.
    """
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=train_sentencepiece())
    vocab = {processor.IdToPiece(id_): id_ for id_ in range(processor.GetPieceSize())}
    scores = {piece: processor.GetScore(id_) for piece, id_ in vocab.items()}
    merges = [
        (scores[piece], piece[:cut], piece[cut:])
        for piece in vocab
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges.sort(key=lambda merge: (-merge[0], vocab[merge[1]], vocab[merge[2]]))
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            [(left, right) for _, left, right in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if spaces == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = "never" if spaces == "never" else "first"
        tokenizer.pre_tokenizer = pretok.Metaspace("▁", prepend_scheme=scheme, split=spaces == "split")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = _bos_first(tokenizer, "<s>")
    _save(folder, tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    return tokenizer.get_vocab_size()


def train_sentencepiece(**options: Any) -> bytes:
    """Train a model on the corpus; `options` are the trainer's and replace LLaMA's."""
    from sentencepiece import SentencePieceTrainer

    llama = {
        "model_type": "bpe",
        "vocab_size": 450,
        "byte_fallback": True,
        "character_coverage": 0.985,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "num_threads": 1,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **{**llama, **options})
    return model.getvalue()


def _bos_first(tokenizer: Tokenizer, bos: str) -> post.TemplateProcessing:
    return post.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def _save(folder: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    _write(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", **config, "chat_template": CHAT_TEMPLATE},
    )
    tokens = {key: value for key, value in config.items() if key.endswith("_token")}
    _write_json(folder / "special_tokens_map.json", tokens)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, json.dumps(content, ensure_ascii=False, indent=2).encode())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
