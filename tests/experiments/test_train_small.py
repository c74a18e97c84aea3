"""scripts/experiments/train_small.py: the folder it makes is a Qwen2 model that learned, and that converts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from flat_options import flat_options
from llama_logits import llama_logits
from tokenizers import Tokenizer

from moe2gguf import convert
from moe2gguf.experts.text import read_text

EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"
TINY = {"vocabulary": 400, "d-model": 32, "d-ff": 64, "layers": 2, "context": 64, "batch": 4, "epochs": 2}


def test_it_learns_and_converts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Held-out perplexity falls from epoch to epoch; the dense F32 file has transformers' logits."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import train_small

    (tmp_path / "text.txt").write_text(read_text(None).text[:60000], encoding="utf-8")
    sizes = [part for name, value in TINY.items() for part in (f"--{name}", str(value))]
    folder = tmp_path / "model"
    monkeypatch.setattr(sys, "argv", ["train_small.py", str(folder), "--text", str(tmp_path / "text.txt"), *sizes])

    train_small.main()

    first, second = (float(found) for found in re.findall(r"held-out perplexity ([\d.]+)", capsys.readouterr().out))
    assert second < first < 400
    assert second < 200
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("I've 1,234 words; it ISN'T over: été").ids
    convert(folder, tmp_path / "dense.gguf", flat_options(dense=True))
    expected = checkpoints.torch_logits(folder, tokens)
    assert np.abs(expected - llama_logits(tmp_path / "dense.gguf", tokens)).max() <= 1e-3
    assert expected.std() > 0.5
