"""llama.cpp reads our vocabulary as the checkpoint's own tokenizer does, or we refuse."""

# ruff: noqa: RUF001 - hard texts are full of look-alike characters

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny_tokenizers as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_tokens import LlamaTokens, write_vocabulary_file
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from moe2gguf.errors import VocabularyError
from moe2gguf.gguf.metadata import vocabulary_metadata
from moe2gguf.hf.tokenizer.special_tokens import ENDS_BY_TEXT
from moe2gguf.hf.tokenizer.vocabulary import read_vocabulary
from moe2gguf.spec import MetadataValue, Vocabulary

HARD = [
    "",
    "Hello, y'all! I'VE we'Ll it's 'tis HE'S o'clock 'RE you\u2019re don'T",
    "trailing   ",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \nx\r\n\r\ny\u00a0z\u3000w\t\ttab\n",
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 1,234,567.89 w048 7tuijk ½x²y ٣٤٥٦ १२३४",
    "aBc HelloWORLDHello XMLHttpRequest snake_case $var #tag @name http://a.b/c?d=e&f \\n //x\n/// --\n/",
    '!!!!!! ......!? ------====== \'\'\'```"""" ((x)) [y] {z} <|a|> ~`^|+ $$ €5 %',
    "我想在apple工作1314151天～ ひらがなカタカナ漢字 한국어입니다，。！ กำลังทำ हिन्दी में កាន់តែ",
    "нещо на Български привет Мир Ελληνικά عربى שלום Äpfel Cửa Việt straße ﬁ ａｂｃ １２３ µm Å",
    "🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 👨\u200d👩\u200d👧\u200b\u00ad\x01\x7f",
    "an unreachable unreachable word",
    f"{tiny.BOS}special{tiny.EOS} and {tiny.TOOL}tool{tiny.TOOL}",
    "<s>special</s> and <unk> <0x0A> tokens",
    "".join(tiny.CORPUS[:10]),
]
LEADING_SPACES = [" x", "   leading", " ", "    "]

FIXED = st.sampled_from(
    ["'s", "'RE", "  ", "\r\n", "\n", "\t", "é", "Ж", "и", "我", "の", "한", "🚀", "½", "हि", "12", "/"]
)
TEXTS = st.lists(FIXED | st.text("abcdehlotTHEX '!.,-_019", max_size=6), max_size=8).map("".join)

Build = Callable[[Path], int]


def byte_level(name: str) -> Build:
    return lambda folder: tiny.byte_level_bpe(folder, pre=name)


def json_only(spaces: str) -> Build:
    return lambda folder: tiny.llama_json_only(folder, spaces=spaces)


KINDS: dict[str, Build] = {
    **{name: byte_level(name) for name in tiny.PRE_TOKENIZERS},
    "tokenizer.model": tiny.sentencepiece_model,
    "json prepend": json_only("prepend"),
    "json first": json_only("first"),
    "json never": json_only("never"),
}


class Pair:
    """A tokenizer folder read by its own library, and its vocabulary read by llama.cpp."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind = kind
        self.n_token = KINDS[kind](folder)
        self.vocabulary = read_vocabulary(folder, self.n_token + 3)
        write_vocabulary_file(folder / "vocabulary.gguf", vocabulary_metadata(self.vocabulary))
        self.llama = LlamaTokens(folder / "vocabulary.gguf")
        if kind == "tokenizer.model":
            self.model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
            self.own = lambda text: [self.model.bos_id(), *self.model.encode(text)]
        else:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.own = lambda text: tokenizer.encode(text).ids


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kind: str = request.param
    return Pair(tmp_path_factory.mktemp("tokenizer"), kind)


def test_same_ids_on_hard_texts(pair: Pair) -> None:
    """ids, begin-of-text token included, are those of the checkpoint's own tokenizer, text by text."""
    texts = HARD if pair.kind == "json first" else HARD + LEADING_SPACES  # Metaspace puts no space before a space,
    if pair.kind in ("json first", "tokenizer.model"):  # nor behind a special token, which sentencepiece does not parse
        texts = [text for text in texts if "<s>" not in text]
    for text in texts:
        assert pair.own(text) == pair.llama.encode(text), text


@settings(max_examples=40)
@given(text=TEXTS)
def test_same_ids_on_any_text(pair: Pair, text: str) -> None:
    """The same on generated texts."""
    if pair.kind == "json first":
        text = text.lstrip(" ")
    if pair.kind in ("tekken", "gpt-4o"):  # llama.cpp takes a letter outside ASCII for upper and lower case at once
        text = text.replace("Ж", "и")
    assert pair.own(text) == pair.llama.encode(text)


