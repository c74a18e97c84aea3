"""Merging: every expert is its donor to the byte, everything else the base, and routers are as good as they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import numpy as np
import pytest
import tiny_gguf
from command import moe2gguf
from llama_logits import llama_logits_of
from reference import reference_inputs, reference_routing
from safetensors.numpy import load_file, save_file

from moe2gguf import Donor, MergeOptions, merge, quantize, verify
from moe2gguf.errors import CorruptWeightError, OutputError, PlanError
from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.watch_mlps import cut_prompts
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.merge_inputs import read_recipe

TOKENS = [int(t) for t in np.random.default_rng(0).integers(5, 250, 16)]
ROLES = ("gate", "up", "down")


def write_words(letters: str, n: int = 4000) -> str:
    """A text of these letters only."""
    return "".join(np.random.default_rng(0).choice([*letters], n))


OURS, THEIRS = write_words("abcdefg"), write_words("tuvwxyz")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model and two that are a little different."""
    folder, base = tmp_path_factory.mktemp("models"), tiny_gguf.dense_weights()
    licences = {"general.license": "mit", "general.organization": "us"}
    tunes = [{name: w + 0.1 * i * tiny_gguf.dense_weights(i)[name] for name, w in base.items()} for i in range(3)]
    return [tiny_gguf.write_gguf(folder / f"{i}.gguf", one, f16=True, strings=licences) for i, one in enumerate(tunes)]


def read_tensors(path: Path) -> dict[str, Any]:
    """Tensors by name, as gguf's reader has them."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def read_metadata(path: Path) -> dict[str, Any]:
    """The keys and their values, as gguf's reader has them."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_experts_are_the_donors_byte_for_byte(models: list[Path], tmp_path: Path, kind: str) -> None:
    """All other tensors are the base's, and the keys say what the file is made of."""
    files = [quantize(one, tmp_path / one.name, TypeOptions(type=kind)).path for one in models]

    merge(files[0], [Donor(files[2]), Donor(files[1])], tmp_path / "out", MergeOptions("random", used=1), threads=1)

    out, (base, first, second) = read_tensors(tmp_path / "out"), map(read_tensors, files)
    for name, tensor in base.items():
        if name.split(".")[-2].removeprefix("ffn_") in ROLES:
            stacked = out.pop(name.replace(".weight", "_exps.weight"))
            assert stacked.data.tobytes() == second[name].data.tobytes() + first[name].data.tobytes(), name
            assert stacked.tensor_type == tensor.tensor_type
        else:
            assert out.pop(name).data.tobytes() == tensor.data.tobytes(), name
    assert all(name.endswith("ffn_gate_inp.weight") and one.data.any() for name, one in out.items())
    keys = read_metadata(tmp_path / "out")
    assert (keys["llama.expert_count"], keys["llama.expert_used_count"]) == (2, 1)
    assert keys["general.license"] == "mit"
    assert keys["general.base_model.0.organization"] == "us"
    assert verify(tmp_path / "out").problems == ()


def test_attention_may_be_the_donors_mean(models: list[Path], tmp_path: Path) -> None:
    """Its matrices and the norms of the layers; what is stored in blocks has none, and is refused."""
    options, donors = MergeOptions("random", attention="average"), [*map(Donor, models[1:])]

    merge(models[0], donors, tmp_path / "out", options, threads=1)

    out, (base, first, second) = read_tensors(tmp_path / "out"), map(read_tensors, models)
    for name in base:
        if "attn" in name or name.endswith("ffn_norm.weight"):
            mean = (first[name].data.astype(np.float32) + second[name].data) / 2
            np.testing.assert_array_equal(out[name].data, mean.astype(base[name].data.dtype), name)
            assert out[name].tensor_type == base[name].tensor_type
        elif name in out:
            assert out[name].data.tobytes() == base[name].data.tobytes(), name
    assert read_metadata(tmp_path / "out")["moe2gguf.merge.attention"] == "average"
    small = [quantize(one, tmp_path / one.name, TypeOptions(type="q8_0")).path for one in models]
    with pytest.raises(PlanError, match=r"attention stored in blocks, of which no mean is taken: .*0\.gguf, .*2\.gguf"):
        merge(small[0], [*map(Donor, small[1:])], tmp_path / "none", options)


def test_a_model_merged_with_itself_is_the_model(models: list[Path], tmp_path: Path) -> None:
    """In llama.cpp: the weights of equal experts add up to one."""
    merge(models[0], [Donor(models[0])] * 3, tmp_path / "out", MergeOptions("random"))

    ours, theirs = llama_logits_of([tmp_path / "out", models[0]], TOKENS)

    assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()


