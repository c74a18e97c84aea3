"""moe2gguf.recipes.heal on folders with a shared expert: one set of weights for many counts, in every family."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from flat_options import flat_options
from llama_logits import llama_logits_at
from safetensors.numpy import load_file, save_file

from moe2gguf import convert
from moe2gguf.errors import HealError, PlanError
from moe2gguf.experts.heal.log import LayerLine
from moe2gguf.experts.heal.settings import Evaluation, HealSettings, Optimizer, Training
from moe2gguf.experts.text import read_text
from moe2gguf.recipes.densify import densify
from moe2gguf.recipes.heal import Healing, HealText, heal
from moe2gguf.recipes.hf_output import write_folder

N, SHARED = 6, 2
TOKENS = [int(t) for t in np.random.default_rng(0).integers(5, 250, 40)]
COUNTS = (3, 4, 6)
ROUTED = {f"experts.{role}_proj.weight" for role in ("gate", "up", "down")}
SHARED_EXPERT = {f"shared_{name}" for name in ROUTED}
NORMS = {"model.norm.weight", "input_layernorm.weight", "post_attention_layernorm.weight"}


@dataclass(frozen=True)
class Models:
    """A dense model, the same cut into 2 shared and 4 routed experts, and a text."""

    dense: Path
    sliced: Path
    text: Path


def cut(root: Path, family: str, n_dense: int = 0) -> Models:
    """A model of two layers whose hidden states share a constant part, which the experts that run can make up for."""
    dense = checkpoints.make(root / "dense", family, num_hidden_layers=2)
    tensors = load_file(dense / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 6.0
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    text = root / "text.txt"
    text.write_text(read_text(None).text[:40000])
    options = flat_options(
        N, target="glm4moe", n_shared=SHARED, n_token=1024, refit=False, text=text, leading_dense=n_dense
    )
    return Models(dense, write_folder(dense, root / "sliced", options).path, text)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return cut(tmp_path_factory.mktemp("heal"), "llama")


def settings(layerwise: int, steps: int, *parts: str, counts: tuple[int, ...] = COUNTS) -> HealSettings:
    """A short run, by default at three counts."""
    training = Training(parts or ("router", "experts"), (counts[0], counts[-1]), layerwise, steps, batch=2)
    return HealSettings(training, optimizer=Optimizer(1e-3, 2e-4, 2e-3), evaluation=Evaluation(counts, every=1))


def run(models: Models, out: Path, chosen: HealSettings, sliced: Path | None = None) -> Healing:
    """One healing run."""
    text = HealText((models.text,), n_token=2048, n_held_out=256, n_context=64)
    return heal(sliced or models.sliced, models.dense, text, out, chosen)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_healed_folder_is_better_below_all_experts_and_its_file_computes_the_same(
    family: str, tmp_path: Path
) -> None:
    """Each stage lowers the held-out loss; llama.cpp's logits of the result are transformers' at every count."""
    models = cut(tmp_path, family)
    steps = run(models, tmp_path / "steps", settings(0, 4, counts=(3, 4))).scores
    layers = run(models, tmp_path / "layers", settings(1, 0))
    healed = run(models, tmp_path / "healed", settings(0, 2, "router", "experts", "attention"), layers.path)
    file = convert(healed.path, tmp_path / "healed.gguf").path

    assert min(line.kl_mean for line in steps) < 0.9 * steps[0].kl_mean
    assert all(layers.scores[0].kl[k] < 0.6 * steps[0].kl[k] for k in ("3", "4"))
    assert [0, 1] == [line.layer for line in layers.log if isinstance(line, LayerLine)]
    for k, ours in zip(COUNTS, llama_logits_at(file, TOKENS, COUNTS), strict=True):
        checkpoints.rewrite_config(healed.path, num_experts_per_tok=k - SHARED)
        assert np.abs(ours - checkpoints.torch_logits(healed.path, TOKENS)).max() < 1e-3, k
    with pytest.raises(PlanError, match="healed"):
        densify(file, tmp_path / "dense.gguf")


def test_the_scores_of_the_layers_are_those_of_the_whole_model(models: Models, tmp_path: Path) -> None:
    """The layers in training form compute, at every count, what transformers computes of the folder they write."""
    streamed = run(models, tmp_path / "layers", settings(1, 0)).scores[0]

    whole = run(models, tmp_path / "again", settings(0, 1), tmp_path / "layers").scores[0]

    assert streamed.kl == pytest.approx(whole.kl, rel=1e-2)
    assert streamed.nll == pytest.approx(whole.nll, rel=1e-3)


def test_a_dense_first_layer_stays_bit_for_bit(tmp_path: Path) -> None:
    """Both stages train the layer behind it; llama.cpp computes what transformers does."""
    models = cut(tmp_path, "llama", n_dense=1)
    layers = run(models, tmp_path / "layers", settings(1, 0))
    healed = run(models, tmp_path / "healed", settings(1, 2))

    assert [1] == [line.layer for line in layers.log if isinstance(line, LayerLine)]
    whole = run(models, tmp_path / "again", settings(0, 1), layers.path).scores[0]
    assert layers.scores[0].kl == pytest.approx(whole.kl, rel=1e-2)
    old, new = (load_file(folder / "model.safetensors") for folder in (models.sliced, healed.path))
    moved = {name.split(".")[2] for name in old if old[name].tobytes() != new[name].tobytes()}
    assert (moved, old.keys()) == ({"1"}, new.keys())
    (ours,) = llama_logits_at(convert(healed.path, tmp_path / "healed.gguf").path, TOKENS, [N])
    assert np.abs(ours - checkpoints.torch_logits(healed.path, TOKENS)).max() < 1e-3


@pytest.mark.parametrize(
    ("parts", "layerwise", "moving"),
    [
        (("router",), 1, {"gate.weight"}),
        (("down",), 1, {"experts.down_proj.weight", "shared_experts.down_proj.weight"}),
        (("experts",), 0, ROUTED | SHARED_EXPERT),
        (("lora",), 0, ROUTED | SHARED_EXPERT),
        (("attention",), 0, {f"self_attn.{part}_proj.weight" for part in "qkvo"} | NORMS),
    ],
)
def test_what_is_frozen_stays_bit_for_bit(
    parts: tuple[str, ...], layerwise: int, moving: set[str], models: Models, tmp_path: Path
) -> None:
    """Only tensors of the trained part differ from the source's, and they do; the selection bias never does."""
    out = run(models, tmp_path / "out", settings(layerwise, 3, *parts, counts=(3,))).path

    old, new = (load_file(folder / "model.safetensors") for folder in (models.sliced, out))
    assert old.keys() == new.keys()
    changed = {name for name in old if old[name].tobytes() != new[name].tobytes()}
    assert moving == {re.sub(r"^model\.layers\.\d+\.(mlp\.)?|\b\d+\.", "", name) for name in changed}


