"""Scores rank tokens as merges rank pairs."""

import random
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, models

from moe2gguf.hf.tokenizer.merge_scores import score_merges


def vocab_of(text: str) -> dict[str, int]:
    return {token: id_ for id_, token in enumerate(text.split())}


def spm(text: str, vocab: dict[str, int], scores: dict[str, float]) -> list[str]:
    """Merge as llama.cpp's SPM does: the best score first, the leftmost among equals. The plain definition."""
    symbols = list(text)
    while True:
        found = [
            (-scores.get(left + right, 0.0), index)
            for index, (left, right) in enumerate(pairwise(symbols))
            if left + right in vocab
        ]
        if not found:
            return symbols
        _, index = min(found)
        symbols[index : index + 2] = ["".join(symbols[index : index + 2])]


def closed(vocab: dict[str, int], order: list[str]) -> list[tuple[str, str]]:
    """Return every pair that makes a token, the tokens in the given order."""
    return [(token[:cut], token[cut:]) for token in order for cut in range(1, len(token)) if _both(vocab, token, cut)]


def _both(vocab: dict[str, int], token: str, cut: int) -> bool:
    return token[:cut] in vocab and token[cut:] in vocab


def test_order_of_merges() -> None:
    """The token that is merged first has score 0, the next -1; characters follow by id; whole tokens have none."""
    vocab = vocab_of("<s> b a ab aab c")
    assert score_merges(vocab, [("a", "b"), ("a", "ab")], ["<s>"]) == {"ab": 0, "aab": -1, "b": -2, "a": -3, "c": -4}


def test_same_pieces_as_tokenizers() -> None:
    """On random texts over random closed vocabularies both ways to merge give the same pieces."""
    rng = random.Random(7)
    compared = 0
    for _ in range(60):
        texts = {"".join(rng.choice("abc") for _ in range(rng.randrange(2, 5))) for _ in range(8)}
        tokens = [*"abc", *sorted(texts)]
        vocab = {token: id_ for id_, token in enumerate(tokens)}
        reachable = _reachable(vocab)
        vocab = {token: id_ for id_, token in enumerate(t for t in tokens if t in reachable)}
        order = [token for token in vocab if len(token) > 1]
        rng.shuffle(order)
        order.sort(key=len)
        merges = closed(vocab, order)
        try:
            scores = score_merges(vocab, merges, [])
        except ValueError:
            continue
        tokenizer = Tokenizer(models.BPE(vocab, merges))
        for _ in range(30):
            text = "".join(rng.choice("abc") for _ in range(9))
            expected = tokenizer.encode(text).tokens
            if any(_overlaps(token) for token in vocab):
                continue  # the documented exception
            assert expected == spm(text, vocab, scores)
            compared += 1
    assert compared > 100


def _reachable(vocab: dict[str, int]) -> set[str]:
    known = {token for token in vocab if len(token) == 1}
    while True:
        more = {t for t in vocab if any(t[:c] in known and t[c:] in known for c in range(1, len(t)))} - known
        if not more:
            return known
        known |= more


def _overlaps(token: str) -> bool:
    """Say whether a token starts as it ends, so that two pairs of it can share a symbol."""
    return any(token[:size] == token[-size:] for size in range(1, len(token)))


@pytest.mark.parametrize("by_length", [True, False])
def test_runs_of_spaces(by_length: bool) -> None:
    """Llama 2's runs of spaces, all of one score, come out alike however transformers ordered their pairs."""
    runs = ["▁" * n for n in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 15)]
    vocab = {token: id_ for id_, token in enumerate([*runs, "▁", "x"])}
    merges = closed(vocab, runs)
    merges.sort(key=lambda pair: (-len(pair[0]), -len(pair[1])) if by_length else (0, 0))
    scores = score_merges(vocab, merges, [])
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    for length in range(60):
        text = "▁" * length + "x" + "▁" * (length // 2)
        assert tokenizer.encode(text).tokens == spm(text, vocab, scores)


@pytest.mark.parametrize(
    ("tokens", "merges", "says"),
    [
        ("a b c ab bc abc", [("a", "b"), ("b", "c"), ("ab", "c")], "'a' \\+ 'bc'"),
        ("a b ab", [], "'a' \\+ 'b'"),
        ("a ab", [], "'a' \\+ 'b'"),
        ("a b c ab bc abc d bd", [("a", "b"), ("b", "c"), ("ab", "c"), ("b", "d"), ("a", "bc")], "'abc', 'bd'"),
        ("a b", [("a", "b")], "make no token"),
        ("a aa aaa aaaa", [("a", "a"), ("a", "aa"), ("aa", "a"), ("aa", "aa"), ("a", "aaa"), ("aaa", "a")], None),
        ("a aa aaa aaaa", [("a", "a"), ("aa", "aa"), ("a", "aaa"), ("aaa", "a"), ("aa", "a"), ("a", "aa")], None),
    ],
)
def test_what_scores_cannot_say(tokens: str, merges: list[tuple[str, str]], says: str | None) -> None:
    """Merges that are not closed, or mixed, or make no token, are refused with an example; runs are tried out."""
    vocab = vocab_of(tokens)
    if says:
        with pytest.raises(ValueError, match=says):
            score_merges(vocab, merges, [])
        return
    scores = score_merges(vocab, merges, [])
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    for length in range(1, 12):
        assert tokenizer.encode("a" * length).tokens == spm("a" * length, vocab, scores)
