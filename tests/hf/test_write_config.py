"""moe2gguf.hf.write_config: transformers builds the same modules of a `Model` and of config.json."""

from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import transformers

from moe2gguf.hf.folder import open_checkpoint
from moe2gguf.hf.write_config import describe_config

TOKENS = torch.arange(5, 69)[None]


def logits(model: Any) -> Any:
    """(n_token, n_vocab) of the tokens above."""
    with torch.no_grad():
        return model.eval()(TOKENS).logits[0]


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_the_forward_pass_is_the_folders_own(tmp_path: Path, family: Any) -> None:
    """Every family and every rotary scaling: with the same weights the same logits, bit for bit."""
    folder = checkpoints.make(tmp_path, family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    values = describe_config(open_checkpoint(folder).model)

    ours = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    )
    ours.load_state_dict(theirs.state_dict())

    assert torch.equal(logits(theirs), logits(ours))


def test_experts_make_it_a_mixtral(tmp_path: Path) -> None:
    """With its counts; the same logits again."""
    experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
    folder = checkpoints.write(tmp_path, "MixtralForCausalLM", **experts, sliding_window=None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    values = describe_config(open_checkpoint(folder).model)
    assert (["MixtralForCausalLM"], 4, 2) == (values["architectures"], *(values[key] for key in experts))

    ours = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    )
    ours.load_state_dict(theirs.state_dict())

    assert torch.equal(logits(theirs), logits(ours))
