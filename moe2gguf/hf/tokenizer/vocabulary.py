"""The vocabulary of a Hugging Face folder, in llama.cpp's terms.

Three kinds of files are read, and the ids that llama.cpp gives are those of the checkpoint's own tokenizer:

* tokenizer.json, byte-level BPE -> "gpt2", with the pre-tokenizer recognized by what it does (pretokenizers.py);
* tokenizer.model, SentencePiece BPE -> "llama", scores as they are (sentencepiece_model.py);
* tokenizer.json alone, SentencePiece-style BPE -> "llama", scores derived from the merges (merge_scores.py).

Known differences that no GGUF can express, the same as in files by llama.cpp's converter: llama.cpp does not
normalize (NFC of Qwen2); it finds added tokens wherever they are spelled, of those that overlap the longest, and keeps
the spaces beside them (a warning names those for which this matters, see added_tokens.py: there are no other rules);
with a space prefix llama.cpp puts one before every stretch of text between special tokens, where a Metaspace of the
scheme "first" puts one at the start only, and none before a text that starts with a space.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gguf import TokenType

from moe2gguf.errors import CheckpointError, VocabularyError, list_names
from moe2gguf.hf.json_file import read_json
from moe2gguf.hf.paths import resolve_inside
from moe2gguf.hf.tokenizer import added_tokens, pretokenizers
from moe2gguf.hf.tokenizer.added_tokens import AddedToken
from moe2gguf.hf.tokenizer.chat_templates import read_chat_templates
from moe2gguf.hf.tokenizer.merge_scores import score_merges
from moe2gguf.hf.tokenizer.metaspace import SPACE, find_space_prefix
from moe2gguf.hf.tokenizer.sentencepiece_model import SentencePieceModel, read_sentencepiece
from moe2gguf.hf.tokenizer.special_tokens import (
    Surroundings,
    add_ends,
    find_special_ids,
    find_surroundings,
    list_unknown,
    place_added,
)
from moe2gguf.hf.tokenizer.token_table import TokenTable
from moe2gguf.hf.tokenizer.tokenizer_json import TokenizerJson, read_tokenizer_json
from moe2gguf.spec import Vocabulary

_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_SHOWN = 4
_NUMBERED = ("config.json", "generation_config.json")  # files that give special tokens as ids


@dataclass(frozen=True)
class _Files:
    """The tokenizer files of a folder."""

    folder: Path
    config: Mapping[str, Any]  # tokenizer_config.json, or empty
    tokenizer: TokenizerJson | None
    pieces: SentencePieceModel | None


@dataclass
class _Kind:
    """What the kind of tokenizer decides."""

    model: Literal["gpt2", "llama"]
    pre: str = "default"
    merges: list[str] | None = None
    add_space_prefix: bool = False


def read_vocabulary(folder: Path, n_vocab: int) -> Vocabulary:
    """Read the tokenizer of the checkpoint in `folder`, whose embedding has `n_vocab` rows.

    Raises:
        VocabularyError: a file is missing, broken or hostile, or no GGUF could tokenize like it; lists every problem.
    """
    try:
        files = _open(folder)
    except CheckpointError as error:
        raise VocabularyError(str(error)) from error
    problems: list[str] = []
    table = TokenTable(n_vocab)
    kind = _fill(table, files, problems)
    with _note_errors(problems):
        for token in _collect_added(files, problems):
            table.replace(token.id, token.text, token.type)
    with _note_errors(problems):
        rows = table.finish()
    special, flags, unknown = _find_special(table, files, problems)
    with _note_errors(problems):
        templates = read_chat_templates(folder, files.config)
    if problems:
        raise VocabularyError("\n".join(dict.fromkeys(problems)))
    left = add_ends(special, [row.text for row in rows], [_read_optional_json(folder, name) for name in _NUMBERED])
    warnings = _name_inexact_tokens(files)
    if unknown:
        warnings.append(
            f"these are no tokens of the model, which has {n_vocab}, and are left out: {list_names(unknown)}"
        )
    if left:
        names = ", ".join(f"{id_} {rows[id_].text!r}" for id_ in left[:_SHOWN])
        warnings.append(f"a GGUF file has no room for these ends of a text, llama.cpp goes on after them: {names}")
    return Vocabulary(
        model=kind.model,
        pre=kind.pre,
        tokens=[row.text for row in rows],
        types=[int(row.type) for row in rows],
        scores=[row.score for row in rows] if kind.model == "llama" else None,
        merges=kind.merges,
        special_ids=special,
        flags={**flags, "add_space_prefix": kind.add_space_prefix},
        chat_templates=templates,
        warnings=tuple(warnings),
    )


def _open(folder: Path) -> _Files:
    """Read the files; a tokenizer.model beside a byte-level tokenizer.json (Llama 3's tiktoken file) is not one."""
    config = _read_optional_json(folder, "tokenizer_config.json")
    json_path, model_path = resolve_inside(folder, "tokenizer.json"), resolve_inside(folder, "tokenizer.model")
    tokenizer = read_tokenizer_json(json_path) if json_path.exists() else None
    wants_pieces = model_path.exists() and not (tokenizer and tokenizer.is_byte_level)
    pieces = read_sentencepiece(model_path) if wants_pieces else None
    return _Files(folder, config, tokenizer, pieces)


def _fill(table: TokenTable, files: _Files, problems: list[str]) -> _Kind:
    """Enter the tokens of the model itself, without added ones, and return what its kind decides."""
    if files.pieces:
        return _fill_pieces(table, files.pieces, files, problems)
    if files.tokenizer and files.tokenizer.is_byte_level:
        return _fill_byte_level(table, files.tokenizer, files, problems)
    if files.tokenizer:
        return _fill_characters(table, files.tokenizer, files, problems)
    raise VocabularyError(
        f"{files.folder}: has neither tokenizer.json nor tokenizer.model; transformers can write a tokenizer.json from "
        "other files: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    )


def _fill_byte_level(table: TokenTable, tokenizer: TokenizerJson, files: _Files, problems: list[str]) -> _Kind:
    for text, id_ in tokenizer.vocab.items():
        table.put(id_, text, TokenType.NORMAL)
    kind = _Kind("gpt2", merges=[f"{left} {right}" for left, right in tokenizer.merges])
    if any(" " in left or " " in right for left, right in tokenizer.merges):
        problems.append("tokenizer.json: model.merges has a space inside a token, which no GGUF can hold")
    wish = files.config.get("clean_up_tokenization_spaces")
    with _note_errors(problems):
        kind.pre = pretokenizers.recognize(
            tokenizer.runtime,
            ignore_merges=tokenizer.ignore_merges,
            clean_spaces=wish if isinstance(wish, bool) else None,
        )
    return kind


def _fill_pieces(table: TokenTable, model: SentencePieceModel, files: _Files, problems: list[str]) -> _Kind:
    """Enter a SentencePiece model; a tokenizer.json beside it must have the same tokens."""
    for id_, (text, score, type_) in enumerate(model.pieces):
        raw = text.replace(SPACE, " ") if type_ is TokenType.USER_DEFINED else text
        table.put(id_, raw, type_, score)
    kind = _Kind("llama", add_space_prefix=model.add_space_prefix)
    if files.tokenizer:
        problems += _find_disagreements(model, files.tokenizer)
        with _note_errors(problems, "tokenizer.json"):
            kind.add_space_prefix = find_space_prefix(files.tokenizer.runtime, files.tokenizer.vocab)
    _apply_wished_prefix(kind, files)
    return kind


def _fill_characters(table: TokenTable, tokenizer: TokenizerJson, files: _Files, problems: list[str]) -> _Kind:
    """Enter a SentencePiece-style BPE vocabulary of tokenizer.json."""
    kind = _Kind("llama")
    whole = {*_BYTES, *(token.content for token in tokenizer.added)}
    scores: dict[str, float] = {}
    with _note_errors(
        problems, "tokenizer.json: llama.cpp would merge otherwise (a tokenizer.model beside it would help)"
    ):
        scores = score_merges(tokenizer.vocab, tokenizer.merges, whole)
    for text, id_ in tokenizer.vocab.items():
        type_ = TokenType.BYTE if text in _BYTES else TokenType.NORMAL
        table.put(id_, text, TokenType.UNKNOWN if text == tokenizer.unk_token else type_, scores.get(text, 0.0))
    lacking = len(_BYTES - tokenizer.vocab.keys())
    if not tokenizer.byte_fallback or lacking:
        problems.append(
            f"tokenizer.json: byte_fallback is {tokenizer.byte_fallback} and {lacking} of the 256 byte tokens (<0x00> "
            "...) are missing; llama.cpp aborts on a character that has neither a token nor bytes"
        )
    if tokenizer.ignore_merges:
        problems.append("tokenizer.json: model.ignore_merges with characters, which llama.cpp does not know")
    with _note_errors(problems, "tokenizer.json"):
        kind.add_space_prefix = find_space_prefix(tokenizer.runtime, tokenizer.vocab)
    _apply_wished_prefix(kind, files)
    return kind


def _apply_wished_prefix(kind: _Kind, files: _Files) -> None:
    """Let `add_prefix_space` of tokenizer_config.json decide, as transformers and llama.cpp's converter do."""
    wish = files.config.get("add_prefix_space")
    if isinstance(wish, bool):
        kind.add_space_prefix = wish


def _find_disagreements(model: SentencePieceModel, tokenizer: TokenizerJson) -> list[str]:
    """Compare the ordinary pieces of tokenizer.model with model.vocab of tokenizer.json."""
    texts = {id_: text for text, id_ in tokenizer.vocab.items()}
    differing = [
        f"{id_} ({text!r} and {texts.get(id_)!r})"
        for id_, (text, _, type_) in enumerate(model.pieces)
        if type_ is TokenType.NORMAL and texts.get(id_) != text
    ]
    if not differing:
        return []
    return [
        f"tokenizer.model and tokenizer.json disagree on {len(differing)} ids, like {', '.join(differing[:_SHOWN])}; "
        "remove the one that does not belong to this checkpoint"
    ]


def _collect_added(files: _Files, problems: list[str]) -> list[AddedToken]:
    listed = files.tokenizer.added if files.tokenizer else []
    if files.tokenizer:
        runtime = files.tokenizer.runtime.get_added_tokens_decoder()
        problems += [
            f"tokenizer.json: added token {token.content!r} says id {token.id}, but loading it gives another; its ids "
            "must continue the vocabulary"
            for token in listed
            if token.id not in runtime or runtime[token.id].content != token.content
        ]
    extra = added_tokens.read_listing(_read_optional_json(files.folder, "added_tokens.json"), "added_tokens.json")
    return added_tokens.merge(extra, listed, added_tokens.read_decoder(files.config, "tokenizer_config.json"))


def _name_inexact_tokens(files: _Files) -> list[str]:
    """Return a warning that names the added tokens beside which llama.cpp gives other ids, if there are any.

    As in transformers, what tokenizer.json says of a token goes before what tokenizer_config.json says of it.
    """
    listed = added_tokens.read_decoder(files.config, "tokenizer_config.json")
    listed += files.tokenizer.added if files.tokenizer else []
    normalizer = files.tokenizer.runtime.normalizer if files.tokenizer else None
    inexact = [
        f"{token.content!r} ({', '.join(reasons)})"
        for token in {token.content: token for token in listed}.values()
        if (reasons := added_tokens.list_unknown_rules(token, normalizer))
    ]
    differ = "the ids of such texts differ from the tokenizer's"
    overlaps = [
        f"{text!r} ({longest!r}, not {first!r})"
        for text, first, longest in added_tokens.list_overlaps(token.content for token in listed)
    ]
    found = {
        "llama.cpp finds these added tokens wherever they are spelled and keeps the spaces beside them": inexact,
        "where added tokens overlap llama.cpp takes the longest, not the first": overlaps,
    }
    return [f"{what}; {differ}: {list_names(names, _SHOWN)}" for what, names in found.items() if names]


def _find_special(
    table: TokenTable, files: _Files, problems: list[str]
) -> tuple[dict[str, int], dict[str, bool], list[str]]:
    """Return the special ids, the flags add_bos_token and add_eos_token, and what files state and nothing is."""
    by_text: dict[str, Mapping[str, Any]] = {"tokenizer_config.json": files.config}
    by_id: dict[str, Mapping[str, Any]] = {}
    with _note_errors(problems):
        by_text["special_tokens_map.json"] = _read_optional_json(files.folder, "special_tokens_map.json")
        by_id |= {name: _read_optional_json(files.folder, name) for name in _NUMBERED}
    if files.pieces:
        by_id["tokenizer.model"] = files.pieces.special_ids
    elif files.tokenizer and files.tokenizer.unk_token:
        by_text["tokenizer.json"] = {"unk_token": files.tokenizer.unk_token}
    ids = {row.text: id_ for id_, row in table.rows.items()}
    special = find_special_ids(ids, table.n_vocab, by_text, by_id)
    unknown = list_unknown(ids, table.n_vocab, by_text, by_id)
    around = Surroundings(before=[special["bos"]] if "bos" in special else [])  # SentencePiece's own way
    if files.tokenizer:
        with _note_errors(problems, "tokenizer.json"):
            around = find_surroundings(files.tokenizer.runtime)
    special, flags, wrong = place_added(special, around, files.config)
    problems += [f"{files.folder}: {problem}" for problem in wrong]
    return special, flags, unknown


def _read_optional_json(folder: Path, name: str) -> dict[str, Any]:
    path = resolve_inside(folder, name)
    return read_json(path) if path.exists() else {}


@contextmanager
def _note_errors(problems: list[str], where: str | None = None) -> Iterator[None]:
    """Turn an error into a line of `problems`, and go on behind the block."""
    try:
        yield
    except (CheckpointError, VocabularyError) as error:
        problems.append(str(error))
    except ValueError as error:
        problems.append(f"{where}: {error}" if where else str(error))
    except BaseException as error:
        if (
            type(error).__name__ != "PanicException"
        ):  # how the tokenizers package reports a defect of a file, or its own
            raise
        problems.append(f"{where or 'tokenizer.json'}: the tokenizers package fails on it ({error})")
