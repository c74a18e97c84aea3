"""moe2gguf.experts.heal.load: transformers' own model, from checked files only."""

import json
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import transformers

from moe2gguf.errors import PlanError
from moe2gguf.experts.heal.load import build_model
from moe2gguf.hf.folder import open_checkpoint

IDS = torch.arange(5, 45)[None]
MIXTRAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}


def read_logits(model: torch.nn.Module) -> torch.Tensor:
    """The logits (1, n_token, n_vocab) of the ids."""
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def from_pretrained(folder: Path) -> torch.nn.Module:
    """The folder as transformers loads it."""
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


@pytest.mark.parametrize(
    "family", ["llama", "llama-tied", "llama-bias", "llama3-rope", "yarn-rope", "mistral", "qwen2"]
)
def test_a_dense_model_is_what_from_pretrained_loads(tmp_path: Path, family: str) -> None:
    """The very same logits, and tied embeddings are one parameter."""
    folder = checkpoints.make(tmp_path / "model", family, dtype="bfloat16")

    model = build_model(open_checkpoint(folder))

    assert torch.equal(read_logits(from_pretrained(folder)), read_logits(model))
    assert (family == "llama-tied") == (model.lm_head.weight is model.model.embed_tokens.weight)


@pytest.mark.parametrize("original", [True, False], ids=["w1 w2 w3", "fused"])
def test_experts_of_both_layouts(tmp_path: Path, original: bool) -> None:
    """Every expert and router at its place."""
    folder = checkpoints.write(tmp_path / "model", "MixtralForCausalLM", original=original, **MIXTRAL)

    assert torch.equal(read_logits(from_pretrained(folder)), read_logits(build_model(open_checkpoint(folder))))


def test_python_files_of_the_folder_do_not_run(tmp_path: Path) -> None:
    """An auto_map names code: it is not imported, nor is anybody asked."""
    folder = checkpoints.make(tmp_path / "model")
    expected = read_logits(build_model(open_checkpoint(folder)))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    checkpoints.rewrite_config(folder, auto_map=auto_map, model_type="evil")

    assert torch.equal(expected, read_logits(build_model(open_checkpoint(folder))))
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    """Neither beside a safetensors file of another name, which transformers overlooks, nor alone."""
    folder = checkpoints.make(tmp_path / "model")
    expected = read_logits(build_model(open_checkpoint(folder)))
    state = {name: torch.zeros_like(t) for name, t in from_pretrained(folder).state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")

    assert torch.equal(expected, read_logits(build_model(open_checkpoint(folder))))
    (folder / "weights.safetensors").unlink()
    with pytest.raises(PlanError, match="can run code"):
        build_model(open_checkpoint(folder))


def test_an_adapter_in_the_folder_is_not_loaded(tmp_path: Path) -> None:
    """transformers would apply it, or load the base model that it names."""
    folder = checkpoints.make(tmp_path / "model")
    expected = read_logits(build_model(open_checkpoint(folder)))
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "elsewhere"), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))

    assert torch.equal(expected, read_logits(build_model(open_checkpoint(folder))))
