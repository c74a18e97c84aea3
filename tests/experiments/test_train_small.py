"""scripts/train_small.py: the folder it makes is a Qwen2 model that learned, and that converts like any other."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from llama_logits import llama_logits
from llama_tokens import LlamaTokens
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from moe2gguf import Options, convert
from moe2gguf.experts.text import read_text

ROOT = Path(__file__).resolve().parents[2]
TINY = {"vocabulary": 400, "d-model": 32, "d-ff": 64, "layers": 2, "context": 64, "batch": 4, "epochs": 2}
HARD = "I've 1,234 words;\n\n  it ISN'T over: été, 我想 <|endoftext|>\t(end)"


def train(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, **changes: object) -> Path:
    """A tiny model trained on 70 % of `text`."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import train_small

    (folder / "text.txt").write_text(text, encoding="utf-8")
    options = [part for name, value in (TINY | changes).items() for part in (f"--{name}", str(value))]
    arguments = [str(folder / "model"), "--text", str(folder / "text.txt"), *options]
    monkeypatch.setattr(sys, "argv", ["train_small.py", *arguments])
    train_small.main()
    return folder / "model"


@pytest.fixture(scope="module")
def text():
    return read_text(None).text[:60000]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    """(folder, what was printed) of a tiny model."""
    import contextlib
    import io

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        folder = train(tmp_path_factory.mktemp("trained"), text, monkeypatch)
    return folder, printed.getvalue()


def test_it_learns(trained):
    """Held-out perplexity falls from epoch to epoch, far below that of a guess."""
    _, printed = trained

    first, second = (float(found) for found in re.findall(r"held-out perplexity ([\d.]+)", printed))

    assert second < first < 400
    assert second < 200


def test_dense_and_sliced_files_equal_transformers(trained, tmp_path):
    """F32: transformers' logits, of biases that training moved, and the folder's own token ids."""
    folder, _ = trained
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(HARD).ids * 2
    expected = checkpoints.torch_logits(folder, tokens)
    convert(folder, tmp_path / "dense.gguf", Options(dense=True))
    convert(folder, tmp_path / "sliced.gguf", Options(experts=16))

    for name in ("dense.gguf", "sliced.gguf"):
        assert np.abs(expected - llama_logits(tmp_path / name, tokens)).max() <= 1e-3, name
        with LlamaTokens(tmp_path / name) as llama:
            assert tokens == llama.encode(HARD) * 2
    assert expected.std() > 0.5
    biases = [tensor for name, tensor in load_file(folder / "model.safetensors").items() if name.endswith("bias")]
    assert len(biases) == 6
    assert all(np.abs(bias).max() > 1e-3 for bias in biases)


def test_the_seed_decides_and_held_out_text_does_not(trained, text, tmp_path, monkeypatch):
    """Other text in the last 30 % gives the same weights and tokens; another seed gives others."""
    folder, _ = trained
    other = text[: int(0.7 * len(text))] + "x" * (len(text) - int(0.7 * len(text)))
    for name in ("same", "seed"):
        (tmp_path / name).mkdir()

    same = train(tmp_path / "same", other, monkeypatch)
    seed = train(tmp_path / "seed", text, monkeypatch, seed=1)

    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (folder / file).read_bytes() == (same / file).read_bytes(), file
    assert (folder / "model.safetensors").read_bytes() != (seed / "model.safetensors").read_bytes()
