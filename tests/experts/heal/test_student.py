"""moe2gguf.experts.heal.student: the sliced model computes what transformers computes, whatever its rows."""

from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
import transformers

from moe2gguf.experts.heal.student import load_student, set_used

IDS = np.random.default_rng(0).integers(5, 250, (1, 24))


@pytest.mark.parametrize("d_expert", [6, 16])
@pytest.mark.parametrize("k", [1, 4])
def test_logits_are_those_of_transformers(d_expert: int, k: int, tmp_path: Path) -> None:
    """Rows of 24 bytes, which grouped products refuse, and of 64: at every count, the logits of its plain loop."""
    folder = checkpoints.write(
        tmp_path / "student", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=k, head_dim=16,
        intermediate_size=d_expert,
    )  # fmt: skip
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()

    student = load_student(folder, None, IDS, checkpointing=False)
    set_used(student, k)

    with torch.no_grad():
        expected, found = (model(torch.from_numpy(IDS)).logits for model in (reference, student.eval()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
