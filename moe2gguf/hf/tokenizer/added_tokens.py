"""Tokens that a checkpoint adds to its vocabulary, from the three files that may list them."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from tokenizers.normalizers import Normalizer

from moe2gguf.errors import VocabularyError

_LONGEST, _MOST_PAIRS = 100, 10_000

RULES = ("single_word", "lstrip", "rstrip", "normalized")
"""Flags by which the `tokenizers` package finds a token only between words, swallows the spaces before or behind it,
or looks for it in the normalized text.
"""


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before anything else happens to it."""

    id: int
    content: str
    special: bool
    rules: frozenset[str] = frozenset()  # those of RULES that its entry sets

    @property
    def type(self) -> TokenType:
        """CONTROL if special, else USER_DEFINED.

        Like llama.cpp's converter we trust the spelling where a checkpoint forgot the flag (Qwen2.5's
        `<|fim_prefix|>`): https://github.com/ggml-org/llama.cpp/blob/0c1e57098/conversion/base.py#L1557
        """
        text = self.content
        looks_special = (
            text in ("<pad>", "<mask>")
            or (text.startswith("<|") and text.endswith("|>"))
            or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))
        )
        return TokenType.CONTROL if self.special or looks_special else TokenType.USER_DEFINED

    @property
    def text(self) -> str:
        """The spelling that llama.cpp looks for in the raw text: a user-defined token's `▁` is a space there."""
        return self.content if self.type is TokenType.CONTROL else self.content.replace("▁", " ")


def check_added_token(entry: Any, where: str, id_: object = None) -> AddedToken:
    """Check an entry `{"id": ..., "content": ..., "special": ...}`; `id_` stands in for an absent id.

    Raises:
        VocabularyError: a field is missing or of the wrong type.
    """
    if not isinstance(entry, dict):
        raise VocabularyError(f"{where} is {type(entry).__name__}, expected an object")
    id_ = entry.get("id", id_)
    content, special = entry.get("content"), entry.get("special", False)
    if type(id_) is not int or not isinstance(content, str) or not content or not isinstance(special, bool):
        raise VocabularyError(
            f"{where} is not a token with an integer id, a content and a special flag: {entry!r:.200}"
        )
    return AddedToken(id_, content, special, frozenset(rule for rule in RULES if entry.get(rule) is True))


def list_unknown_rules(token: AddedToken, normalizer: Normalizer | None) -> list[str]:
    """Return the rules of `token` that llama.cpp does not follow, in the order of RULES.

    llama.cpp strips spaces only for pre-tokenizers and model names of its own list (Jina's, and names like Phi-3):
    https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp (`LLAMA_TOKEN_ATTR_RSTRIP`).
    A normalizer matters only if it changes the token's spelling.
    """
    changes = normalizer is not None and normalizer.normalize_str(token.content) != token.content
    return [rule for rule in RULES if rule in token.rules and (rule != "normalized" or changes)]


def list_overlaps(tokens: Iterable[str]) -> list[tuple[str, str, str]]:
    """Return (text, first, longest): texts of two tokens that share characters, and what is found in them.

    The `tokenizers` package takes the token that begins first, llama.cpp the longest wherever it stands:
    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-vocab.cpp (`tokenizer_st_partition`). Runs of one
    character, such as spaces, are cut alike by both. Nothing is said of absurdly long or absurdly many tokens.
    """
    known = {token for token in tokens if len(token) <= _LONGEST}
    beginning: dict[str, list[str]] = {}
    for token in sorted(known):
        for n in range(1, len(token)):
            beginning.setdefault(token[:n], []).append(token)
    pairs = (
        (first, longest, first + longest[n:])
        for first in sorted(known)
        for n in range(1, len(first))
        for longest in beginning.get(first[-n:], ())
        if len(longest) > len(first) and len({*first, *longest}) > 1
    )
    return [
        (text, first, longest)
        for first, longest, text in itertools.islice(pairs, _MOST_PAIRS)
        if next(text[:n] for n in range(len(text), 0, -1) if text[:n] in known) == first
    ]


def read_decoder(config: Mapping[str, Any], where: str) -> list[AddedToken]:
    """Return `added_tokens_decoder` of tokenizer_config.json, which maps ids (as strings) to tokens.

    Raises:
        VocabularyError: it is malformed.
    """
    entries = config.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise VocabularyError(f"{where}: added_tokens_decoder is {type(entries).__name__}, expected an object")
    ids = {key: int(key) if key.isascii() and key.isdigit() and len(key) < 12 else key for key in entries}
    return [
        check_added_token(entry, f"{where}: added_tokens_decoder[{key!r}]", ids[key]) for key, entry in entries.items()
    ]


def read_listing(listing: Mapping[str, Any], where: str) -> list[AddedToken]:
    """Return added_tokens.json, which maps tokens to ids.

    Raises:
        VocabularyError: it is malformed.
    """
    return [check_added_token({"content": text}, f"{where}: {text!r}", id_) for text, id_ in listing.items()]


def merge(*sources: Iterable[AddedToken]) -> list[AddedToken]:
    """Join the sources, by id; of two that give an id the same content the later one decides whether it is special.

    Raises:
        VocabularyError: two give an id, or a content, different partners; lists them all.
    """
    by_id: dict[int, AddedToken] = {}
    ids: dict[str, int] = {}
    problems = []
    for token in (token for source in sources for token in source):
        known = by_id.get(token.id, token)
        if known.content != token.content:
            problems.append(f"id {token.id} is added as {known.content!r} and as {token.content!r}")
        elif ids.setdefault(token.content, token.id) != token.id:
            problems.append(f"{token.content!r} is added as id {ids[token.content]} and as id {token.id}")
        else:
            by_id[token.id] = token
    if problems:
        raise VocabularyError("\n".join(f"added tokens: {problem}" for problem in problems))
    return [by_id[id_] for id_ in sorted(by_id)]