def test_a_hidden_router_is_the_mean_state_of_the_prompts(models: list[Path], tmp_path: Path) -> None:
    """Less that of the negative ones, at length one, in every layer; as a textbook computes the base."""
    donors = [Donor(models[1], ("the he", "and"), ("of",)), Donor(models[2], ("to",))]

    done = merge(models[0], donors, tmp_path / "out", MergeOptions("hidden"), threads=1)

    def mean(*prompts: str) -> Any:
        pieces = run_in_child(cut_prompts, models[0], [prompts], 256)[0]
        return np.concatenate([reference_inputs(models[0], piece) for piece in pieces], axis=1).mean(1)

    rows = np.stack([mean("the he", "and") - mean("of"), mean("to")], axis=1)  # (n_layer, n_expert, d_model)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    out = read_tensors(tmp_path / "out")
    for i, expected in enumerate(rows):
        assert np.allclose(out[f"blk.{i}.ffn_gate_inp.weight"].data, expected, atol=2e-3)
    assert not done.layers
    assert "too few prompts" in done.notes[0]


@pytest.mark.parametrize(("router", "least"), [("regression", 0.95), ("hidden", 0.6)])
def test_a_router_knows_separable_prompts(models: list[Path], tmp_path: Path, router: str, least: float) -> None:
    """On text that it has not seen, and no worse than the result says."""
    donors = [Donor(models[1], (OURS,)), Donor(models[2], (THEIRS,))]

    done = merge(models[0], donors, tmp_path / "out", MergeOptions(router, used=1), threads=1)  # type: ignore[arg-type]

    assert done.accuracy is not None
    assert done.accuracy > least
    for e, letters in enumerate(("abcdefg", "tuvwxyz")):
        fresh = run_in_child(cut_prompts, tmp_path / "out", [["".join(reversed(letters)) * 30]], 256)[0][0]
        _, chosen = reference_routing(tmp_path / "out", fresh)
        for layer, ids in zip(done.layers, chosen, strict=True):
            assert layer.first[e] == pytest.approx(np.mean(ids[:, 0] == e), abs=0.25)
            assert layer.runs == layer.first


def test_folders_merge_as_their_files(tmp_path: Path) -> None:
    """Hugging Face folders are planned as dense files; nothing but the result is left behind."""
    folders = [checkpoints.make(tmp_path / f"m{i}", "llama", seed=i) for i in range(2)]

    merge(folders[0], [Donor(folders[0], (OURS,)), Donor(folders[1], (THEIRS,))], tmp_path / "out", threads=1)

    moe2gguf("convert", folders[1], tmp_path / "dense", "--dense")
    stacked = read_tensors(tmp_path / "out")["blk.0.ffn_up_exps.weight"]
    dense = read_tensors(tmp_path / "dense")["blk.0.ffn_up.weight"]
    assert stacked.data[1].tobytes() == dense.data.tobytes()
    assert {path.name for path in tmp_path.iterdir()} == {"m0", "m1", "out", "dense"}