def test_the_folder_tells_how_it_was_healed(models: Models, tmp_path: Path) -> None:
    """Range, tokens and parts stand in config.json beside what slicing wrote, and in the file made of it."""
    out = run(models, tmp_path / "out", settings(1, 0, "down")).path
    values, before = (json.loads((folder / "config.json").read_text()) for folder in (out, models.sliced))

    assert {key: value for key, value in values.items() if key != "moe2gguf"} == {
        key: value for key, value in before.items() if key != "moe2gguf"
    }
    found = values["moe2gguf"]
    assert before["moe2gguf"].items() <= found.items()
    assert (found["moe2gguf.heal.used_min"], found["moe2gguf.heal.used_max"]) == (3, N)
    assert found["moe2gguf.heal.train"] == "down"


def test_counts_without_a_routed_expert_are_refused(models: Models, tmp_path: Path) -> None:
    """The shared experts count, as everywhere, and one more must run."""
    chosen = HealSettings(Training(used_range=(2, 7)), evaluation=Evaluation((2, 9)))
    with pytest.raises(HealError) as caught:
        run(models, tmp_path / "out", chosen)
    assert "--used-range 2..7: must lie between 3 and 6" in str(caught.value)
    assert "--evaluate-at [9]: must lie" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_another_attention_is_refused(models: Models, tmp_path: Path) -> None:
    """A dense model with biases, or with norms of heads, is not what the student was cut from."""
    other = checkpoints.make(tmp_path / "other", "qwen2", num_hidden_layers=2)
    with pytest.raises(HealError, match="bias_qkv is False in the student, True in the teacher"):
        run(Models(other, models.sliced, models.text), tmp_path / "out", settings(1, 0))