def test_table_is_whole(pair: Pair) -> None:
    """Every embedding has a token, those without one are unused padding, and the special ids are known to llama.cpp."""
    vocabulary = pair.vocabulary
    assert len(vocabulary.tokens) == len(vocabulary.types) == len(set(vocabulary.tokens)) == pair.n_token + 3
    assert vocabulary.tokens[-3:] == [f"[PAD{pair.n_token + i}]" for i in range(3)]
    assert vocabulary.types[-3:] == [gguf.TokenType.UNUSED] * 3
    assert pair.llama.size == pair.n_token + 3
    assert pair.llama.special("bos") == vocabulary.special_ids["bos"]
    assert pair.llama.special("eos") == vocabulary.special_ids["eos"]
    assert pair.llama.is_end(vocabulary.special_ids["eos"])
    assert vocabulary.pre == (pair.kind if pair.kind in tiny.PRE_TOKENIZERS else "default")
    assert vocabulary.chat_templates == {"default": tiny.CHAT_TEMPLATE}


@pytest.mark.parametrize("kind", ["llama-bpe", "smollm", "json prepend"])
def test_same_ids_as_transformers(tmp_path: Path, kind: str) -> None:
    """AutoTokenizer, the way users meet the tokenizer, gives these ids too."""
    transformers = pytest.importorskip("transformers")
    pair = Pair(tmp_path, kind)
    auto = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert [auto.encode(text) for text in HARD] == [pair.llama.encode(text) for text in HARD]


def test_types(tmp_path: Path) -> None:
    """Special added tokens are CONTROL, other added ones USER_DEFINED; SentencePiece has UNKNOWN and BYTE as well."""
    kinds = gguf.TokenType
    size = tiny.byte_level_bpe(tmp_path / "bpe")
    vocabulary = read_vocabulary(tmp_path / "bpe", size)
    assert types_of(vocabulary, tiny.BOS, tiny.EOS, tiny.TOOL, "Ġthe") == [
        kinds.CONTROL,
        kinds.CONTROL,
        kinds.USER_DEFINED,
        kinds.NORMAL,
    ]
    for build in (tiny.sentencepiece_model, tiny.llama_json_only):
        folder = tmp_path / build.__name__
        vocabulary = read_vocabulary(folder, build(folder))
        assert types_of(vocabulary, "<unk>", "<s>", "</s>", "<0x0A>", "▁the") == [
            kinds.UNKNOWN,
            kinds.CONTROL,
            kinds.CONTROL,
            kinds.BYTE,
            kinds.NORMAL,
        ]


def types_of(vocabulary: Vocabulary, *tokens: str) -> list[int]:
    return [vocabulary.types[vocabulary.tokens.index(token)] for token in tokens]


def test_scores_from_merges(tmp_path: Path) -> None:
    """The scores found from tokenizer.json's merges are those of the SentencePiece model it was made from."""
    size = tiny.sentencepiece_model(tmp_path / "model")
    tiny.llama_json_only(tmp_path / "json")
    model, converted = read_vocabulary(tmp_path / "model", size), read_vocabulary(tmp_path / "json", size)
    assert model.scores == converted.scores
    assert model.tokens == converted.tokens
    assert model.types == converted.types


