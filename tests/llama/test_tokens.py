"""moe2gguf.llama.tokens: the ids of a GGUF file's vocabulary are those of the model's folder."""

from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from flat_options import flat_options
from tiny_tokenizers import byte_level_bpe, llama_json_only, sentencepiece_model

from moe2gguf import convert
from moe2gguf.errors import HarnessError
from moe2gguf.experts.text import Text, read_text, tokenize_windows
from moe2gguf.hf.folder import open_checkpoint
from moe2gguf.llama.tokens import read_tokens

TOKENIZERS = {
    "llama-bpe": lambda folder: byte_level_bpe(folder, pre="llama-bpe", n_vocab=450),
    "qwen2": lambda folder: byte_level_bpe(folder, pre="qwen2", n_vocab=450),
    "smollm": lambda folder: byte_level_bpe(folder, pre="smollm", n_vocab=450),
    "tokenizer.model": sentencepiece_model,
    "tokenizer.json of SentencePiece": llama_json_only,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny LLaMA with 450 tokens, whose tokenizer a test replaces."""
    return checkpoints.make(tmp_path_factory.mktemp("tokens") / "m", vocab_size=450, num_hidden_layers=1)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_and_first_token_are_the_folders(folder: Any, tmp_path: Path, name: Any) -> None:
    """Of 100 kB with code, tables and spaces, from every kind of tokenizer; BOS where the folder wants one.

    Special tokens that are spelled out count as such, but for a bare tokenizer.model, which knows none.
    """
    for path in folder.glob("*token*"):
        path.unlink()
    assert 450 == TOKENIZERS[name](folder)
    convert(folder, tmp_path / "x.gguf", flat_options(dense=True))
    special = "" if name == "tokenizer.model" else " <|end|> </s>"
    text = Text(read_text(None).text[:100_000] + special + "\n\n\n  über 🚀 \t end ", "x")

    ids, first = read_tokens(tmp_path / "x.gguf", text.text)

    n = len(ids) // 2 * 2
    assert open_checkpoint(folder).vocabulary.first_id == first
    assert tokenize_windows(folder, text, n, n // 2, None).reshape(-1).tolist() == ids[:n].tolist()
    assert ids.dtype == np.int64


def test_a_set_of_shards_has_one_vocabulary(folder: Any, tmp_path: Path) -> None:
    """The first file names it."""
    convert(folder, tmp_path / "one.gguf", flat_options(dense=True))
    done = convert(folder, tmp_path / "out.gguf", flat_options(dense=True, shard_size=130_000))

    ids, first = read_tokens(done.path, "Hello world")

    assert done.path.name.startswith("out-00001-of-")
    one, other = read_tokens(tmp_path / "one.gguf", "Hello world")
    assert (first, ids.tolist()) == (other, one.tolist())


def test_without_llama_cpp_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it is for."""
    (tmp_path / "llama_cpp.py").write_text("raise ModuleNotFoundError(name='llama_cpp')")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(HarnessError, match=r"x.gguf: token ids come from llama.cpp .*pip install -U llama-cpp-python"):
        read_tokens(tmp_path / "x.gguf", "text")


def test_a_file_that_llama_cpp_refuses(tmp_path: Path) -> None:
    """Its own words are in the error."""
    (tmp_path / "x.gguf").write_bytes(b"no GGUF file")

    with pytest.raises(HarnessError, match=r"(?s)token ids come from llama.cpp.*cannot load it; it says:.*magic"):
        read_tokens(tmp_path / "x.gguf", "text")
