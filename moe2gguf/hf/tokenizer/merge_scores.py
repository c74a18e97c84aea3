"""Scores that make llama.cpp merge a SentencePiece-style vocabulary as its tokenizer.json does.

tokenizer.json ranks *pairs*: of all neighbors that are a listed pair, the pair of the lowest rank is joined first.
llama.cpp's SPM ranks *tokens*: of all neighbors whose joined text is any token, the one with the highest score is
joined first, the leftmost among equals (https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-vocab.cpp#L98).
(`gguf.LlamaHfVocab` gives every token the same score, which leaves only "leftmost", and other ids.)

So we number the tokens in the order in which the merges first make them: score 0, -1, -2 ... That is the same order,
in every text, if these hold. They do for tokenizers converted from SentencePiece, and each is checked:

1. The merges are closed: whenever two symbols that can stand beside each other join to a token, the pair is listed.
   Symbols are single characters, and tokens that merges make. Tokens that no merge makes are then out of llama.cpp's
   reach as well, so their score does not matter; one that it could reach is a missing pair.
2. All pairs of a token follow one another in rank, with no other token's pair between them. Runs of one character are
   excepted: in Llama 2 all runs of spaces have one score, and transformers ranks their pairs by length
   (`generate_merges` in
   https://github.com/huggingface/transformers/blob/00111b31e662/src/transformers/convert_slow_tokenizer.py).
   Tokens whose pairs are mixed get one score for all, as the SentencePiece model had it.
3. Runs of one character come out alike. That is tried: both ways to merge are played on runs of every length that
   matters.

What is left is a token made by two pairs that share a symbol without being a run (`ab|abab` and `abab|ab`): llama.cpp
takes the left one, as SentencePiece does, where tokenizer.json could prefer the right.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import pairwise

_SHOWN = 4
_LONGEST_RUN = 256  # characters; a longer token of one character is not checked beyond

Pair = tuple[str, str]


def score_merges(vocab: Mapping[str, int], merges: Sequence[Pair], whole: Iterable[str]) -> dict[str, float]:
    """Return the score of every token of `vocab` but those of `whole`.

    Merged tokens come first, in the order of `merges`; then the others, by id, as SentencePiece numbers them.
    `whole` are tokens that are never merged and need no score: bytes and added tokens.

    Raises:
        ValueError: the merges cannot be written as scores; the message says which and why.
    """
    whole = set(whole)
    unknown = [left + right for left, right in merges if left + right not in vocab]
    if unknown:
        raise ValueError(f"{len(unknown)} merges make no token of the vocabulary, like {unknown[0]!r}")
    scores: dict[str, float] = {}
    mixed: list[str] = []
    for block in _group_tokens(merges):
        scores |= dict.fromkeys(block, float(-len(scores)))
        mixed += block if len(block) > 1 and not _is_run("".join(block)) else []
    problems = [*_find_missing(vocab, merges, whole), *_name_mixed(mixed), *_find_odd_runs(merges, scores)]
    if problems:
        raise ValueError("; ".join(problems))
    rest = sorted(vocab.keys() - whole - scores.keys(), key=lambda text: vocab[text])
    return scores | {text: float(-rank) for rank, text in enumerate(rest, len(scores))}


def _group_tokens(merges: Sequence[Pair]) -> Iterator[list[str]]:
    """Yield the tokens in the order in which merges first make them; those whose pairs are mixed come together."""
    last = {left + right: rank for rank, (left, right) in enumerate(merges)}
    block: dict[str, None] = {}
    end = -1
    for rank, (left, right) in enumerate(merges):
        if rank > end and block:
            yield list(block)
            block = {}
        block[left + right] = None
        end = max(end, last[left + right])
    if block:
        yield list(block)


def _find_missing(vocab: Mapping[str, int], merges: Sequence[Pair], whole: Set[str]) -> list[str]:
    """Check 1: find tokens that llama.cpp would join from symbols which the merges never join."""
    listed = set(merges)
    made = {left + right for left, right in merges}
    missing = [
        (text[:cut], text[cut:])
        for text in vocab
        if text not in whole
        for cut in range(1, len(text))
        if (cut == 1 or text[:cut] in made)
        and (cut == len(text) - 1 or text[cut:] in made)
        and (text[:cut], text[cut:]) not in listed
    ]
    if not missing:
        return []
    shown = ", ".join(f"{left!r} + {right!r}" for left, right in missing[:_SHOWN])
    return [f"llama.cpp would join {len(missing)} pairs that model.merges does not list, like {shown}"]


def _name_mixed(tokens: Sequence[str]) -> list[str]:
    """Check 2: speak of tokens whose pairs are not one stretch of ranks."""
    if not tokens:
        return []
    shown = ", ".join(map(repr, tokens[:_SHOWN]))
    return [f"{len(tokens)} tokens have other tokens' pairs between their own in model.merges, like {shown}"]


def _find_odd_runs(merges: Sequence[Pair], scores: Mapping[str, float]) -> list[str]:
    """Check 3: find characters whose runs the scores merge otherwise than the ranks."""
    ranks: dict[str, dict[tuple[int, int], int]] = defaultdict(dict)
    for rank, (left, right) in enumerate(merges):
        if _is_run(left + right):
            ranks[left[0]].setdefault((len(left), len(right)), rank)
    problems = []
    for character, by_rank in ranks.items():
        by_score = {pair: -scores[character * sum(pair)] for pair in by_rank}
        longest = min(max(map(sum, by_rank)), _LONGEST_RUN)
        for length in sorted({*range(3, min(longest, 32) + 3), longest, longest + 1, longest + 2, 2 * longest}):
            listed, scored = _merge_run(length, by_rank), _merge_run(length, by_score)
            if listed != scored:
                problems.append(f"a run of {length} {character!r} would become {scored} instead of {listed} characters")
                break
    return problems


def _merge_run(length: int, order: Mapping[tuple[int, int], float]) -> list[int]:
    """Merge a run of equal characters, the pair of the lowest order first, the leftmost among equals.

    Symbols are represented by their lengths; returns those that remain.
    """
    symbols = [1] * length
    while True:
        pairs = enumerate(pairwise(symbols))
        found = [(order[pair], index) for index, pair in pairs if pair in order]
        if not found:
            return symbols
        _, index = min(found)
        symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]


def _is_run(text: str) -> bool:
    return text == text[0] * len(text)
