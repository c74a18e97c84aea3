"""Tensors and files that are not those of the class: one sentence for a cause, with the way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import transformers
from command import moe2gguf
from safetensors.numpy import load_file, save_file

from moe2gguf.errors import CheckpointError, PlanError
from moe2gguf.hf.folder import Checkpoint, open_checkpoint
from moe2gguf.hf.safetensors import read_headers

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA."""
    return checkpoints.make(tmp_path_factory.mktemp("causes") / "model")


def changed(model: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of the model with other tensors."""
    shutil.copytree(model, folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    return folder


def fused(tensors: Tensors) -> Tensors:
    """As Phi-3 stores them."""
    for i in range(3):
        layer = f"model.layers.{i}."
        for name, parts in {"self_attn.qkv_proj": "qkv", "mlp.gate_up_proj": ("gate", "up")}.items():
            where, _ = name.split(".")
            arrays = [tensors.pop(f"{layer}{where}.{part}_proj.weight") for part in parts]
            tensors[f"{layer}{name}.weight"] = np.concatenate(arrays)
    return tensors


def fused_by_head(tensors: Tensors) -> Tensors:
    """As GPT-NeoX and Falcon call them."""
    return {name.replace(".qkv_proj.", ".query_key_value."): array for name, array in fused(tensors).items()}


def with_more(*names: str) -> Callable[[Tensors], Tensors]:
    """Two tensors more for each name."""
    more = {f"{name}.{i}.weight": np.ones((4, 4), np.float32) for name in names for i in range(8)}
    return lambda tensors: {**tensors, **more}


def next_layer(tensors: Tensors) -> Tensors:
    """A layer beyond the last one, and what goes with it there."""
    more = {name.replace(".0.", ".3."): array for name, array in tensors.items() if ".layers.0." in name}
    return {**tensors, **more, "model.layers.3.eh_proj.weight": np.ones((4, 4), np.float32)}


OTHERS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "fused": (fused, "6 tensors (model.layers.0.mlp.gate_up_proj.weight, "),
    "fused by head": (fused_by_head, "are several projections in one; split them into q_proj, k_proj"),
    "MTP": (with_more("mtp.layers"), "predict further tokens (MTP)"),
    "MTP inside": (with_more("model.mtp_layers"), "predict further tokens (MTP)"),
    "MTP layer": (next_layer, "10 tensors (model.layers.3.eh_proj.weight, "),
    "pictures": (with_more("vision_tower.blocks"), "are of a part for pictures or sound"),
    "pictures too": (with_more("visual.blocks.0.attn.qkv"), "are of a part for pictures or sound"),
    "values": (with_more("v_head.summary"), "are of a head for values or classes"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_tensors_of_another_class_are_one_problem(model: Path, tmp_path: Path, case: str) -> None:
    """Not one for each; what transformers leaves out converts when it has saved the folder."""
    change, says = OTHERS[case]
    folder = changed(model, tmp_path / "model", change)

    with pytest.raises(PlanError) as caught:
        open_checkpoint(folder)

    (problem,) = caught.value.refusals
    assert says in problem
    if "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)" in problem:
        again = shutil.copytree(model, tmp_path / "again")
        (again / "model.safetensors").unlink()
        transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(again)
        assert open_checkpoint(again).tensors.keys() == open_checkpoint(model).tensors.keys()


def test_two_causes_are_two_sentences(model: Path, tmp_path: Path) -> None:
    """A part for pictures and one that predicts; but what nobody knows is listed with all the rest."""
    with pytest.raises(PlanError) as caught:
        open_checkpoint(changed(model, tmp_path / "a", with_more("mtp.layers", "visual.blocks")))
    assert 2 == len(caught.value.refusals)

    with pytest.raises(PlanError) as caught:
        open_checkpoint(changed(model, tmp_path / "b", with_more("mtp.layers", "model.unknown")))
    assert 16 == len(caught.value.refusals)


def test_layers_that_are_missing_are_one_problem(model: Path, tmp_path: Path) -> None:
    """A wrong count in config.json, or files that were not fetched."""
    folder = shutil.copytree(model, tmp_path / "model")
    checkpoints.rewrite_config(folder, num_hidden_layers=40)

    with pytest.raises(PlanError) as caught:
        open_checkpoint(folder)

    (problem,) = caught.value.refusals
    assert "num_hidden_layers 40, but the tensors are those of 3 layers" in problem


NUMBERS: dict[str, tuple[str, dict[str, int], str]] = {
    "width": ("llama", {"hidden_size": 128}, "hidden_size is 128 instead of 64"),
    "MLP": ("llama", {"intermediate_size": 64}, "intermediate_size is 64 instead of 96"),
    "vocabulary": ("llama", {"vocab_size": 401}, "vocab_size is 401 instead of 400"),
    "heads": (
        "llama",
        {"head_dim": 32},
        "head_dim times num_attention_heads is 128 instead of 64, "
        "head_dim times num_key_value_heads is 64 instead of 32",
    ),
    "experts": ("mixtral", {"num_local_experts": 3}, "num_local_experts is 3 instead of 4"),
    "routed experts": ("glm4moe", {"n_routed_experts": 8}, "n_routed_experts is 8 instead of 3"),
    "shared experts": (
        "glm4moe",
        {"n_shared_experts": 2},
        "moe_intermediate_size times n_shared_experts is 48 instead of 24",
    ),
    "fewer dense layers": ("glm4moe", {"first_k_dense_replace": 0}, "first_k_dense_replace is 0 instead of 1"),
    "more dense layers": ("glm4moe", {"first_k_dense_replace": 2}, "first_k_dense_replace is 2 instead of 1"),
    "all layers dense": ("glm4moe", {"first_k_dense_replace": 3}, "first_k_dense_replace is 3 instead of 1"),
    "two": (
        "glm4moe",
        {"first_k_dense_replace": 0, "vocab_size": 401},
        "first_k_dense_replace is 0 instead of 1, vocab_size is 401 instead of 400",
    ),
}


@pytest.fixture(scope="module")
def sliced(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The LLaMA, and folders with experts of it."""
    folder = tmp_path_factory.mktemp("sliced")
    convert = ("convert", model, "--experts", 4, "--format", "hf", "--calibration-tokens", 1024)
    assert 0 == moe2gguf(*convert[:-2], folder / "mixtral").returncode
    done = moe2gguf(*convert, folder / "glm4moe", "--target", "glm4moe", "--leading-dense", 1)
    assert 0 == done.returncode, done.stderr
    return {"llama": model, "mixtral": folder / "mixtral", "glm4moe": folder / "glm4moe"}


@pytest.mark.parametrize("case", NUMBERS)
def test_a_wrong_number_in_the_config_is_one_problem(sliced: dict[str, Path], tmp_path: Path, case: str) -> None:
    """Not one for each tensor: the key is named, with the number that all tensors have."""
    kind, changes, said = NUMBERS[case]
    folder = shutil.copytree(sliced[kind], tmp_path / "model")
    checkpoints.rewrite_config(folder, **changes)

    with pytest.raises(PlanError) as caught:
        open_checkpoint(folder)

    assert [f"config.json is not of these tensors: {said}; correct it, or fetch the files that belong to it"] == [
        *caught.value.refusals
    ]


BUFFERS = ("self_attn.bias", "self_attn.masked_bias", "self_attn.rotary_emb.inv_freq", "attn.bias", "attention.bias")


def test_buffers_that_follow_from_the_config_do_no_harm(model: Path, tmp_path: Path) -> None:
    """Masks and numbers of places, as older versions of transformers stored them; no warning."""
    more: Tensors = {f"model.layers.0.{name}": np.ones((1, 1, 4, 4), np.uint8) for name in BUFFERS}
    more["model.position_ids"] = np.arange(4)[None]
    folder = changed(model, tmp_path / "model", lambda tensors: {**tensors, **more})

    found = open_checkpoint(folder)

    assert found.tensors.keys() == open_checkpoint(model).tensors.keys()
    assert () == found.warnings


def opened_with(model: Path, folder: Path, *names: str) -> Checkpoint:
    """The model, in a folder with more files."""
    shutil.copytree(model, folder)
    for name in names:
        (folder / name).write_bytes((model / "model.safetensors").read_bytes())
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "consolidated.00.pth", "model.fp16.safetensors", "pytorch_model-00001-of-00002.bin"],
)
def test_weights_that_are_not_read_are_named(model: Path, tmp_path: Path, name: str) -> None:
    """They could be what was meant: one warning for all of them."""
    (warning,) = opened_with(model, tmp_path / "m", name, "tf_model.h5").warnings

    assert name in warning
    assert "tf_model.h5" in warning
    assert "the weights are those of model.safetensors" in warning


