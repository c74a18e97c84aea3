"""moe2gguf.experts.heal.teacher: transformers' own logits, from one run of every window."""

from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
import transformers

from moe2gguf.experts.heal import teacher as module
from moe2gguf.experts.heal.teacher import Teacher

WINDOWS = np.random.default_rng(0).integers(5, 250, (3, 16))


def layer_runs(teacher: Any) -> Any:
    """How often the first layer has run, as a list that grows."""
    runs = []
    teacher._model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_a_window_runs_through_the_layers_once(tmp_path: Path) -> None:
    """In any company and order the logits are transformers' own, and to the bit the same every time."""
    folder = checkpoints.make(tmp_path / "dense", num_hidden_layers=2)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    teacher = Teacher(folder, torch.device("cpu"))
    runs = layer_runs(teacher)

    first, again = teacher.last_states(WINDOWS), teacher.last_states(WINDOWS[::-1].copy())

    assert 3 == len(runs)
    assert torch.equal(first, again.flip(0))
    with torch.no_grad():
        assert (reference(torch.from_numpy(WINDOWS)).logits - teacher.logits(first)).abs().max() <= 1e-4


def test_what_has_no_room_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for one window: it is kept, the others run every time, with the same result."""
    teacher = Teacher(checkpoints.make(tmp_path / "dense", num_hidden_layers=2), torch.device("cpu"))
    monkeypatch.setattr(module, "KEPT_BYTES", 16 * 64 * 4)
    runs = layer_runs(teacher)

    first, again = teacher.last_states(WINDOWS), teacher.last_states(WINDOWS)

    assert 3 + 2 == len(runs)
    assert torch.equal(first, again)
