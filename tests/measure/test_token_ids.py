"""moe2gguf.measure.token_ids: where llama.cpp's ids are not the tokenizer's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import tiny_tokenizers as tiny
from command import moe2gguf
from llama_tokens import write_vocabulary_file
from transformers import AutoTokenizer

from moe2gguf.errors import HarnessError
from moe2gguf.gguf.metadata import vocabulary_metadata
from moe2gguf.hf.tokenizer.vocabulary import read_vocabulary
from moe2gguf.measure import token_ids
from moe2gguf.measure.token_ids import TokenCheck, compare_token_ids


def compare(folder: Path, size: int) -> TokenCheck:
    """Compare a tokenizer with the vocabulary that we make of it."""
    write_vocabulary_file(folder / "v.gguf", vocabulary_metadata(read_vocabulary(folder, size)))
    return compare_token_ids(folder / "v.gguf", folder)


def add_token(folder: Path, id_: int, content: str, rule: str | None = None) -> None:
    """Add a token with one flag to tokenizer.json."""
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    flags = {name: name == rule for name in ("special", "single_word", "lstrip", "rstrip", "normalized")}
    settings["added_tokens"].append({"id": id_, "content": content, **flags})
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize("rule", ["lstrip", "rstrip", "single_word"])
def test_a_token_that_llama_cpp_finds_elsewhere_is_named(tmp_path: Path, rule: str) -> None:
    """With both lists of ids, the second of them transformers'; a token without flags is not."""
    size = tiny.byte_level_bpe(tmp_path, pre="smollm")
    add_token(tmp_path, size, "<plain>")
    add_token(tmp_path, size + 1, "<odd>", rule)

    found = compare(tmp_path, size + 2)

    [named] = found.named
    assert "<odd>" in named.text
    own = AutoTokenizer.from_pretrained(tmp_path)
    assert own(named.text, add_special_tokens=False).input_ids == [*named.tokenizer] != [*named.llama_cpp]
    assert size + 1 in named.llama_cpp
    assert 1 <= found.n_differing <= 6


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: tiny.byte_level_bpe(folder, pre="smollm"),
        lambda folder: tiny.byte_level_bpe(folder, pre="llama-bpe"),
        lambda folder: tiny.llama_json_only(folder, spaces="never"),
        tiny.sentencepiece_model,
    ],
)
def test_of_a_tokenizer_that_llama_cpp_knows_nothing_is_named(tmp_path: Path, make: Callable[[Path], int]) -> None:
    """Over more than a thousand texts."""
    found = compare(tmp_path, make(tmp_path))

    assert ((), 0) == (found.named, found.n_differing)
    assert found.n_text > 500


def test_at_most_five_are_named_and_what_the_file_says_of_long_texts_is_no_difference(tmp_path: Path) -> None:
    """Of ten tokens; a tokenizer.json that cuts and fills texts to 3 tokens."""
    size = tiny.byte_level_bpe(tmp_path, pre="smollm")
    for i in range(10):
        add_token(tmp_path, size + i, f"<odd{i}>", "rstrip")
    path = tmp_path / "tokenizer.json"
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncation": truncation}))

    found = compare(tmp_path, size + 10)

    assert [f"<odd{i}>" in one.text for i, one in enumerate(found.named)] == [True] * 5
    assert 5 == len(json.loads(json.dumps(found.to_dict()))["named"])


@pytest.mark.parametrize("rule", ["rstrip", None])
@pytest.mark.parametrize("target", ["mixtral", "glm4moe"])
def test_convert_names_texts_with_other_ids(tmp_path: Path, rule: str | None, target: str) -> None:
    """Compared while the file is written, from its metadata alone; nothing is said where all ids are the same."""
    folder = checkpoints.make(tmp_path / "model", vocab_size=1024, num_hidden_layers=1)
    size = len(AutoTokenizer.from_pretrained(folder))
    add_token(folder, size, "<odd>", rule)

    done = moe2gguf("convert", folder, tmp_path / "out.gguf", "--target", target, "--experts", 4)

    assert 0 == done.returncode, done.stderr
    assert (rule is not None) == ("have other ids in llama.cpp than the folder's tokenizer gives" in done.stderr)
    assert (rule is not None) == ("<odd>" in done.stderr)


LINES = (
    "publish MODEL OUT --experts 4 --types f16,q8_0 --tokens 64 --context 32",
    "shrink MODEL OUT --room 10MB --tokens 64",
    "merge MODEL MODEL MODEL OUT --router random",
)


@pytest.mark.parametrize("line", LINES)
def test_other_commands_that_read_a_folder_name_them_too(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, however many files are made of it."""
    monkeypatch.setenv("MOE2GGUF_CACHE", str(tmp_path / "cache"))
    folder = checkpoints.make(tmp_path / "model", vocab_size=1024, num_hidden_layers=1)
    add_token(folder, len(AutoTokenizer.from_pretrained(folder)), "<odd>", "rstrip")
    words = {"MODEL": folder, "OUT": tmp_path / "out"}

    done = moe2gguf(*(words.get(word, word) for word in line.split()))

    assert 0 == done.returncode, done.stderr
    assert 1 == done.stderr.count("have other ids in llama.cpp than the folder's tokenizer gives, such as '<odd> '")


def test_of_a_broken_llama_cpp_one_sentence_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is written all the same."""

    def fail(*_: object) -> None:
        raise HarnessError("no such library")

    monkeypatch.setattr(token_ids, "read_token_lists", fail)
    folder = checkpoints.make(tmp_path / "model", num_hidden_layers=1)

    done = moe2gguf("convert", folder, tmp_path / "out.gguf", "--dense")

    assert 0 == done.returncode
    assert "token ids were not compared with the folder's tokenizer: no such library" in done.stderr
