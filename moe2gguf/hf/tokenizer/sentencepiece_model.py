"""tokenizer.model: a SentencePiece model, its pieces, and what it does to a text before it cuts it.

The `sentencepiece` package loads the file, which proves it sound, but does not tell the kind of the model, the flags
of its normalizer or which pieces are user-defined. Those few fields are read from the file itself, a protocol buffer:
https://github.com/google/sentencepiece/blob/v0.2.0/src/sentencepiece_model.proto
(encoding: https://protobuf.dev/programming-guides/encoding/).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType
from sentencepiece import SentencePieceProcessor

from moe2gguf.errors import VocabularyError
from moe2gguf.hf.json_file import read_bytes

MAX_MODEL_BYTES = 64 * 1024 * 1024
"""The largest tokenizer.model we read, in bytes; a vocabulary of 256 000 pieces takes about 4 MB."""

_KINDS = {1: "UNIGRAM", 2: "BPE", 3: "WORD", 4: "CHAR"}
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_PIECE_TYPE = 3  # of ModelProto.SentencePiece
_MODEL_TYPE, _SPACE_AS_SUFFIX = 3, 24  # of TrainerSpec
_CHARS_MAP, _DUMMY_PREFIX, _REMOVE_SPACES = 2, 3, 4  # of NormalizerSpec

Field = int | bytes


@dataclass(frozen=True)
class SentencePieceModel:
    """`pieces` in the order of their ids: text, score and type (SentencePiece's types have gguf's numbers).

    `special_ids` are the ids it knows a role of, keyed like config.json: "bos_token_id" -> 1.
    """

    pieces: list[tuple[str, float, TokenType]]
    add_space_prefix: bool
    special_ids: dict[str, int]


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a tokenizer.model.

    Raises:
        CheckpointError: missing or too large.
        VocabularyError: no SentencePiece model, or one that llama.cpp's SPM does not tokenize alike: not of kind BPE,
            without byte pieces, or with a normalizer that changes more than spaces.
    """
    data = read_bytes(path, max_bytes=MAX_MODEL_BYTES)
    processor = _load(data, path)
    try:
        message = list(_read_fields(data))
        types = [_read_piece_type(value) for number, value in message if number == _PIECE]
        trainer = _read_spec(message, _TRAINER)
        normalizer = _read_spec(message, _NORMALIZER)
    except ValueError as error:
        raise VocabularyError(f"{path}: no SentencePiece model ({error})") from error
    problems = _list_differences(trainer, normalizer, types)
    if len(types) != processor.GetPieceSize():
        problems.append(f"has {len(types)} pieces, of which sentencepiece reads {processor.GetPieceSize()}")
    if problems:
        raise VocabularyError("\n".join(f"{path}: {problem}" for problem in problems))
    try:
        pieces = [(processor.IdToPiece(id_), processor.GetScore(id_), type_) for id_, type_ in enumerate(types)]
    except UnicodeDecodeError as error:
        raise VocabularyError(f"{path}: a piece is not UTF-8 ({error})") from error
    return SentencePieceModel(
        pieces=pieces,
        add_space_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
        special_ids={
            "bos_token_id": processor.bos_id(),
            "eos_token_id": processor.eos_id(),
            "unk_token_id": processor.unk_id(),
            "pad_token_id": processor.pad_id(),
        },
    )


def _load(data: bytes, path: Path) -> SentencePieceProcessor:
    processor = SentencePieceProcessor()
    try:
        loaded = processor.LoadFromSerializedProto(data)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise VocabularyError(
            f"{path}: no SentencePiece model ({error}). If it is a tiktoken file, let transformers write a "
            "tokenizer.json: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        ) from error
    if not loaded or not processor.GetPieceSize():
        raise VocabularyError(f"{path}: a SentencePiece model without pieces")
    return processor


def _list_differences(trainer: dict[int, Field], normalizer: dict[int, Field], types: list[TokenType]) -> list[str]:
    """Say what llama.cpp's SPM tokenizer would do differently."""
    kind = trainer.get(_MODEL_TYPE, 1)
    problems = []
    if kind != 2:
        name = _KINDS.get(kind, "unknown") if isinstance(kind, int) else "unknown"
        problems.append(f"is a {name} model; llama.cpp merges by score, which only a BPE model does")
    if normalizer.get(_CHARS_MAP):
        problems.append("normalizes characters (NFKC or the like), which llama.cpp does not")
    if normalizer.get(_REMOVE_SPACES, 1):
        problems.append("removes extra spaces, which llama.cpp does not")
    if trainer.get(_SPACE_AS_SUFFIX, 0):
        problems.append("puts spaces behind words (treat_whitespace_as_suffix), which llama.cpp does not")
    if types.count(TokenType.BYTE) != 256:
        problems.append("lacks byte pieces (byte_fallback); llama.cpp aborts on any character without a piece")
    return problems


def _read_piece_type(value: Field) -> TokenType:
    """Return the type of one piece message; NORMAL is the default."""
    number = _read_message(value).get(_PIECE_TYPE, 1)
    if not isinstance(number, int) or number not in range(1, 7):
        raise ValueError(f"piece type {number!r}")
    return TokenType(number)


def _read_spec(message: list[tuple[int, Field]], number: int) -> dict[int, Field]:
    """Return the last message under a field number; absent is empty, all defaults."""
    return _read_message(next((value for field, value in reversed(message) if field == number), b""))


def _read_message(value: Field) -> dict[int, Field]:
    """Return the fields of a nested message; of a repeated one the last."""
    if not isinstance(value, bytes):
        raise ValueError("a number where a message should be")  # noqa: TRY004 - what is wrong is the file
    return dict(_read_fields(value))


def _read_fields(data: bytes) -> Iterator[tuple[int, Field]]:
    """Yield (field number, value) of a protocol buffer message; fixed-width values come as their bytes."""
    position = 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _read_varint(data, position)
            yield number, value
            continue
        if wire == 2:
            size, position = _read_varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        if size > len(data) - position:
            raise ValueError(f"field {number} at byte {position} ends behind the file")
        yield number, data[position : position + size]
        position += size


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Read a base-128 number of at most 64 bits; return it and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("cut short inside a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"number longer than 64 bits at byte {position}")
