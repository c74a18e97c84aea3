"""A mixture teaches a dense model: one expert of it, trained against the whole."""

from pathlib import Path

import checkpoints
import numpy as np
import pytest
from flat_options import flat_options

from moe2gguf import densify
from moe2gguf.errors import HealError
from moe2gguf.experts.heal.settings import Evaluation, HealSettings, Optimizer, Training
from moe2gguf.experts.text import read_text
from moe2gguf.recipes.heal import HealText, heal
from moe2gguf.recipes.hf_output import write_folder

TOKENS = [int(t) for t in np.random.default_rng(0).integers(5, 250, 60)]
STEPS = Training(used_range=(1, 1), layerwise=0, steps=30)


def test_a_mixture_teaches_its_average(tmp_path: Path) -> None:
    """The divergence falls, and the dense model has it in transformers too; layers and slices it cannot teach."""
    teacher, text = tmp_path / "moe", tmp_path / "text.txt"
    checkpoints.write(teacher, "MixtralForCausalLM", num_local_experts=3, num_experts_per_tok=2, num_hidden_layers=2)
    text.write_text(read_text(None).text[:40000])
    average = densify(teacher, tmp_path / "average", average=True).path
    student = write_folder(average, tmp_path / "student", flat_options(experts=1)).path
    words = HealText((text,), n_token=2048, n_held_out=256, n_context=64)

    settings = HealSettings(STEPS, optimizer=Optimizer(lr=2e-3), evaluation=Evaluation((1,), every=15))
    healed = heal(student, teacher, words, tmp_path / "healed", settings)
    dense = densify(healed.path, tmp_path / "dense").path

    first, *_, last = (line.kl["1"] for line in healed.scores)
    assert last < 0.9 * first
    ours, theirs = (checkpoints.torch_logits(one, TOKENS) for one in (dense, healed.path))
    assert np.abs(ours - theirs).max() < 1e-3

    layers = HealSettings(Training(used_range=(1, 1), steps=30))
    sliced = write_folder(average, tmp_path / "sliced", flat_options(experts=4)).path
    for other, how in ((student, layers), (sliced, settings)):
        with pytest.raises(HealError, match="it teaches a dense student"):
            heal(other, teacher, words, tmp_path / "out", how)
