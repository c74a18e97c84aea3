"""Which of llama.cpp's byte-level pre-tokenizers does what a checkpoint's own one does.

llama.cpp knows a pre-tokenizer by name only (`tokenizer.ggml.pre`). We find the name by behaviour: the checkpoint's
normalizer and pre-tokenizer cut a fixed hard text, `PROBES`, and so does every row of `PRE_TOKENIZERS`. The row that
gives the same pieces is the one. Folder names, model names and the vocabulary play no part, so a fine-tune with
added tokens is recognized like its parent. (llama.cpp's converter compares a hash of token ids, which any change of
the vocabulary breaks: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/conversion/base.py#L1629.)

Pieces alone do not tell all names apart. Two more things do:

* `ignore_merges`: a piece that is a token as a whole is taken as it is. It must agree, except where it makes no
  difference because the merges reach every token anyway; that is tried out.
* `clean_spaces`: whether detokenizing removes spaces before punctuation. It decides between names that are equal
  otherwise (smollm and starcoder), by `clean_up_tokenization_spaces` of tokenizer_config.json.

The rows hold what the *published tokenizers* do. For most, llama.cpp does exactly that. Where it is coarser in a way
that the vocabulary can hide (it keeps digits together, say, and no token has two digits), `coarser` says how and the
row is taken only if the checkpoint's merges give the same ids either way. What remains is llama.cpp's own doing and
the same in every GGUF of these models: it does not normalize (Qwen2's NFC), and `tekken` and `gpt-4o` see a letter
outside ASCII as upper and lower case at once.

Regular expressions and flags: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-vocab.cpp#L283 and
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-vocab.cpp#L2154
"""

# ruff: noqa: RUF001 - look-alike characters are what we probe with

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from tokenizers import Regex, Tokenizer, pre_tokenizers

from moe2gguf.errors import VocabularyError

_TO_BYTES = "to bytes"
"""A step that is no regular expression: from here on the text is in the alphabet of bytes."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_REST}"
_SEED_CODER = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_MINICPM5 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_REST}"

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _make_cased(ending: str, digits: str) -> str:
    """Return the pattern that cuts words where the case falls, as o200k and tekken do."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}"
    return rf"{words}|{digits}|{_CASED_REST}"


