"""A pre-tokenizer is recognized by what it does."""

import unicodedata

import pytest
from tiny_tokenizers import PRE_TOKENIZERS as PUBLISHED
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from moe2gguf.errors import VocabularyError
from moe2gguf.hf.tokenizer import pretokenizers
from moe2gguf.hf.tokenizer.pretokenizers import PRE_TOKENIZERS, PROBES, list_known_names, recognize


def untrained(pre_tokenizer: pre_tokenizers.PreTokenizer, **options: bool) -> Tokenizer:
    """Return a tokenizer with bytes for tokens: there is nothing in its vocabulary to recognize it by."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: id_ for id_, token in enumerate(alphabet)}, [], **options))
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


@pytest.mark.parametrize("name", PUBLISHED)
def test_recognizes_published(name: str) -> None:
    """The pre-tokenizers of published checkpoints get the names that llama.cpp has for them."""
    row = next(row for row in PRE_TOKENIZERS if row.name == name)
    tokenizer = untrained(PUBLISHED[name]())
    assert name == recognize(tokenizer, ignore_merges=row.ignore_merges, clean_spaces=row.clean_spaces)


def test_probes_survive_composition() -> None:
    """The probes are composed already, so that a normalizer to form C does not show."""
    assert list(PROBES) == [unicodedata.normalize("NFC", text) for text in PROBES]
    tokenizer = untrained(PUBLISHED["qwen2"]())
    tokenizer.normalizer = normalizers.NFC()
    assert recognize(tokenizer, ignore_merges=False, clean_spaces=False) == "qwen2"


def test_rows_differ() -> None:
    """No two rows are the same in pieces and flags: each can be told from every other."""
    keys = [
        (
            tuple(tuple(pretokenizers._make_cutter(row.steps)(text)) for text in PROBES),
            row.ignore_merges,
            row.clean_spaces,
        )
        for row in PRE_TOKENIZERS
    ]
    assert len(keys) == len(set(keys))
    assert len(list_known_names()) == len(set(list_known_names()))


def test_flags_decide_between_equals() -> None:
    """ignore_merges and clean_spaces choose among names that cut alike; without a wish the first is taken."""
    llama3, digits = PUBLISHED["llama-bpe"](), PUBLISHED["smollm"]()
    assert recognize(untrained(llama3), ignore_merges=True, clean_spaces=None) == "llama-bpe"
    assert recognize(untrained(llama3), ignore_merges=False, clean_spaces=None) == "dbrx"
    assert recognize(untrained(digits), ignore_merges=False, clean_spaces=False) == "smollm"
    assert recognize(untrained(digits), ignore_merges=False, clean_spaces=True) == "starcoder"
    assert recognize(untrained(digits), ignore_merges=False, clean_spaces=None) == "smollm"


def test_ignore_merges_without_effect() -> None:
    """An ignore_merges that no name has is accepted when the merges reach every token, and refused when not."""
    digits = PUBLISHED["smollm"]()
    assert recognize(untrained(digits), ignore_merges=True, clean_spaces=False) == "smollm"
    vocab = {token: id_ for id_, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġhello"])}
    tokenizer = Tokenizer(models.BPE(vocab, [], ignore_merges=True))
    tokenizer.pre_tokenizer = digits
    with pytest.raises(VocabularyError, match="ignore_merges=True"):
        recognize(tokenizer, ignore_merges=True, clean_spaces=False)


def test_coarser_twin_needs_the_vocabulary() -> None:
    """deepseek-llm splits digits where llama.cpp does not: right only while no token has two digits."""
    digits = untrained(PUBLISHED["deepseek-llm"]())
    assert recognize(digits, ignore_merges=False, clean_spaces=None) == "deepseek-llm"
    vocab = {token: id_ for id_, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "33"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("3", "3")]))
    tokenizer.pre_tokenizer = PUBLISHED["deepseek-llm"]()
    with pytest.raises(VocabularyError, match="none of llama"):
        recognize(tokenizer, ignore_merges=False, clean_spaces=None)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
        lambda t: setattr(t, "normalizer", normalizers.NFKC()),
        lambda t: setattr(t, "normalizer", normalizers.StripAccents()),
        lambda t: setattr(t, "normalizer", normalizers.Strip()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda t: setattr(
            t,
            "pre_tokenizer",
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(r"\p{N}{1,4}"), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                ]
            ),
        ),
    ],
)
def test_unknown_is_refused(change: object) -> None:
    """A normalizer or pre-tokenizer that does something else is an error that shows it and names the known ones."""
    tokenizer = untrained(PUBLISHED["gpt-2"]())
    change(tokenizer)  # type: ignore[operator]
    with pytest.raises(VocabularyError) as caught:
        recognize(tokenizer, ignore_merges=False, clean_spaces=None)
    message = str(caught.value)
    assert "llama-bpe" in message
    assert "smaug-bpe" in message
    assert type(tokenizer.pre_tokenizer).__name__ in message
