"""moe2gguf.recipes.densify: slices fold back to the model they came from, other experts are refused."""

from pathlib import Path
from typing import Any

import checkpoints
import gguf
import moe_files
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from flat_options import flat_options
from llama_logits import llama_logits
from safetensors.numpy import load_file, save_file

from moe2gguf import PruneOptions, TypeOptions, convert, prune, quantize
from moe2gguf.cli import cli
from moe2gguf.errors import GGUFError, PlanError
from moe2gguf.recipes.densify import densify, join_experts
from moe2gguf.recipes.hf_output import write_folder

TOKENS = [int(t) for t in np.random.default_rng(0).integers(5, 250, 40)]
ROUTED = {"n_token": 1024, "refit": False}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny LLaMA whose hidden states share a constant part, as those of trained models do."""
    folder = checkpoints.make(tmp_path_factory.mktemp("dense") / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 6.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sliced(dense: Any, out: Any, options: Any) -> Any:
    """A folder of experts of it."""
    return write_folder(dense, out, options).path


def bytes_of(folder: Any) -> Any:
    """name -> bytes of a folder's tensors."""
    return {name: tensor.tobytes() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_two_experts_by_hand() -> None:
    """Gate rows stand one behind the other, down columns are halved, the second expert's zero neuron is left out."""
    gate = np.array([[[1.0], [2.0]], [[3.0], [0.0]]], np.float32)  # (2, 2, 1)
    down = np.array([[[10.0, 20.0]], [[30.0, 0.0]]], np.float32)  # (2, 1, 2)

    one = join_experts(gate, gate * 5, down, np.array([0.5]), 3)

    assert [[1.0], [2.0], [3.0]] == one["gate"].tolist()
    assert [[5.0], [10.0], [15.0]] == one["up"].tolist()
    assert [[5.0, 10.0, 15.0]] == one["down"].tolist()


@pytest.mark.parametrize(
    "options", [flat_options(experts=4), flat_options(experts=4, align=32), flat_options(experts=8, align=8)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contiguous_slices_fold_back_bit_for_bit(options: Any, dtype: str, tmp_path: Path) -> None:
    """Amplification 4 or 8, with and without padding: every tensor is the checkpoint's own."""
    dense = checkpoints.make(tmp_path / "dense", dtype=dtype)
    folder = sliced(dense, tmp_path / "sliced", options)

    assert "known" == densify(folder, tmp_path / "back").how

    from safetensors import safe_open

    with (
        safe_open(dense / "model.safetensors", "pt") as old,
        safe_open(tmp_path / "back/model.safetensors", "pt") as new,
    ):
        assert set(old.keys()) == set(new.keys())
        assert all(torch.equal(old.get_tensor(name), new.get_tensor(name)) for name in old.keys())  # noqa: SIM118


def test_grouped_slices_fold_back_to_the_same_neurons(dense: Any, tmp_path: Path) -> None:
    """Activations decide the groups: the neurons come back in another order, each bit for bit with its column."""
    folder = sliced(dense, tmp_path / "sliced", flat_options(experts=8, used=4, **ROUTED))

    densify(folder, tmp_path / "back")

    old, new = (load_file(path / "model.safetensors") for path in (dense, tmp_path / "back"))
    name = "model.layers.1.mlp.{}_proj.weight"

    def neurons(tensors: Any) -> Any:
        rows = [tensors[name.format(role)] for role in ("gate", "up")] + [tensors[name.format("down")].T]
        return sorted(row.tobytes() for row in np.concatenate(rows, 1))

    assert neurons(old) == neurons(new)
    assert (
        np.abs(checkpoints.torch_logits(dense, TOKENS) - checkpoints.torch_logits(tmp_path / "back", TOKENS)).max()
        < 1e-3
    )


def test_a_file_folds_back_to_the_dense_file(dense: Any, tmp_path: Path) -> None:
    """GGUF to GGUF: the tensors of `convert --dense`, bit for bit, and llama.cpp runs it."""
    convert(dense, tmp_path / "sliced.gguf", flat_options(experts=4))
    convert(dense, tmp_path / "dense.gguf", flat_options(dense=True))

    densify(tmp_path / "sliced.gguf", tmp_path / "back.gguf")

    old, new = (gguf.GGUFReader(tmp_path / name) for name in ("dense.gguf", "back.gguf"))
    assert {t.name: t.data.tobytes() for t in old.tensors} == {t.name: t.data.tobytes() for t in new.tensors}
    assert 96 == new.fields["llama.feed_forward_length"].contents()
    assert "llama.expert_count" not in new.fields
    assert (
        np.abs(llama_logits(tmp_path / "back.gguf", TOKENS) - llama_logits(tmp_path / "dense.gguf", TOKENS)).max() == 0
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_scales_in_a_tensor_fold_back_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    """Three experts of a file, whose factor is no power of two and stands beside the weights."""
    folder = checkpoints.make(tmp_path / "hf", dtype=dtype)
    dense = convert(folder, tmp_path / "dense.gguf", flat_options(dense=True)).path
    convert(dense, tmp_path / "sliced.gguf", flat_options(experts=3, expert_scale=True))

    densify(tmp_path / "sliced.gguf", tmp_path / "back.gguf")

    sliced, old, new = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("sliced", "dense", "back"))
    assert "blk.0.ffn_down_exps.scale" in {t.name for t in sliced.tensors}
    assert {t.name: t.data.tobytes() for t in old.tensors} == {t.name: t.data.tobytes() for t in new.tensors}


def test_a_large_file_and_a_set_of_shards_fold_back_too(tmp_path: Path) -> None:
    """More rows in a layer's experts than one read takes; the set is named by its last shard."""
    dense = checkpoints.make(tmp_path / "dense", intermediate_size=6000, num_hidden_layers=1)
    convert(dense, tmp_path / "sliced.gguf", flat_options(experts=4, shard_size=2 * 10**6))
    convert(dense, tmp_path / "dense.gguf", flat_options(dense=True))
    shards = sorted(tmp_path.glob("sliced-*.gguf"))

    densify(shards[-1], tmp_path / "back.gguf")

    assert len(shards) > 1
    old, new = (gguf.GGUFReader(tmp_path / name) for name in ("dense.gguf", "back.gguf"))
    assert {t.name: t.data.tobytes() for t in old.tensors} == {t.name: t.data.tobytes() for t in new.tensors}
    assert not any(name.startswith("split.") for name in new.fields)


def test_quantized_experts_become_numbers(dense: Any, tmp_path: Path) -> None:
    """A q8_0 file: its projections are written as F32 with the values that the blocks stand for."""
    convert(dense, tmp_path / "sliced.gguf", flat_options(experts=2, align=32))
    quantize(tmp_path / "sliced.gguf", tmp_path / "q8.gguf", TypeOptions("q8_0"))

    densify(tmp_path / "q8.gguf", tmp_path / "back.gguf")

    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "back.gguf").tensors}
    original = load_file(dense / "model.safetensors")["model.layers.0.mlp.gate_proj.weight"]
    found = tensors["blk.0.ffn_gate.weight"]
    assert (original.shape, "F32") == (found.data.shape, found.tensor_type.name)
    assert np.abs(found.data - original).max() <= np.abs(original).max() / 127


def test_experts_weighed_by_the_input_are_refused(dense: Any, tmp_path: Path) -> None:
    """`--amplify any`: no dense model computes the same, so a folder and a file are refused with the way out."""
    options = flat_options(experts=4, used=2, amplify="any", **ROUTED)
    folder = sliced(dense, tmp_path / "sliced", options)
    convert(folder, tmp_path / "sliced.gguf")

    for model in (folder, tmp_path / "sliced.gguf"):
        with pytest.raises(PlanError, match=r"do not add up to one MLP .*; use the dense model it was made from"):
            densify(model, tmp_path / "back")
    assert ["sliced", "sliced.gguf"] == sorted(path.name for path in tmp_path.iterdir())


def test_even_experts_of_another_program_fold_back(dense: Any, tmp_path: Path) -> None:
    """Zero routers and no metadata of ours: each expert counts 1/n, and transformers computes the same."""
    folder = sliced(dense, tmp_path / "sliced", flat_options(experts=4, preset="exact"))
    checkpoints.rewrite_config(folder, moe2gguf={"moe2gguf.slicing.expert_count": 4})

    assert "even" == densify(folder, tmp_path / "back").how

    found, expected = (checkpoints.torch_logits(path, TOKENS) for path in (tmp_path / "back", folder))
    assert np.abs(found - expected).max() < 1e-3


def test_a_file_without_a_projection_is_refused(dense: Any, tmp_path: Path) -> None:
    """A tensor that the metadata promises is missing: named before anything is written."""
    convert(dense, tmp_path / "sliced.gguf", flat_options(experts=4))
    data = (tmp_path / "sliced.gguf").read_bytes().replace(b"blk.1.ffn_up_exps.weight", b"blk.1.ffn_op_exps.weight")
    (tmp_path / "sliced.gguf").write_bytes(data)

    with pytest.raises(GGUFError, match=r"1 tensors are missing: blk\.1\.ffn_up_exps\.weight"):
        densify(tmp_path / "sliced.gguf", tmp_path / "back.gguf")

    assert not (tmp_path / "back.gguf").exists()


def test_a_dense_model_is_refused(dense: Any, tmp_path: Path) -> None:
    """There is nothing to fold, in a folder or in a file."""
    convert(dense, tmp_path / "dense.gguf", flat_options(dense=True))

    with pytest.raises(PlanError, match="dense already"):
        densify(dense, tmp_path / "out")
    with pytest.raises(PlanError, match="expert_count"):
        densify(tmp_path / "dense.gguf", tmp_path / "out.gguf")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Mixtral folder of three experts, and the file that is made of it."""
    folder = tmp_path_factory.mktemp("mixtral") / "model"
    checkpoints.write(folder, "MixtralForCausalLM", num_local_experts=3, num_experts_per_tok=2)
    return folder, convert(folder, folder.with_suffix(".gguf")).path


def test_whole_experts_have_an_average(mixture: Any, tmp_path: Path) -> None:
    """Of a folder and of its file, which llama.cpp runs; and how far they are from it."""
    folder = mixture[0]
    old = load_file(folder / "model.safetensors")
    names = {"w1": "gate", "w3": "up", "w2": "down"}
    stacks = {
        f"model.layers.{i}.mlp.{role}_proj.weight": np.stack(
            [old[f"model.layers.{i}.block_sparse_moe.experts.{e}.{name}.weight"] for e in range(3)]
        )
        for i in range(3)
        for name, role in names.items()
    }

    done = [densify(one, tmp_path / one.name, average=True) for one in mixture]

    new = load_file(tmp_path / "model" / "model.safetensors")
    for name, stack in stacks.items():
        np.testing.assert_allclose(new[name], stack.mean(axis=0), atol=1e-6)
    squares = [np.square(x).sum() for name, s in stacks.items() if ".1." in name for x in (s - s.mean(axis=0), s)]
    far, length = sum(squares[::2]), sum(squares[1::2])
    assert [pytest.approx((far / length) ** 0.5)] * 2 == [one.apart[1] for one in done]
    logits = checkpoints.torch_logits(tmp_path / "model", TOKENS)
    assert np.abs(llama_logits(tmp_path / "model.gguf", TOKENS) - logits).max() < 1e-2


def test_a_single_expert_is_the_dense_model(mixture: Any, tmp_path: Path) -> None:
    """What `prune` leaves of each layer, whatever the router is: the same logits."""
    one = prune(mixture[1], tmp_path / "one.gguf", PruneOptions(keep=1, score="random"))

    assert "one" == densify(one.path, tmp_path / "dense.gguf").how

    assert np.abs(llama_logits(one.path, TOKENS) - llama_logits(tmp_path / "dense.gguf", TOKENS)).max() < 1e-3


def test_slices_are_not_averaged(dense: Any, tmp_path: Path) -> None:
    """They are parts of one MLP; and weights that do not add up to one have no mean."""
    folder = sliced(dense, tmp_path / "sliced", flat_options(experts=4))
    with pytest.raises(PlanError, match="its experts are slices of one MLP"):
        densify(folder, tmp_path / "out", average=True)
    keys = {**moe_files.KEYS, **moe_files.MORE["deepseek"]}
    (shapes,) = moe_files.list_tensors(moe_files.write(tmp_path / "keys.gguf", "deepseek", keys, {}))
    weights = {name: one for name, one in moe_files.make_weights(shapes).items() if not name.endswith("scale")}
    with pytest.raises(PlanError, match="do not add up to one"):
        densify(moe_files.write(tmp_path / "file.gguf", "deepseek", keys, weights), tmp_path / "out", average=True)
    assert not (tmp_path / "out").exists()


def test_the_command(dense: Any, tmp_path: Path) -> None:
    """One line on stdout, and the folder converts like the first one."""
    folder = sliced(dense, tmp_path / "sliced", flat_options(experts=4))

    done = CliRunner().invoke(cli, ["densify", str(folder), str(tmp_path / "back")])

    assert 0 == done.exit_code, done.output
    size = sum(file.stat().st_size for file in (tmp_path / "back").iterdir())
    assert f" {size:,} bytes, dense; what all its experts compute together" in done.stdout
    assert bytes_of(dense) == bytes_of(tmp_path / "back")


def test_the_command_says_how_far_experts_are_from_their_average(mixture: Any, tmp_path: Path) -> None:
    """Unrelated ones by nearly all of their length: the root of two thirds, of three."""
    done = CliRunner().invoke(cli, ["densify", str(mixture[0]), str(tmp_path / "out"), "--average"])

    assert 0 == done.exit_code, done.output
    assert "dense; the average of experts that are 82% of their length away from it" in done.stdout
