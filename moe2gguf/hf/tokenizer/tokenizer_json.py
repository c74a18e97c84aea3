"""tokenizer.json: the tokenizer as the `tokenizers` package runs it, and its parts as checked values."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moe2gguf.errors import VocabularyError
from moe2gguf.hf.json_file import read_json
from moe2gguf.hf.tokenizer.added_tokens import AddedToken, check_added_token


@dataclass(frozen=True)
class TokenizerJson:
    """A tokenizer.json with a BPE model.

    `vocab` maps a token to its id, `merges` are pairs in the order of their rank, `added` the added tokens.
    """

    runtime: Tokenizer
    vocab: Mapping[str, int]
    merges: list[tuple[str, str]]
    added: list[AddedToken]
    unk_token: str | None
    byte_fallback: bool
    ignore_merges: bool

    @property
    def is_byte_level(self) -> bool:
        """Whether it spells text in the alphabet of bytes (GPT-2's way) rather than in characters."""
        return "ByteLevel" in f"{self.runtime.pre_tokenizer!r}{self.runtime.normalizer!r}"


def read_tokenizer_json(path: Path) -> TokenizerJson:
    """Read a tokenizer.json.

    Raises:
        CheckpointError: no sound JSON.
        VocabularyError: its model is no BPE, has options that llama.cpp does not know, or the `tokenizers` package
            refuses it.
    """
    content = read_json(path)
    model = _read_mapping(content, "model", path)
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise VocabularyError(
            f"{path}: model.type is {kind!r}; only BPE has an exact twin in llama.cpp's arch llama "
            "(a Unigram or WordPiece model would be read with other tokens than it was trained on)"
        )
    problems = [
        f"{path}: model.{key} is {model[key]!r}, which llama.cpp does not know"
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(key)
    ]
    if problems:
        raise VocabularyError("\n".join(problems))
    vocab, merges = _read_vocab(model, path), _read_merges(model, path)
    added = [
        check_added_token(entry, f"{path}: added_tokens[{i}]") for i, entry in enumerate(_read_added(content, path))
    ]
    return TokenizerJson(
        runtime=load_tokenizer(path),
        vocab=vocab,
        merges=merges,
        added=added,
        unk_token=_read_optional(model, "unk_token", str, path),
        byte_fallback=bool(_read_optional(model, "byte_fallback", bool, path)),
        ignore_merges=bool(_read_optional(model, "ignore_merges", bool, path)),
    )


def load_tokenizer(path: Path) -> Tokenizer:
    """Let the `tokenizers` package load the file, for whole texts: what the file says of cut or filled ones is dropped.

    Raises:
        VocabularyError: the package refuses it, or panics.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise VocabularyError(f"{path}: the tokenizers package cannot load it ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_vocab(model: Mapping[str, Any], path: Path) -> dict[str, int]:
    vocab = _read_mapping(model, "vocab", path)
    wrong = [token for token, id_ in vocab.items() if type(id_) is not int]
    if wrong:
        raise VocabularyError(f"{path}: model.vocab[{wrong[0]!r}] is no integer (and {len(wrong) - 1} more)")
    return vocab


def _read_merges(model: Mapping[str, Any], path: Path) -> list[tuple[str, str]]:
    """Return model.merges as pairs; both spellings, "a b" and ["a", "b"], are in use."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise VocabularyError(f"{path}: model.merges is {type(merges).__name__}, expected a list")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for index, pair in enumerate(pairs):
        if not _is_pair(pair):
            raise VocabularyError(f"{path}: model.merges[{index}] is {merges[index]!r}, expected two tokens")
    return [(left, right) for left, right in pairs]


def _is_pair(pair: Any) -> bool:
    """Return whether this is a list of two texts, neither of them empty."""
    return isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is type(pair[1]) is str and all(pair)


def _read_added(content: Mapping[str, Any], path: Path) -> list[Any]:
    """Return the list of added tokens; absent means none."""
    added = content.get("added_tokens") or []
    if not isinstance(added, list):
        raise VocabularyError(f"{path}: added_tokens is {type(added).__name__}, expected a list")
    return added


def _read_mapping(content: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = content.get(key)
    if not isinstance(value, dict):
        raise VocabularyError(f"{path}: {key} is {type(value).__name__}, expected an object")
    return value


def _read_optional(content: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    value = content.get(key)
    if value is not None and not isinstance(value, kind):
        raise VocabularyError(f"{path}: model.{key} is {value!r}, expected {kind.__name__}")
    return value