def test_of_a_weight_that_is_no_number_the_donor_is_named(tmp_path: Path) -> None:
    """Its place says which expert it would be."""
    folders = [checkpoints.make(tmp_path / f"m{i}", "llama", seed=i) for i in range(2)]
    tensors = load_file(folders[1] / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, folders[1] / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(CorruptWeightError, match=rf"expert 1 \(from {folders[1]}\): NaN or infinity at \[3, 5\]"):
        merge(folders[0], [Donor(one) for one in folders], tmp_path / "out", MergeOptions(router="random"))


def test_models_that_do_not_fit_are_refused_together(models: list[Path], tmp_path: Path) -> None:
    """Each with what is other in it; nothing is written."""
    weights = tiny_gguf.dense_weights(n_layer=1, d_ff=128)
    shape = tiny_gguf.write_gguf(tmp_path / "shape.gguf", weights, f16=True)
    words = tiny_gguf.write_gguf(tmp_path / "words.gguf", tiny_gguf.dense_weights(), f16=True, texts={290: "other"})
    kind = tiny_gguf.write_gguf(tmp_path / "kind.gguf", tiny_gguf.dense_weights())

    with pytest.raises(PlanError) as refused:
        merge(models[0], [Donor(one) for one in (models[1], shape, words, kind)], tmp_path / "out")

    text = "\n".join(refused.value.refusals)
    assert "shape.gguf: another shape" in text
    assert "n_layer 1, not 2; d_ff 128, not 96" in text
    assert "words.gguf: another vocabulary" in text
    assert "kind.gguf: other types in 6 tensors: blk.0.ffn_gate.weight is F32" in text
    assert "no prompts for" in text
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_merged_are_named(models: list[Path], tmp_path: Path) -> None:
    """A model with experts, one donor alone, more used than there are, and an output that is read."""
    sliced = tiny_gguf.write_gguf(
        tmp_path / "moe.gguf", tiny_gguf.sliced_weights(tiny_gguf.dense_weights(), 4), f16=True
    )
    with pytest.raises(PlanError, match="has 4 experts already"):
        merge(sliced, [Donor(sliced)] * 2, tmp_path / "out")
    with pytest.raises(PlanError, match="at least two models"):
        merge(models[0], [Donor(models[1])], tmp_path / "out", MergeOptions("random", used=1), threads=1)
    with pytest.raises(PlanError, match="there are only 2"):
        merge(models[0], [Donor(models[1])] * 2, tmp_path / "out", MergeOptions("random", used=3))
    with pytest.raises(OutputError, match="would replace"):
        merge(models[0], [Donor(models[1])] * 2, models[1], MergeOptions("random"), force=True)


def test_a_base_of_one_token_of_context_is_merged(tmp_path: Path) -> None:
    """Prompts are cut into pieces that have room for BOS and more."""
    base = tiny_gguf.write_gguf(tmp_path / "base.gguf", tiny_gguf.dense_weights(), f16=True, n_context=1)
    donors = [Donor(base, ("the he and of to " * 9,)), Donor(base, ("in an er is th " * 9,))]

    assert len(merge(base, donors, tmp_path / "out", threads=1).layers) == 2


def test_differing_licences_are_all_named(models: list[Path], tmp_path: Path) -> None:
    """And the file claims none as its own."""
    other = tiny_gguf.write_gguf(
        tmp_path / "other.gguf", tiny_gguf.dense_weights(), f16=True, strings={"general.license": "gpl-3.0"}
    )

    done = merge(models[0], [Donor(models[0]), Donor(other)], tmp_path / "out", MergeOptions("random"))

    keys = read_metadata(tmp_path / "out")
    assert "general.license" not in keys
    assert keys["moe2gguf.merge.licenses"] == ["mit", "mit", "gpl-3.0"]
    assert "gpl-3.0" in done.notes[0]


def test_the_command_prints_how_well_layers_route(models: list[Path], tmp_path: Path) -> None:
    """One line per layer, and the same numbers as JSON."""
    for name, text in (("ours.txt", OURS), ("theirs.txt", THEIRS)):
        (tmp_path / name).write_text(text)
    prompts = ["--prompts", tmp_path / "ours.txt", "--prompts", tmp_path / "theirs.txt"]
    line = ["merge", *models, tmp_path / "out.gguf", "-t", 1, *prompts]

    done = moe2gguf(*line)
    again = moe2gguf(*line, "--json", "--force")

    assert not done.returncode, done.stderr
    found = json.loads(again.stdout)
    assert len(found["layers"]) == 2
    assert f"{found['accuracy']:.1%}" in done.stdout
    assert moe2gguf(*line[:-2], "--force").returncode == 1


RECIPE = """
base_model: {0}
gate_mode: random
dtype: float32
experts_per_token: 1
experts:
  - source_model: {1}
    positive_prompts: ["def add(a, b):", "import os"]
    negative_prompts: [poems]
  - source_model: {2}
"""


def test_a_recipe_of_mergekit_is_read(models: list[Path], tmp_path: Path) -> None:
    """Base, experts, prompts, gate mode, count and type; what the command line says counts more."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(*models))

    recipe = read_recipe(tmp_path / "recipe.yaml")
    done = moe2gguf("merge", tmp_path / "recipe.yaml", tmp_path / "out", "--used", 2, "-t", 1)

    assert recipe.donors[0] == Donor(str(models[1]), ("def add(a, b):", "import os"), ("poems",))
    assert not done.returncode, done.stderr
    keys = read_metadata(tmp_path / "out")
    assert keys["moe2gguf.merge.router"] == "random"
    assert keys["llama.expert_used_count"] == 2
    assert read_tensors(tmp_path / "out")["blk.0.ffn_up_exps.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_a_recipe_that_cannot_be_followed_is_refused_with_all_reasons(tmp_path: Path) -> None:
    """Gate modes, types and keys that are not known, and values of the wrong kind."""
    (tmp_path / "odd.yaml").write_text(
        "gate_mode: cheap_embed\ndtype: int8\nexperts_per_token: yes\nresidual_scale: 0.1\narchitecture: qwen\n"
        "experts: [text, {source_model: x, positive_prompts: [1], noise_scale: 2}]\n"
    )
    with pytest.raises(PlanError) as refused:
        read_recipe(tmp_path / "odd.yaml")
    text = "\n".join(refused.value.refusals)
    for what in ("'residual_scale'", "base_model", "'cheap_embed'", "'int8'", "experts_per_token", "'qwen'"):
        assert what in text
    for what in ("expert 0: needs source_model", "expert 1: 'noise_scale'", "expert 1: positive_prompts is a list"):
        assert what in text


@pytest.mark.parametrize(
    "text", ["", "[]", "a: [", "a: &x 1\nb: *x", "!!python/object:os.system {}", "\xff", "[" * 9999]
)
def test_a_recipe_that_is_no_yaml_of_ours_is_one_error(text: str, tmp_path: Path) -> None:
    """Also what would run code or grow."""
    (tmp_path / "odd.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(PlanError):
        read_recipe(tmp_path / "odd.yaml")
