"""scripts/experiments/widen.py: a wider model that is the same."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import numpy as np
import pytest

TOKENS = [1, 5, 9, 30, 2, 7, 7, 60, 11]
EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"


def test_a_wider_model_is_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' logits of both, up to rounding; a model with other norms would be far off."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import widen

    before = checkpoints.make(tmp_path / "before", "llama")
    heads = {"num_attention_heads": 6, "hidden_size": 96}

    widen.write(before, tmp_path / "after", 96)

    config = json.loads((tmp_path / "after" / "config.json").read_text())
    assert heads == {key: config[key] for key in heads}
    old, new = (checkpoints.torch_logits(folder, TOKENS) for folder in (before, tmp_path / "after"))
    assert np.abs(old - new).max() < 1e-5 * np.abs(old).max()