def test_fine_tune_with_added_tokens(tmp_path: Path) -> None:
    """A fine-tune that adds tokens keeps its parent's pre-tokenizer, and each token gets its type."""
    size = tiny.byte_level_bpe(tmp_path, pre="llama-bpe")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "[INST]"])
    tokenizer.add_tokens(["<think>", "<|looks_special|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = read_vocabulary(tmp_path, size + 4)
    assert vocabulary.pre == "llama-bpe"
    expected = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL]
    assert vocabulary.types[size:] == expected


def test_added_tokens_of_other_files(tmp_path: Path) -> None:
    """added_tokens.json and added_tokens_decoder add to a tokenizer.model; their ▁ is a space."""
    size = tiny.sentencepiece_model(tmp_path)
    write(tmp_path / "added_tokens.json", {"<extra>": size, "▁▁two": size + 1})
    edit(
        tmp_path / "tokenizer_config.json",
        added_tokens_decoder={
            "0": {"content": "<unk>", "special": True},
            str(size): {"content": "<extra>", "special": True},
            str(size + 2): {"content": "<|im_end|>", "special": True},
        },
    )
    vocabulary = read_vocabulary(tmp_path, size + 3)
    assert vocabulary.tokens[size:] == ["<extra>", "  two", "<|im_end|>"]
    kinds = gguf.TokenType
    assert vocabulary.types[size:] == [kinds.CONTROL, kinds.USER_DEFINED, kinds.CONTROL]
    assert vocabulary.types[0] == kinds.UNKNOWN


def test_every_end_of_a_text_ends_it(tmp_path: Path) -> None:
    """eos_token_id may be a list, in two files: llama.cpp stops at each, or a warning names what has no room."""
    size = tiny.byte_level_bpe(tmp_path)
    write(tmp_path / "config.json", {"eos_token_id": [size - 2, 10]})
    write(tmp_path / "generation_config.json", {"eos_token_id": [10, 11, 12]})

    vocabulary = read_vocabulary(tmp_path, size)

    write_vocabulary_file(tmp_path / "vocabulary.gguf", vocabulary_metadata(vocabulary))
    with LlamaTokens(tmp_path / "vocabulary.gguf") as llama:
        assert [True, True, True, False] == [llama.is_end(id_) for id_ in (size - 2, 10, 11, 12)]
    (warning,) = vocabulary.warnings
    assert f"12 {vocabulary.tokens[12]!r}" in warning


def test_byte_level_beside_a_tiktoken_file(tmp_path: Path) -> None:
    """Llama 3 folders hold a tokenizer.model that is no SentencePiece; their tokenizer.json counts."""
    size = tiny.byte_level_bpe(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert read_vocabulary(tmp_path, size).model == "gpt2"


def test_model_and_json_of_different_checkpoints(tmp_path: Path) -> None:
    """tokenizer.model wins over a tokenizer.json of the same tokens, and does not hide one of others."""
    size = tiny.sentencepiece_model(tmp_path)
    tiny.llama_json_only(tmp_path)
    assert read_vocabulary(tmp_path, size).scores is not None
    (tmp_path / "tokenizer.model").write_bytes(tiny.train_sentencepiece(vocab_size=440))
    with pytest.raises(VocabularyError, match="disagree on"):
        read_vocabulary(tmp_path, size)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_vocab": -1}, "the embedding has 399 rows, but the tokenizer has 1 more tokens: 399 '<tool_call>'"),
        ({"vocab": {"Ġthe": 7}}, "id 7 belongs to"),
        ({"vocab": {"Ġthe": 4_000_000_000}}, "4000000000 'Ġthe'"),
        ({"vocab": {"Ġthe": -3}}, "cannot load"),
        ({"vocab": {"Ġthe": "1"}}, "no integer"),
        ({"vocab": {"Ġthe": 1.5}}, "no integer"),
        ({"vocab": {"Ġthe": True}}, "no integer"),
        ({"model": {"type": "WordPiece"}}, "'WordPiece'"),
        ({"model": {"type": "Unigram"}}, "'Unigram'"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"model": {"dropout": 0.1}}, "dropout"),
        ({"model": {"merges": 3}}, "merges is int"),
        ({"model": {"merges": [["a"]]}}, r"merges\[0\]"),
        ({"model": {"merges": ["a b c"]}}, r"merges\[0\]"),
        ({"model": {"merges": [["zz", "zzz"]]}}, "cannot load"),
        ({"model": {"vocab": []}}, "vocab is list"),
        ({"json": {"model": None}}, "model is NoneType"),
        ({"json": {"added_tokens": [{"id": 5}]}}, r"added_tokens\[0\]"),
        ({"json": {"added_tokens": 3}}, "added_tokens is int"),
        ({"json": {"pre_tokenizer": {"type": "Nonsense"}}}, "cannot load"),
        ({"json": {"pre_tokenizer": None}}, "byte_fallback|none of llama"),
        ({"json": {"pre_tokenizer": {"type": "Whitespace"}}}, "byte_fallback"),
        ({"config": {"eos_token": None}, "map": {}}, "no end-of-text token"),
        ({"config": {"added_tokens_decoder": {"x": {"content": "a"}}}}, "added_tokens_decoder"),
        ({"config": {"added_tokens_decoder": {"9999": {"content": "<far>"}}}}, "9999 '<far>'"),
        ({"config": {"added_tokens_decoder": {"398": {"content": "<other>"}}}}, "id 398 is added as"),
        ({"config": {"added_tokens_decoder": {"5": {"content": tiny.EOS}}}}, "is added as id"),
        ({"config": {"added_tokens_decoder": {"405": {"content": "<far>"}}}, "n_vocab": 6}, "5 ids below the last"),
        ({"config": {"added_tokens_decoder": {"400": {"content": "Ġthe"}}}, "n_vocab": 1}, "is both id"),
        ({"config": {"chat_template": 3}}, "chat_template"),
        ({"config": {"chat_template": [{"name": "a"}]}}, "lacks its name or its template"),
        ({"raw": b'{"model": '}, "not valid JSON"),
        ({"raw": b'{"a":' * 50_000}, "nested too deeply"),
        ({"raw": b"[]"}, "list"),
    ],
)
def test_hostile_files(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    """Each broken or hostile tokenizer file is one clear error of the right type, before anything else is read."""
    size = tiny.byte_level_bpe(tmp_path, pre="gpt-2") + change.get("n_vocab", 0)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= change.get("vocab", {})
    content["model"] |= change.get("model", {})
    content |= change.get("json", {})
    path.write_bytes(change.get("raw") or json.dumps(content).encode())
    edit(tmp_path / "tokenizer_config.json", **change.get("config", {}))
    if "map" in change:
        write(tmp_path / "special_tokens_map.json", change["map"])
    with pytest.raises(VocabularyError, match=says):
        read_vocabulary(tmp_path, size)


def test_every_problem_is_named(tmp_path: Path) -> None:
    """A surplus token, an unknown pre-tokenizer and a bad template are reported together."""
    size = tiny.byte_level_bpe(tmp_path, pre="gpt-2")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    write(tmp_path / "tokenizer.json", content)
    edit(tmp_path / "tokenizer_config.json", chat_template=5)
    with pytest.raises(VocabularyError) as caught:
        read_vocabulary(tmp_path, size - 1)
    lines = str(caught.value).splitlines()
    assert [any(word in line for line in lines) for word in ("Lowercase", "<tool_call>", "chat_template")] == [True] * 3


def test_no_tokenizer(tmp_path: Path) -> None:
    """A folder without a tokenizer is an error that says how to make one."""
    with pytest.raises(VocabularyError, match="save_pretrained"):
        read_vocabulary(tmp_path, 10)


def test_tokenizer_files_may_be_links(tmp_path: Path) -> None:
    """The same vocabulary as that of the files behind them."""
    real, folder = tmp_path / "real", tmp_path / "model"
    n_vocab = tiny.byte_level_bpe(real)
    folder.mkdir()
    for path in real.iterdir():
        (folder / path.name).symlink_to(path)

    assert read_vocabulary(real, n_vocab) == read_vocabulary(folder, n_vocab)


@pytest.mark.parametrize(("spaces", "says"), [("split", "'▁▁'")])
def test_cuts_between_words(tmp_path: Path, spaces: str, says: str) -> None:
    """A tokenizer.json that cuts before spaces, with tokens that span them, is refused with an example."""
    size = tiny.llama_json_only(tmp_path, spaces=spaces)
    with pytest.raises(VocabularyError, match=says):
        read_vocabulary(tmp_path, size)


def test_open_merges_are_refused(tmp_path: Path) -> None:
    """A SentencePiece-style tokenizer.json that lacks a pair which llama.cpp would join is refused with that pair."""
    size = tiny.llama_json_only(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [pair for pair in merges if pair != ["▁t", "he"]]
    assert len(content["model"]["merges"]) == len(merges) - 1
    write(tmp_path / "tokenizer.json", content)
    with pytest.raises(VocabularyError, match=r"'▁t' \+ 'he'"):
        read_vocabulary(tmp_path, size)


def test_deterministic(tmp_path: Path) -> None:
    """The same folder gives the same metadata in the same order, wherever it lies."""
    sizes = [tiny.byte_level_bpe(tmp_path / name, pre="qwen2") for name in ("a", "somewhere/else")]
    one, other = (vocabulary_metadata(read_vocabulary(tmp_path / name, sizes[0])) for name in ("a", "somewhere/else"))
    assert list(one.items()) == list(other.items())


def test_metadata_keys() -> None:
    """Every part of a vocabulary has the key that llama.cpp reads; what is absent has none."""
    vocabulary = Vocabulary(
        model="llama",
        pre="default",
        tokens=["a", "b"],
        types=[1, 3],
        scores=[0.0, -1.0],
        special_ids={"bos": 0, "eos": 1, "unk": 0, "pad": 1, "fim_pre": 1},
        flags={"add_bos_token": True, "add_eos_token": False, "add_space_prefix": True},
        chat_templates={"default": "D", "tool_use": "T", "rag": "R"},
    )
    assert vocabulary_metadata(vocabulary) == {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.token_type": [1, 3],
        "tokenizer.ggml.scores": [0.0, -1.0],
        gguf.Keys.Tokenizer.BOS_ID: 0,
        gguf.Keys.Tokenizer.EOS_ID: 1,
        gguf.Keys.Tokenizer.UNK_ID: 0,
        gguf.Keys.Tokenizer.PAD_ID: 1,
        gguf.Keys.Tokenizer.FIM_PRE_ID: 1,
        gguf.Keys.Tokenizer.ADD_BOS: True,
        gguf.Keys.Tokenizer.ADD_EOS: False,
        gguf.Keys.Tokenizer.ADD_PREFIX: True,
        "tokenizer.chat_templates": ["rag", "tool_use"],
        "tokenizer.chat_template.rag": "R",
        "tokenizer.chat_template.tool_use": "T",
        "tokenizer.chat_template": "D",
    }


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def edit(path: Path, **entries: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    write(path, content | entries)


@pytest.mark.parametrize("text", sorted(ENDS_BY_TEXT))
def test_llama_cpp_ends_at_the_spellings_of_our_list(text: str, tmp_path: Path) -> None:
    """A control token of that spelling, which no role names, is an end there; another control token is not."""
    tokens = [*(chr(ord("a") + i) for i in range(20)), text, "<|other|>"]
    metadata: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 20 + [3, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 0,
    }
    write_vocabulary_file(tmp_path / "v.gguf", metadata)
    with LlamaTokens(tmp_path / "v.gguf") as llama:
        assert [True, False] == [llama.is_end(20), llama.is_end(21)]


@pytest.mark.parametrize("kind", ["llama-bpe", "smollm", "qwen2", "json prepend", "json never"])
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("rule", [None, "single_word", "lstrip", "rstrip", "normalized"])
def test_rules_of_added_tokens_that_llama_cpp_does_not_follow_are_named(
    tmp_path: Path, kind: str, special: bool, rule: str | None
) -> None:
    """Around an added token llama.cpp gives the tokenizer's ids, or a warning names the token and the rule."""
    size = KINDS[kind](tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    rules = {name: name == rule for name in ("single_word", "lstrip", "rstrip", "normalized")}
    content["added_tokens"].append({"id": size, "content": "<odd>", "special": special, **rules})
    write(tmp_path / "tokenizer.json", content)
    vocabulary = read_vocabulary(tmp_path, size + 1)
    write_vocabulary_file(tmp_path / "vocabulary.gguf", vocabulary_metadata(vocabulary))
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = [
        "the<odd>dog",
        "the <odd> dog",
        "the  <odd>  dog",
        "<odd>dog",
        "the<odd>",
        "the<odd><odd>dog",
        "<odd> <odd>",
    ]

    with LlamaTokens(tmp_path / "vocabulary.gguf") as llama:
        differing = [text for text in texts if own.encode(text).ids != llama.encode(text)]

    named = [text for text in vocabulary.warnings if f"'<odd>' ({rule})" in text]
    assert bool(differing) == bool(named) == bool(vocabulary.warnings), (differing, vocabulary.warnings)


@pytest.mark.parametrize(
    "tokens", [("ab", "bcd"), ("bcd", "ab"), ("<a>", "<a><b>"), ("abcd", "ab", "bcd"), ("  ", "   "), ("ab", "bc")]
)
def test_added_tokens_that_overlap_are_named(tmp_path: Path, tokens: tuple[str, ...]) -> None:
    """Of two that share characters llama.cpp takes the longest; a warning names the text where that matters."""
    size = tiny.byte_level_bpe(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    flags = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] += [{"id": size + i, "content": text, **flags} for i, text in enumerate(tokens)]
    write(tmp_path / "tokenizer.json", content)
    vocabulary = read_vocabulary(tmp_path, size + len(tokens))
    write_vocabulary_file(tmp_path / "vocabulary.gguf", vocabulary_metadata(vocabulary))
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = [a + b[n:] for a in tokens for b in tokens for n in range(len(b)) if a.endswith(b[:n])]

    with LlamaTokens(tmp_path / "vocabulary.gguf") as llama:
        differing = {text for text in texts if own.encode(text).ids != llama.encode(text)}

    named = {text for text in texts for warning in vocabulary.warnings if f" {text!r} (" in warning}
    assert differing == named


def test_flags_of_tokenizer_json_go_before_those_of_the_config(tmp_path: Path) -> None:
    """transformers takes the flags of tokenizer.json, and those of tokenizer_config.json only for other tokens."""
    size = tiny.byte_level_bpe(tmp_path)
    entry = {"content": tiny.TOOL, "special": False, "lstrip": True}
    write(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {str(size - 1): entry}})
    assert () == read_vocabulary(tmp_path, size).warnings

    entry = {"content": "<late>", "special": False, "lstrip": True, "rstrip": True}
    write(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {str(size): entry}})
    assert "'<late>' (lstrip, rstrip)" in read_vocabulary(tmp_path, size + 1).warnings[0]
