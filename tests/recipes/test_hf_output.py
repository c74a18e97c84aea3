"""moe2gguf.recipes.hf_output: Mixtral folders against transformers, llama.cpp and the direct GGUF file."""

import json
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from flat_options import flat_options
from llama_logits import llama_logits_at

from moe2gguf import convert, densify, plan_conversion
from moe2gguf.cli import cli
from moe2gguf.errors import OutputError, PlanError
from moe2gguf.recipes import write_folder as shards
from moe2gguf.recipes.hf_output import write_folder

TOKENS = [int(t) for t in np.random.default_rng(0).integers(5, 250, 40)]
HOLDABLE = [name for name in checkpoints.FAMILIES if not name.startswith(("qwen", "llama-bias"))]
CALIBRATED = flat_options(experts=4, used=2, n_token=1024, refit=True, amplify="any")


def write(folder: Any, out: Any, options: Any, **settings: Any) -> Any:
    """The folder `out` of the checkpoint `folder`."""
    return write_folder(folder, out, options, **settings).path


def tensors_of(path: Any) -> Any:
    """name -> (type, shape, bytes) of a GGUF file."""
    found = gguf.GGUFReader(path).tensors
    return {tensor.name: (tensor.tensor_type, tuple(tensor.shape), tensor.data.tobytes()) for tensor in found}


def hf_logits(folder: Any, k: Any) -> Any:
    """transformers' logits (n_token, n_vocab) with k experts per token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for layer in model.model.layers:
        layer.mlp.gate.top_k = k
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].double().numpy()


@pytest.mark.parametrize("family", HOLDABLE)
def test_with_all_experts_transformers_computes_the_dense_model(family: Any, tmp_path: Path) -> None:
    """Every family that fits: rotary settings, head sizes and tied embeddings survive; 1e-3 in float32."""
    dense = checkpoints.make(tmp_path / "dense", family)
    folder = write(dense, tmp_path / "sliced", flat_options(experts=4))

    assert np.abs(checkpoints.torch_logits(dense, TOKENS) - hf_logits(folder, 4)).max() <= 1e-3


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_transformers_and_llama_cpp_compute_the_same_at_every_count(family: str, tmp_path: Path) -> None:
    """The folder in transformers, its own GGUF form in llama.cpp: float32, k = 1 .. 4, 1e-3."""
    dense = checkpoints.make(tmp_path / "dense", family)
    folder = write(dense, tmp_path / "sliced", CALIBRATED)
    convert(folder, tmp_path / "out.gguf")
    counts = [1, 2, 3, 4]

    logits = llama_logits_at(tmp_path / "out.gguf", TOKENS, counts)

    for k, ours in zip(counts, logits, strict=True):
        assert np.abs(hf_logits(folder, k) - ours).max() <= 1e-3, k
    assert np.std(logits[0]) > 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [flat_options(experts=5, align=32), CALIBRATED], ids=["seed", "calibrated"])
def test_reading_the_folder_back_gives_the_bytes_of_the_direct_way(dtype: str, options: Any, tmp_path: Path) -> None:
    """Every tensor of the GGUF file, whichever way it went, and the recipe in its metadata."""
    dense = checkpoints.make(tmp_path / "dense", "llama", dtype=dtype)
    convert(dense, tmp_path / "direct.gguf", options)
    folder = write(dense, tmp_path / "sliced", options)
    convert(folder, tmp_path / "back.gguf")

    assert tensors_of(tmp_path / "direct.gguf") == tensors_of(tmp_path / "back.gguf")
    direct, back = (gguf.GGUFReader(tmp_path / name).fields for name in ("direct.gguf", "back.gguf"))
    kept = [key for key in direct if key.startswith(("moe2gguf.slicing.", "moe2gguf.calibration.", "llama.", "token"))]
    assert [direct[key].contents() for key in kept] == [back[key].contents() for key in kept]


def test_shards_have_an_index_and_hold_the_same_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of 100 kB per shard: several files, every tensor named once, the same logits."""
    dense = checkpoints.make(tmp_path / "dense", "llama")
    whole = write(dense, tmp_path / "whole", flat_options(experts=4))
    monkeypatch.setattr(shards.write_shards, "__defaults__", (100_000,))
    cut = write(dense, tmp_path / "cut", flat_options(experts=4))

    names = sorted(path.name for path in cut.glob("*.safetensors"))
    assert len(names) > 2
    assert f"model-00001-of-{len(names):05}.safetensors" == names[0]
    assert np.array_equal(hf_logits(whole, 4), hf_logits(cut, 4))


