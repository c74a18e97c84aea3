"""moe2gguf.recipes.gguf_as_hf: a GGUF file's tensors are the checkpoint's, its forward pass is transformers'."""

from pathlib import Path
from typing import Any

import checkpoints
import gguf
import gguf_bytes as g
import numpy as np
import pytest
import torch
import transformers
from flat_options import flat_options
from qwen2_gguf import qwen2_gguf
from safetensors.numpy import load_file

from moe2gguf import convert, plan_conversion
from moe2gguf.errors import PlanError
from moe2gguf.experts.forward import Layers
from moe2gguf.gguf.dense_model import open_dense
from moe2gguf.recipes.gguf_as_hf import Weights

FAMILIES = ["llama", "llama-head-dim", "llama-bias", "llama-tied", "mistral", "qwen2"]
ROTARY = ["linear-rope", "yarn-rope", "yarn-rope-attention-factor", "llama3-rope"]
IDS = np.arange(5, 69).reshape(2, 32)


def dense(folder: Any, path: Any, **options: Any) -> Any:
    """The checkpoint as a dense GGUF file."""
    convert(folder, path, flat_options(dense=True, **options))
    return path


def names(tensors: Any) -> Any:
    """Those that the forward pass reads: not the output matrix."""
    return [name for name in tensors if name != "lm_head.weight"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensors_are_the_checkpoints(tmp_path: Path, family: Any) -> None:
    """Bit for bit under their Hugging Face names, rotary rows and biases put back; and any rows of them."""
    stored = load_file(checkpoints.make(tmp_path / "m", family) / "model.safetensors")

    weights = Weights(open_dense(dense(tmp_path / "m", tmp_path / "x.gguf")))

    for name in names(stored):
        np.testing.assert_array_equal(stored[name], weights.read(name), err_msg=name)
        np.testing.assert_array_equal(stored[name][[3, 0, 7]], weights.read(name, np.array([3, 0, 7])), err_msg=name)


@pytest.mark.parametrize("fused", [False, True], ids=["q k v", "qkv"])
def test_arch_qwen2_keeps_its_rows(tmp_path: Path, fused: bool) -> None:
    """Whose q and k have Hugging Face's order already, in tensors of their own or in one."""
    folder = checkpoints.make(tmp_path / "m", "qwen2")
    path = qwen2_gguf(folder, dense(folder, tmp_path / "x.gguf"), tmp_path / "y.gguf", fused=fused)
    stored = load_file(folder / "model.safetensors")

    weights = Weights(open_dense(path))

    for name in names(stored):
        np.testing.assert_array_equal(stored[name], weights.read(name), err_msg=name)


@pytest.mark.parametrize("kind", ["bf16", "q8_0", "q4_1"])
def test_other_types_are_decoded(tmp_path: Path, kind: str) -> None:
    """To what the gguf package makes of the same rows, whichever order they stand in."""
    folder = checkpoints.make(tmp_path / "m", "llama", hidden_size=128)
    stored = load_file(folder / "model.safetensors")

    weights = Weights(open_dense(dense(folder, tmp_path / "x.gguf", type=kind, pure=True)))

    number = gguf.GGMLQuantizationType[kind.upper()]
    for name in [name for name in names(stored) if "proj" in name]:
        expected = gguf.quants.dequantize(gguf.quants.quantize(stored[name], number), number)
        np.testing.assert_array_equal(expected, weights.read(name).astype(np.float32), err_msg=name)


def test_biases_that_a_file_leaves_out_are_zeros(tmp_path: Path) -> None:
    """One of q alone, in one layer: the others add nothing."""
    model = g.LlamaFile().put(g.f32("blk.0.attn_q.bias", (16,)))
    (tmp_path / "x.gguf").write_bytes(model.bytes())
    file = open_dense(tmp_path / "x.gguf")

    weights = Weights(file)

    assert (True, False) == (file.model.bias_qkv, file.model.bias_output)
    for name in ("0.self_attn.k_proj", "1.self_attn.q_proj"):
        assert not weights.read(f"model.layers.{name}.bias").any()


@pytest.mark.parametrize("family", [*ROTARY, "qwen2", "llama-bias"])
def test_the_hidden_states_are_transformers_own(tmp_path: Path, family: Any) -> None:
    """Of the folder's model: every rotary scaling, LLaMA 3's tensor of divisors among them, biases, GQA."""
    folder = checkpoints.make(tmp_path / "m", family)
    file = open_dense(dense(folder, tmp_path / "x.gguf"))
    weights = Weights(file)
    hidden = torch.zeros(IDS.size, 64)
    with torch.inference_mode():
        layers = Layers(file.model, weights.read, torch.device("cpu"), weights.rope_divisors())
        layers.embed(IDS, hidden)
        for i in range(len(layers)):
            block = layers.block(i)
            block.attend(hidden, IDS.shape[1])
            hidden += block.mlp(block.mlp_input(hidden))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = model.model(torch.from_numpy(IDS)).last_hidden_state
        found = model.model.norm(hidden).reshape(expected.shape)

    torch.testing.assert_close(expected, found, rtol=1e-4, atol=1e-4)
    assert ("llama3" in family) == (weights.rope_divisors() is not None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.set("llama.rope.scaling.type", "str", "longrope"), "scaled by longrope"),
        (lambda m: m.set("llama.rope.scaling.attn_factor", "f32", 1.5), "an attn_factor without yarn"),
        (
            lambda m: m.set("llama.rope.freq_base", "f32", 1.0).set("llama.rope.scaling.type", "str", "yarn"),
            "frequencies are all the same, which yarn cannot scale",
        ),
        (lambda m: m.put(g.f32("blk.0.attn_q.scale", (1,))), "scales beside its weights, such as blk.0.attn_q.scale"),
        (lambda m: m.keys.pop("tokenizer.ggml.tokens"), "it has no vocabulary"),
    ],
)
def test_what_the_modules_do_not_compute_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    """By the plan, with every way out; and only where text would have to be read."""
    model = g.LlamaFile(d_ff=1280)
    change(model)
    (tmp_path / "x.gguf").write_bytes(model.bytes())

    with pytest.raises(
        PlanError, match=rf"{words}; convert its Hugging Face folder.*--load-calibration.*--preset exact"
    ):
        plan_conversion(tmp_path / "x.gguf", flat_options(experts=4, used=2))

    plan_conversion(tmp_path / "x.gguf", flat_options(experts=4, used=2, preset="exact"))


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("freq_base", "f32", 0.0),
        ("freq_base", "f32", float("nan")),
        ("freq_base", "str", "x"),
        ("scaling.factor", "f32", -2.0),
        ("scaling.attn_factor", "f32", float("inf")),
    ],
)
def test_rotary_settings_that_are_no_numbers(tmp_path: Path, key: str, kind: str, value: Any) -> None:
    """Named, with what was found."""
    (tmp_path / "x.gguf").write_bytes(g.LlamaFile().set(f"llama.rope.{key}", kind, value).bytes())

    with pytest.raises(PlanError, match=rf"llama.rope.{key}: expected a finite number above zero, found"):
        plan_conversion(tmp_path / "x.gguf", flat_options(experts=2))


def test_odd_heads(tmp_path: Path) -> None:
    """Nothing could rotate them."""
    (tmp_path / "x.gguf").write_bytes(g.LlamaFile(d_model=15, n_head=1, n_head_kv=1).bytes())

    with pytest.raises(PlanError, match="heads of 15: the rotary embedding needs pairs"):
        plan_conversion(tmp_path / "x.gguf", flat_options(experts=2))