def test_what_a_training_leaves_is_no_model(model: Path, tmp_path: Path) -> None:
    """No word about it."""
    leftovers = (
        "training_args.bin",
        "optimizer.pt",
        "optimizer.bin",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    )

    assert () == opened_with(model, tmp_path / "m", *leftovers).warnings


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"])
def test_an_adapter_beside_the_model_is_named(model: Path, tmp_path: Path, name: str) -> None:
    """It is not applied, with the line that applies it."""
    (warning,) = opened_with(model, tmp_path / "m", name).warnings

    assert f"the adapter beside the model ({name}) is left out" in warning
    assert "merge_and_unload()" in warning


def test_variants_alone_are_named(model: Path, tmp_path: Path) -> None:
    """Which of two is meant cannot be known; one alone, or beside an adapter, is."""
    file = (model / "model.safetensors").read_bytes()
    for name in ("model.fp16.safetensors", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(file)
    assert read_headers(tmp_path).keys() == read_headers(model).keys()

    (tmp_path / "model.fp32.safetensors").write_bytes(file)
    with pytest.raises(CheckpointError, match=r"has model.fp16.safetensors, model.fp32.safetensors, but neither"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "pad_token_id", 4096),
        ("config.json", "eos_token_id", [2, 4096]),
        ("generation_config.json", "bos_token_id", -2),
        ("generation_config.json", "eos_token_id", "2"),
        ("tokenizer_config.json", "pad_token", "<|nowhere|>"),
        ("tokenizer_config.json", "pad_token", 7),
        ("special_tokens_map.json", "mask_token", {"content": "<|nowhere|>"}),
    ],
)
def test_a_special_token_that_is_no_token_is_named(
    model: Path, tmp_path: Path, file: str, key: str, value: object
) -> None:
    """It is passed over, as in llama.cpp's converter, with a word; -1 means that there is none."""
    folder = shutil.copytree(model, tmp_path / "model")
    path = folder / file
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | {key: value}))

    (warning,) = open_checkpoint(folder).warnings

    shown = {"content": "'<|nowhere|>'", "<|nowhere|>": "'<|nowhere|>'"}.get(str(value), "")
    assert f"{file}: {key} {shown}" in warning
    path.write_text(json.dumps(values | {key: -1} if key.endswith("_id") else values))
    assert () == open_checkpoint(folder).warnings