def test_what_the_class_cannot_hold_is_refused_with_the_reason(tmp_path: Path) -> None:
    """Attention biases, block types, rules for single tensors: all in one list, and nothing is left behind."""
    qwen = checkpoints.make(tmp_path / "qwen", "qwen2")
    rules = flat_options(experts=4, type="q8_0", align=32, tensor_types=(r"blk\.0\..*=f32",))

    with pytest.raises(PlanError) as caught:
        write(qwen, tmp_path / "out", rules)

    assert ["attention biases", "q8_0", "--tensor-type"] == [
        word
        for word, line in zip(("attention biases", "q8_0", "--tensor-type"), caught.value.refusals, strict=True)
        if word in line
    ]
    with pytest.raises(PlanError, match="source again"):
        write(qwen, tmp_path / "out", flat_options(dense=True))
    assert ["qwen"] == [path.name for path in tmp_path.iterdir()]


def test_only_a_folder_of_ours_is_replaced(tmp_path: Path) -> None:
    """Without --force nothing is; with it, no other folder and never the model itself."""
    dense = checkpoints.make(tmp_path / "dense", "llama")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    out = write(dense, tmp_path / "out", flat_options(experts=4))

    with pytest.raises(OutputError, match="--force"):
        write(dense, out, flat_options(experts=2))
    with pytest.raises(OutputError, match="was not written by moe2gguf"):
        write(dense, tmp_path / "mine", flat_options(experts=2), force=True)
    with pytest.raises(OutputError, match="would replace"):
        write(dense, dense, flat_options(experts=2), force=True)
    write(dense, out, flat_options(experts=2), force=True)

    assert 2 == json.loads((out / "config.json").read_text())["num_local_experts"]
    assert ["dense", "mine", "out"] == sorted(path.name for path in tmp_path.iterdir())


def test_a_folder_that_is_named_as_the_old_one_is_kept(tmp_path: Path) -> None:
    """OUT.old may be what the user kept, or the very model that is read."""
    out = write(checkpoints.make(tmp_path / "dense", "llama"), tmp_path / "out", flat_options(experts=4))
    old = checkpoints.make(tmp_path / "out.old", "llama")
    before = {path: path.read_bytes() for path in [*old.iterdir(), *out.iterdir()]}

    with pytest.raises(OutputError, match=r"out.old: is in the way of replacing out; remove it, or rename it"):
        write(old, out, flat_options(experts=2), force=True)

    assert before == {path: path.read_bytes() for path in [*old.iterdir(), *out.iterdir()]}


def test_a_failure_leaves_no_folder(tmp_path: Path) -> None:
    """A NaN in the last layer is found while writing; neither the folder nor a part of it stays."""
    from safetensors.numpy import load_file, save_file

    dense = checkpoints.make(tmp_path / "dense", "llama")
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = np.nan
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(Exception, match="NaN or infinity"):
        write(dense, tmp_path / "out", flat_options(experts=4))

    assert ["dense"] == [path.name for path in tmp_path.iterdir()]


