"""scripts/experiments/train_dense.py: the control of healing, a dense model that is trained alike."""

from __future__ import annotations

import sys
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import load_file

from moe2gguf.experts.text import read_text
from moe2gguf.hf.folder import open_checkpoint

EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"


def test_the_control_trains_the_layers_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same names and shapes; all but the vocabulary's matrices moves, and the folder opens as a checkpoint."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import train_dense

    model = checkpoints.make(tmp_path / "dense", num_hidden_layers=2)
    text = tmp_path / "text.txt"
    text.write_text(read_text(None).text[:40000])
    arguments = [model, tmp_path / "out", "--text", text, "--tokens", 2048, "--steps", 2]
    monkeypatch.setattr(sys, "argv", ["train_dense.py", *map(str, arguments)])

    train_dense.main()

    open_checkpoint(tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert before.keys() == after.keys()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor.float(), after[name].float())}
    assert moved == {name for name in before if "embed_tokens" not in name and "lm_head" not in name}
