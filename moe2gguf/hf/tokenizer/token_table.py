"""One row per token id: text, type and score, and everything that can be wrong with them."""

from dataclasses import dataclass, field
from typing import NamedTuple

from gguf import TokenType

from moe2gguf.errors import VocabularyError, list_names

ADDED_SCORE = -1000.0
"""The score of a token that takes part in no merge, as llama.cpp's converter gives it."""

_SHOWN = 8


class Row(NamedTuple):
    """A token."""

    text: str
    type: TokenType
    score: float


@dataclass
class TokenTable:
    """The rows of a vocabulary of `n_vocab` embeddings, filled by `put` and `replace`, taken out by `finish`."""

    n_vocab: int
    rows: dict[int, Row] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def put(self, id_: int, text: str, type_: TokenType, score: float = 0.0) -> None:
        """Enter a token; a second one under the same id is a problem."""
        if id_ in self.rows:
            self.problems.append(f"id {id_} belongs to {self.rows[id_].text!r} and to {text!r}")
            return
        self.rows[id_] = Row(text, type_, score)

    def replace(self, id_: int, text: str, type_: TokenType) -> None:
        """Enter a token over what is there, as added tokens are; a token that keeps its text keeps its score."""
        before = self.rows.get(id_)
        if before and before.text == text:
            kept = TokenType.UNKNOWN if before.type is TokenType.UNKNOWN else type_
            self.rows[id_] = Row(text, kept, before.score)
        else:
            self.rows[id_] = Row(text, type_, ADDED_SCORE)

    def finish(self) -> list[Row]:
        """Return `n_vocab` rows: those entered, then unused `[PADi]` for embeddings that no token has.

        Raises:
            VocabularyError: an id is taken twice, negative, or has no embedding; two ids have the same text
                (llama.cpp aborts on it); ids are missing between the first and the last. Lists all of it.
        """
        self._check_ids()
        self._check_texts()
        if self.problems:
            raise VocabularyError("\n".join(self.problems))
        taken = {row.text for row in self.rows.values()}
        return [self.rows.get(id_) or _make_padding(id_, taken) for id_ in range(self.n_vocab)]

    def _check_ids(self) -> None:
        """Find negative ids, ids without an embedding, and holes."""
        negative = sorted(id_ for id_ in self.rows if id_ < 0)
        if negative:
            self.problems.append(f"negative ids: {self._name_ids(negative)}")
        surplus = sorted(id_ for id_ in self.rows if id_ >= self.n_vocab)
        if surplus:
            self.problems.append(
                f"the embedding has {self.n_vocab} rows, but the tokenizer has {len(surplus)} more tokens: "
                f"{self._name_ids(surplus)}; the tokenizer belongs to another checkpoint, or the embedding was not "
                "resized when tokens were added (model.resize_token_embeddings)"
            )
        last = max((id_ for id_ in self.rows if id_ < self.n_vocab), default=-1)
        holes = [id_ for id_ in range(last) if id_ not in self.rows]
        if holes:
            self.problems.append(
                f"{len(holes)} ids below the last token have no token: {list_names([*map(str, holes)], _SHOWN)}; "
                "the tokenizer files are incomplete"
            )
        if not self.rows:
            self.problems.append("the tokenizer has no tokens")

    def _check_texts(self) -> None:
        """Find texts that are empty or stand under two ids."""
        ids: dict[str, int] = {}
        for id_, row in sorted(self.rows.items()):
            if not row.text:
                self.problems.append(f"id {id_} has an empty text")
            if ids.setdefault(row.text, id_) != id_:
                self.problems.append(f"{row.text!r} is both id {ids[row.text]} and id {id_}; llama.cpp aborts on it")

    def _name_ids(self, ids: list[int]) -> str:
        return list_names([f"{id_} {self.rows[id_].text!r}" for id_ in ids], _SHOWN)


def _make_padding(id_: int, taken: set[str]) -> Row:
    """Return the row of an embedding without a token, under a name that no token has."""
    text = f"[PAD{id_}]"
    while text in taken:
        text = f"[{text}]"
    return Row(text, TokenType.UNUSED, ADDED_SCORE * 10)