def test_hostile_provenance_is_left_out(tmp_path: Path) -> None:
    """Only short plain values under our own names reach the metadata of a file."""
    dense = checkpoints.make(tmp_path / "dense", "llama")
    folder = write(dense, tmp_path / "out", flat_options(experts=4))
    bad = {"moe2gguf.slicing.x": [1], "llama.block_count": 7, "moe2gguf.slicing.y": "a" * 1000, "moe2gguf.slicing.z": 1}
    checkpoints.rewrite_config(folder, moe2gguf=bad)

    metadata = plan_conversion(folder).metadata

    assert {"moe2gguf.slicing.z"} == {key for key in metadata if key.startswith("moe2gguf.slicing")}
    assert 3 == metadata["llama.block_count"]


@pytest.mark.parametrize(("target", "kind"), [("mixtral", "MixtralForCausalLM"), ("glm4moe", "Glm4MoeForCausalLM")])
def test_the_command_writes_a_folder_with_tokenizer_and_card(tmp_path: Path, target: str, kind: str) -> None:
    """Tokenizer files are the source's, a card names the recipe; --plan and --check belong to GGUF files."""
    dense = checkpoints.make(tmp_path / "dense", "llama")
    out = tmp_path / "out"
    options = ["--target", target, "--preset", "exact"]

    done = CliRunner().invoke(cli, ["convert", str(dense), str(out), "-e", "4", "--format", "hf", *options])
    refused = CliRunner().invoke(cli, ["convert", str(dense), str(out), "--format", "hf", "--check", "auto"])

    assert (0, 2) == (done.exit_code, refused.exit_code)
    assert f"{kind}, 4 experts, 4 used" in done.stdout
    assert (dense / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    assert "| slicing.expert_count | 4 |" in (out / "README.md").read_text()


@pytest.mark.parametrize("kind", ["auto", "f32", "f16", "bf16"])
def test_the_config_says_the_type_that_is_written(kind: str, tmp_path: Path) -> None:
    """Which is the one that transformers loads: F32 experts of 12 neurons run, in bfloat16 they could not."""
    dense = checkpoints.make(tmp_path / "dense", dtype="bfloat16", intermediate_size=96)
    n = 8 if kind == "f32" else 4  # rows of 48 bytes

    model = transformers.AutoModelForCausalLM.from_pretrained(
        write(dense, tmp_path / "sliced", flat_options(experts=n, type=kind)), dtype="auto"
    )

    names = {"auto": "bfloat16", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
    assert getattr(torch, names[kind]) == model.dtype
    assert torch.isfinite(model(torch.tensor([TOKENS])).logits).all()
    densify(tmp_path / "sliced", tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert getattr(torch, names[kind]) == again.dtype


@pytest.mark.parametrize(("dtype", "step"), [("float32", 4), ("bfloat16", 8)])
def test_rows_that_transformers_cannot_compute_are_refused_with_the_alignment(
    dtype: str, step: int, tmp_path: Path
) -> None:
    """96 neurons in 16 experts are rows of 6 numbers: refused before a byte is written, and with --align they run."""
    dense = checkpoints.make(tmp_path / "dense", "llama", dtype=dtype)

    with pytest.raises(PlanError, match=rf"experts of 6 neurons have rows of .* bytes.*; add --align {step}$"):
        write(dense, tmp_path / "out", flat_options(experts=16))
    assert ["dense"] == [path.name for path in tmp_path.iterdir()]
    folder = write(dense, tmp_path / "out", flat_options(experts=16, align=step))

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert "grouped_mm" == model.config._experts_implementation
    with torch.no_grad():
        assert bool(model(torch.tensor([TOKENS])).logits.isfinite().all())  # in the stored type
        logits = model.float()(torch.tensor([TOKENS])).logits[0].numpy()
    assert np.abs(checkpoints.torch_logits(dense, TOKENS) - logits).max() <= 1e-3


def test_an_alignment_of_the_user_s_is_kept(tmp_path: Path) -> None:
    """What is named is a multiple of the alignment that was asked for."""
    dense = checkpoints.make(tmp_path / "dense", "llama")

    with pytest.raises(PlanError, match=r"experts of 6 neurons .*; add --align 12$"):
        write(dense, tmp_path / "out", flat_options(experts=16, align=6))