_LATIN_LIKE = (
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
_DEEPSEEK_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LLM = (
    "[\r\n]",
    rf"\s?[{_LATIN_LIKE}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _DEEPSEEK_HAN,
)
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
_FALCON = (r"[!-/:-@\[-`{-~\p{P}]+", _GPT2, _TO_BYTES, r"\p{N}+", "[0-9][0-9][0-9]")
_BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"


@dataclass(frozen=True)
class PreTokenizer:
    """A row: a name of llama.cpp's and what stands behind it.

    `steps` are patterns applied one after another; each cuts the pieces of the one before into its matches and what
    lies between them. `alike` are names that llama.cpp treats the same, which we never need to write.
    """

    name: str
    steps: tuple[str, ...]
    ignore_merges: bool = False
    clean_spaces: bool = True
    coarser: tuple[str, ...] | None = None
    alike: tuple[str, ...] = ()


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", (_GPT2,), alike=("phi-2", "mpt", "olmo", "jais")),
    PreTokenizer("trillion", (_GPT2,), clean_spaces=False, alike=("granite-docling",)),
    PreTokenizer("llama-bpe", (_LLAMA3,), ignore_merges=True, alike=("llama3", "llama-v3", "falcon3", "pixtral")),
    PreTokenizer("dbrx", (_LLAMA3,), alike=("smaug-bpe", "chatglm-bpe")),
    PreTokenizer("qwen2", (_QWEN2,), clean_spaces=False, alike=("deepseek-r1-qwen", "hunyuan", "grok-2")),
    PreTokenizer("stablelm2", (_QWEN2,), alike=("megrez",)),
    PreTokenizer("smollm", (r"\p{N}", _GPT2), clean_spaces=False, alike=("command-r",)),
    PreTokenizer("starcoder", (r"\p{N}", _GPT2), alike=("refact", "codeshell", "exaone", "minerva-7b", "mellum2")),
    PreTokenizer("tekken", (_make_cased("", r"\p{N}"),), ignore_merges=True, clean_spaces=False),
    PreTokenizer("gpt-4o", (_make_cased(_CONTRACTION + "?", r"\p{N}{1,3}"),), clean_spaces=False, alike=("llama4",)),
    PreTokenizer(
        "deepseek-llm",
        (*_DEEPSEEK_LLM, r"\p{N}"),
        clean_spaces=False,
        coarser=(*_DEEPSEEK_LLM, r"\p{N}+"),
    ),
    PreTokenizer("deepseek-coder", _DEEPSEEK_CODER, clean_spaces=False),
    PreTokenizer("deepseek-v3", _DEEPSEEK_V3, clean_spaces=False, alike=("hunyuan-dense",)),
    PreTokenizer("seed-coder", (_SEED_CODER,), clean_spaces=False),
    PreTokenizer("minicpm5", (r"\p{N}{1,3}", _MINICPM5), ignore_merges=True),
    PreTokenizer("falcon", _FALCON, coarser=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    PreTokenizer("bloom", (_BLOOM,), alike=("gpt3-finnish",)),
    PreTokenizer("poro-chat", (_BLOOM,), clean_spaces=False),
    PreTokenizer("viking", (_BLOOM, r"\p{N}"), clean_spaces=False),
)
"""Every row we can recognize; of rows with equal pieces and flags the first is taken."""

PROBES = (
    "Hello, y'all! I'VE we'Ll it's 'tis HE'S o'clock 'RE you\u2019re don'T",
    " leading and  two   three    four     five, trailing   ",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \nx\r\n\r\ny\u00a0z\u3000w\t\ttab\n",
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 1,234,567.89 w048 7tuijk ½x²y Ⅻ ٣٤٥٦ १२३४",
    "aBc HelloWORLDHello XMLHttpRequest snake_case $var #tag @name http://a.b/c?d=e&f \\n //x\n/// --\n/",
    '!!!!!! ......!? ------====== \'\'\'```"""" ((x)) [y] {z} <|a|> ~`^|+ $$ €5 %',
    "我想在apple工作1314151天～ ひらがなカタカナ漢字 한국어입니다，。！ กำลังทำ हिन्दी में កាន់តែ",
    "нещо на Български привет Мир Ελληνικά عربى שלום Äpfel Cửa Việt straße ﬁ ａｂｃ １２３ µm Å",
    "🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 👨‍👩‍👧\u200b\u00ad\x01\x7f",
    *("x", " x", "  x", "\nx", "1x", " 1", "  1", "a   12", " \n  1", " 1234", "'s", " 's", "(a", " (a"),
    *("a ", "a\n", " \n a", "\t", " "),
)
"""Hard texts, all in normalization form C: a normalizer that does more than compose changes them and is noticed."""

Cut = Callable[[str], list[str]]
"""Cuts a text into pieces, spelled in the alphabet of bytes."""


def recognize(tokenizer: Tokenizer, *, ignore_merges: bool, clean_spaces: bool | None) -> str:
    """Return the `tokenizer.ggml.pre` name whose behaviour is that of `tokenizer`, a byte-level BPE.

    `clean_spaces` is the checkpoint's wish; None: it states none.

    Raises:
        VocabularyError: no row does the same; names what was found and the known names.
    """
    found = [_cut_pieces(make_cutter(tokenizer), text) for text in PROBES]
    alike = [row for row in PRE_TOKENIZERS if found == [_cut_pieces(_make_cutter(row.steps), text) for text in PROBES]]
    alike = [row for row in alike if row.coarser is None or _gives_same_ids(tokenizer, row.steps, row.coarser)]
    rows = [row for row in alike if row.ignore_merges == ignore_merges]
    if not rows and alike and _merges_reach_all(tokenizer):
        rows = alike
    if not rows:
        raise VocabularyError(_describe_unknown(tokenizer, ignore_merges, alike))
    return next((row for row in rows if row.clean_spaces == clean_spaces), rows[0]).name


def list_known_names() -> list[str]:
    """Return every name we can recognize, sorted."""
    return sorted(name for row in PRE_TOKENIZERS for name in (row.name, *row.alike))


def build(steps: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    """Return the steps as a pre-tokenizer of the `tokenizers` package, ending in the alphabet of bytes."""
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    parts = [to_bytes if step == _TO_BYTES else pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    return pre_tokenizers.Sequence(parts if _TO_BYTES in steps else [*parts, to_bytes])


@cache
def _make_cutter(steps: tuple[str, ...]) -> Cut:
    pre_tokenizer = build(steps)
    return lambda text: [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)]


def make_cutter(tokenizer: Tokenizer) -> Cut:
    """Return the cut that the normalizer and pre-tokenizer of `tokenizer` make."""
    normalizer, pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer

    def cut(text: str) -> list[str]:
        normalized = normalizer.normalize_str(text) if normalizer else text
        return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(normalized)] if pre_tokenizer else [normalized]

    return cut


def _cut_pieces(cut: Cut, text: str) -> list[str]:
    """Cut a text, without empty pieces, which no model sees."""
    return [piece for piece in cut(text) if piece]


def _gives_same_ids(tokenizer: Tokenizer, one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Say whether the checkpoint's merges give the same ids on all probes, whichever way these are cut."""

    def ids(steps: tuple[str, ...], text: str) -> list[int]:
        return [
            token.id for piece in _cut_pieces(_make_cutter(steps), text) for token in tokenizer.model.tokenize(piece)
        ]

    return all(ids(one, text) == ids(other, text) for text in PROBES)


def _merges_reach_all(tokenizer: Tokenizer) -> bool:
    """Say whether the merges alone rebuild every token of the model, so that `ignore_merges` is without effect."""
    model = tokenizer.model
    before = model.ignore_merges
    model.ignore_merges = False
    try:
        return all(len(model.tokenize(token)) == 1 for token in tokenizer.get_vocab(with_added_tokens=False))
    finally:
        model.ignore_merges = before


def _describe_unknown(tokenizer: Tokenizer, ignore_merges: bool, alike: Sequence[PreTokenizer]) -> str:
    found = f"normalizer {_shorten(tokenizer.normalizer)}, pre_tokenizer {_shorten(tokenizer.pre_tokenizer)}"
    names = ", ".join(list_known_names())
    if alike:
        reason = (
            f"cuts text like {', '.join(row.name for row in alike)}, but has ignore_merges={ignore_merges}, "
            "which no name of llama.cpp's combines with it, and it matters for this vocabulary"
        )
    else:
        reason = f"does what none of llama.cpp's pre-tokenizers does ({found})"
    return (
        f"tokenizer.json: its pre-tokenizer {reason}. Known: {names}. "
        "If a newer llama.cpp has it, its row is missing in moe2gguf/hf/tokenizer/pretokenizers.py; otherwise the "
        "model would read other tokens than it was trained on, so there is no GGUF to make"
    )


def _shorten(part: object) -> str:
    text = repr(part)
    return text if len(text) <= 400 else text[:400] + "..."
