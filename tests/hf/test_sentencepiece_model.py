"""A tokenizer.model is a sound SentencePiece BPE model, or refused by what it is instead."""

from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tiny_tokenizers import train_sentencepiece

from moe2gguf.errors import CheckpointError, VocabularyError
from moe2gguf.hf.tokenizer.sentencepiece_model import read_sentencepiece


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_pieces(tmp_path: Path) -> None:
    """Pieces, scores and types are those that the sentencepiece package tells."""
    data = train_sentencepiece(user_defined_symbols=["<tool>"])
    model = read_sentencepiece(written(tmp_path / "tokenizer.model", data))
    own = SentencePieceProcessor(model_proto=data)
    assert [piece[:2] for piece in model.pieces] == [
        (own.IdToPiece(id_), own.GetScore(id_)) for id_ in range(own.GetPieceSize())
    ]
    types = [type_ for _, _, type_ in model.pieces]
    asked = {
        TokenType.UNKNOWN: own.IsUnknown,
        TokenType.CONTROL: own.IsControl,
        TokenType.BYTE: own.IsByte,
        TokenType.UNUSED: own.IsUnused,
    }
    for type_, ask in asked.items():
        assert [kind == type_ for kind in types] == [ask(id_) for id_ in range(own.GetPieceSize())]
    assert types[own.PieceToId("<tool>")] == TokenType.USER_DEFINED
    assert model.add_space_prefix is True
    assert model.special_ids == {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0, "pad_token_id": -1}


def test_no_dummy_prefix(tmp_path: Path) -> None:
    """A model trained without the dummy prefix puts no space before a text."""
    data = train_sentencepiece(add_dummy_prefix=False)
    assert read_sentencepiece(written(tmp_path / "tokenizer.model", data)).add_space_prefix is False


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model_type": "unigram", "vocab_size": 420}, "UNIGRAM"),
        ({"model_type": "char", "vocab_size": 360}, "CHAR"),
        ({"byte_fallback": False, "vocab_size": 190}, "byte_fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes characters"),
        ({"remove_extra_whitespaces": True}, "extra spaces"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ],
)
def test_other_kinds(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    """A model that llama.cpp would tokenize otherwise is refused with the reason."""
    with pytest.raises(VocabularyError, match=says):
        read_sentencepiece(written(tmp_path / "tokenizer.model", train_sentencepiece(**options)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"IQ== 0\nIg== 1\nIw== 2\n",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n",
        b"\x80\x02}q\x00.",
        b"\x0a\xff\xff\xff\xff\x0f",
        b"\xff" * 100,
        b"\x00" * 100,
    ],
)
def test_other_files(tmp_path: Path, data: bytes) -> None:
    """What is no SentencePiece model at all (tiktoken, a Git LFS pointer, a pickle) is refused."""
    with pytest.raises(VocabularyError, match=r"tokenizer\.model"):
        read_sentencepiece(written(tmp_path / "tokenizer.model", data))


def test_a_piece_that_is_no_text(tmp_path: Path) -> None:
    """A piece must be UTF-8: the sentencepiece package loads others all the same."""
    data = train_sentencepiece(user_defined_symbols=["<tool>"]).replace(b"<tool>", b"<to\x80l>")
    with pytest.raises(VocabularyError, match="not UTF-8"):
        read_sentencepiece(written(tmp_path / "tokenizer.model", data))


def test_missing(tmp_path: Path) -> None:
    """A missing file is an error of the checkpoint."""
    with pytest.raises(CheckpointError, match="no such file"):
        read_sentencepiece(tmp_path / "tokenizer.model")


@given(cut=st.integers(0, 5000), junk=st.binary(max_size=8))
def test_broken_anywhere(tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes) -> None:
    """A model that is cut short, or has other bytes somewhere, is read or refused, and nothing else happens."""
    cut = min(cut, len(SOUND))
    for data in (SOUND[:cut] + junk, SOUND[:cut] + junk + SOUND[cut + len(junk) :]):
        path = written(tmp_path_factory.getbasetemp() / "tokenizer.model", data)
        try:
            model = read_sentencepiece(path)
        except VocabularyError:
            continue
        assert model.pieces


SOUND = train_sentencepiece()
