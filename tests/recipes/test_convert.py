"""The whole path: tiny checkpoints of every family -> GGUF -> llama.cpp, against transformers and numpy."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import numpy as np
import pytest
from flat_options import flat_options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_logits import llama_logits, llama_logits_at, mean_kl
from reference import reference_logits
from safetensors.numpy import load_file, save_file

from moe2gguf import convert, plan_conversion
from moe2gguf.errors import CorruptWeightError, OutputError, PlanError
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.hf.safetensors import INDEX
from moe2gguf.recipes.hf_output import write_folder

TOKENS = [int(t) for t in np.random.default_rng(0).integers(5, 250, 100)]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> folder, made once."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders = {}

    def get(family: Any) -> Any:
        if family not in folders:
            folders[family] = checkpoints.make(root / family, family)
        return folders[family]

    return get


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_dense_and_sliced_files_equal_transformers(made: Any, family: Any, tmp_path: Path) -> None:
    """F32, at positions past every original context: the same logits as transformers' own forward pass."""
    folder = made(family)
    expected = checkpoints.torch_logits(folder, TOKENS)
    convert(folder, tmp_path / "dense.gguf", flat_options(dense=True))
    convert(folder, tmp_path / "sliced.gguf", flat_options(experts=4, preset="exact"))

    for name in ("dense.gguf", "sliced.gguf"):
        logits = llama_logits(tmp_path / name, TOKENS)

        assert np.abs(expected - logits).max() <= 1e-3, name
        assert mean_kl(expected, logits) <= 1e-6, name
    assert expected.std() > 0.5  # the weights are large enough for the comparison to mean something


@pytest.mark.parametrize("align", [1, 32])
def test_every_count_equals_the_numpy_graph(made: Any, align: int, tmp_path: Path) -> None:
    """k = 1 .. n of a file whose experts need padding (96 neurons in 5 experts), against the textbook graph."""
    convert(made("llama"), tmp_path / "sliced.gguf", flat_options(experts=5, align=align))
    counts = [1, 2, 3, 4, 5]

    for k, logits in zip(counts, llama_logits_at(tmp_path / "sliced.gguf", TOKENS[:40], counts), strict=True):
        expected = reference_logits(tmp_path / "sliced.gguf", TOKENS[:40], k)

        assert np.abs(expected - logits).max() <= 1e-3, k


@pytest.mark.parametrize("original", [True, False], ids=["w1 w2 w3", "fused"])
def test_mixtral_checkpoints_keep_their_experts_and_router(tmp_path: Path, original: bool) -> None:
    """Both layouts of transformers give its logits, and the same bytes."""
    folder = checkpoints.write(
        tmp_path / "mixtral", "MixtralForCausalLM", original=original, num_local_experts=4, num_experts_per_tok=2,
        head_dim=16,
    )  # fmt: skip
    assert original == ("model.layers.0.block_sparse_moe.gate.weight" in load_file(folder / "model.safetensors"))

    convert(folder, tmp_path / "out.gguf")

    expected = checkpoints.torch_logits(folder, TOKENS)
    logits = llama_logits(tmp_path / "out.gguf", TOKENS)
    assert np.abs(expected - logits).max() <= 1e-3
    assert (4, 2) == counts_of(tmp_path / "out.gguf")


@pytest.mark.parametrize("original", [True, False], ids=["w1 w2 w3", "fused"])
def test_a_corrupt_expert_is_named_alone(tmp_path: Path, original: bool) -> None:
    """The tensor, the expert, its place there, and the one tensor that it was stored in."""
    folder = checkpoints.write(
        tmp_path / "m", "MixtralForCausalLM", original=original, num_local_experts=4, head_dim=16
    )  # fmt: skip
    tensors = load_file(folder / "model.safetensors")
    stem = "model.layers.1.block_sparse_moe.experts.2.w2.weight" if original else "model.layers.1.mlp.experts.down_proj"
    (tensors[stem] if original else tensors[stem][2])[3, 5] = np.nan
    save_file(tensors, folder / "model.safetensors")

    with pytest.raises(CorruptWeightError) as error:
        convert(folder, tmp_path / "out.gguf")

    place = f"blk.1.ffn_down_exps.weight, expert 2 (from {stem}): NaN or infinity at [3, 5]"
    assert f"{place}; fetch a sound copy of the checkpoint" == str(error.value)


def counts_of(path: Any) -> Any:
    """(expert_count, expert_used_count) as the gguf package reads them."""
    fields = gguf.GGUFReader(path).fields
    return tuple(fields[f"llama.{key}"].contents() for key in ("expert_count", "expert_used_count"))


def test_mixtral_options(tmp_path: Path) -> None:
    """--used changes the count; --experts and --dense make no sense there and are refused together."""
    folder = checkpoints.write(
        tmp_path / "m", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2, head_dim=16
    )

    convert(folder, tmp_path / "out.gguf", flat_options(used=3))

    assert (4, 3) == counts_of(tmp_path / "out.gguf")
    with pytest.raises(PlanError, match="has 4 experts already") as caught:
        plan_conversion(folder, flat_options(experts=8, dense=True))
    assert 2 == len(caught.value.refusals)
    with pytest.raises(PlanError, match="--group, --align: the checkpoint has 4 experts already"):
        plan_conversion(folder, flat_options(group="routed", align=32))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["auto", "f32", "f16", "bf16", "q8_0", "q4_0"])
def test_every_type_from_every_type(tmp_path: Path, dtype: str, kind: str) -> None:
    """The tensors have the planned types and the sliced weights are the checkpoint's, to the type's precision."""
    folder = checkpoints.make(tmp_path / "model", dtype=dtype, intermediate_size=128)
    convert(folder, tmp_path / "out.gguf", flat_options(experts=4, type=kind, allow_fallback=True))

    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    down = load_file(folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].astype(np.float32)
    tensor = stored["blk.1.ffn_down_exps.weight"]
    wanted = {"auto": {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]}.get(kind, kind.upper())
    assert wanted == tensor.tensor_type.name
    assert (
        "F32" == stored["blk.1.ffn_gate_inp.weight"].tensor_type.name == stored["output_norm.weight"].tensor_type.name
    )
    decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(4, 64, 32)
    restored = np.concatenate(list(decoded), axis=1) / 4
    tolerance = {"Q8_0": 0.01, "Q4_0": 0.15, "BF16": 0.004, "F16": 0.001, "F32": 0}[wanted]
    lossless = wanted in ("F32", {"float16": "F16", "bfloat16": "BF16"}.get(dtype))
    assert np.abs(restored - down).max() <= (0 if lossless else tolerance * np.abs(down).max())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(
    experts=st.integers(1, 12),
    align=st.sampled_from([1, 8, 32, 256]),
    kind=st.sampled_from(["auto", "bf16", "f16"]),
    tied=st.booleans(),
)
def test_the_plan_is_the_file(
    made: Any, tmp_path_factory: pytest.TempPathFactory, experts: Any, align: Any, kind: Any, tied: Any
) -> None:
    """Exact size, names, shapes and types, before a tensor is read; padding is exactly zero."""
    folder = made("llama-tied" if tied else "llama")
    out = tmp_path_factory.mktemp("plan") / "out.gguf"
    plan = plan_conversion(folder, flat_options(experts=experts, align=align, type=kind))

    convert(folder, out, flat_options(experts=experts, align=align, type=kind))

    assert plan.file_size == out.stat().st_size
    tensors = gguf.GGUFReader(out).tensors
    assert [(t.name, t.shape, t.type) for t in plan.tensors] == [
        (t.name, tuple(reversed(t.shape.tolist())), t.tensor_type) for t in tensors
    ]
    up = next(t for t in tensors if t.name == "blk.0.ffn_up_exps.weight")
    rows = gguf.quants.dequantize(up.data, up.tensor_type).reshape(-1, 64)
    assert 96 == np.any(rows != 0, axis=1).sum()


def test_the_plan_reads_no_tensor_data(made: Any, tmp_path: Path) -> None:
    """With the weights replaced by a hole of the same size, the plan is the same."""
    folder = shutil.copytree(made("llama"), tmp_path / "hollow")
    whole = plan_conversion(folder).to_dict()
    path = folder / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(header)
        file.truncate(size)

    assert whole == plan_conversion(folder).to_dict()


def test_bytes_do_not_depend_on_folder_sharding_threads_or_layout(tmp_path: Path) -> None:
    """One model, five ways to lay it out, one file; only the name is the folder's where none is given."""
    one = checkpoints.make(tmp_path / "one")
    elsewhere = shutil.copytree(one, tmp_path / "x" / "another name")
    three = checkpoints.make(tmp_path / "three", shards=3)
    assert (three / INDEX).exists()
    renamed = shutil.copytree(one, tmp_path / "renamed")
    (renamed / "model.safetensors").rename(renamed / "weights.safetensors")

    results = []
    for i, (folder, threads) in enumerate([(one, 1), (one, 4), (elsewhere, 2), (three, 3), (renamed, 2)]):
        convert(folder, tmp_path / f"{i}.gguf", flat_options(name="Tiny"), threads=threads)
        results.append((tmp_path / f"{i}.gguf").read_bytes())

    assert [results[0]] * 5 == results
    assert str(tmp_path).encode() not in results[0]


def test_metadata_says_what_was_done(made: Any, tmp_path: Path) -> None:
    """Hyper-parameters, provenance, no key that arch `llama` misreads."""
    done = convert(made("llama"), tmp_path / "out.gguf", flat_options(experts=5, used=5, align=32))
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "out.gguf").fields.items()}

    assert {
        "general.architecture": "llama",
        "general.file_type": gguf.LlamaFileType.ALL_F32,
        "general.name": "Llama",
        "llama.block_count": 3,
        "llama.feed_forward_length": 32,
        "llama.expert_count": 5,
        "llama.expert_used_count": 5,
        "llama.attention.head_count_kv": 2,
        "moe2gguf.slicing.group": "contiguous",
        "moe2gguf.slicing.refit": False,
        "moe2gguf.slicing.router": "zero",
        "moe2gguf.slicing.amplification": 5.0,
        "moe2gguf.slicing.padding": 5 * 32 - 96,
        "moe2gguf.slicing.dense_feed_forward_length": 96,
        "moe2gguf.slicing.seed": 0,
        "moe2gguf.source.architecture": "LlamaForCausalLM",
        "moe2gguf.source.sha256": done.source_digest,
    }.items() <= fields.items()
    assert (64, True) == (len(done.source_digest), "0" * 64 != done.source_digest)
    assert not [key for key in fields if "expert_weights" in key or "expert_gating" in key]


def test_the_digest_changes_with_one_weight(tmp_path: Path) -> None:
    """And with nothing else."""
    folder = checkpoints.make(tmp_path / "model")
    before = convert(folder, tmp_path / "a.gguf").source_digest
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, folder / "model.safetensors")

    assert before != convert(folder, tmp_path / "b.gguf").source_digest


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"],
)
def test_a_corrupt_weight_is_named_and_nothing_is_left(tmp_path: Path, name: str, value: Any) -> None:
    """Tensor and layer, wherever it stands."""
    folder = checkpoints.make(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].reshape(-1)[5] = value
    save_file(tensors, folder / "model.safetensors")
    before = set(tmp_path.iterdir())

    with pytest.raises(CorruptWeightError, match=name.replace(".", r"\.")):
        convert(folder, tmp_path / "out.gguf")

    assert before == set(tmp_path.iterdir())


@pytest.mark.parametrize(("value", "fits"), [(8188.0, True), (8192.0, False), (1e5, False)])
def test_f16_overflow_after_the_amplification(tmp_path: Path, value: float, fits: bool) -> None:
    """8 * 8188 = 65504 is the largest f16; above it an error that offers bf16, never an infinity."""
    folder = checkpoints.make(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = value
    save_file(tensors, folder / "model.safetensors")

    if fits:
        convert(folder, tmp_path / "out.gguf", flat_options(type="f16"))
    else:
        with pytest.raises(CorruptWeightError, match=r"down_proj.*bf16"):
            convert(folder, tmp_path / "out.gguf", flat_options(type="f16"))
        convert(folder, tmp_path / "out.gguf", flat_options(type="bf16"))


def test_all_refusals_at_once(tmp_path: Path) -> None:
    """Tensors missing, unexpected and mis-shaped, config and tokenizer faults: one error lists every one."""
    folder = checkpoints.make(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(16, np.float32)
    tensors["model.norm.weight"] = np.ones(65, np.float32)
    save_file(tensors, folder / "model.safetensors")
    checkpoints.rewrite_config(folder, mlp_bias=True, rms_norm_eps="small")
    (folder / "tokenizer.json").unlink()

    with pytest.raises(PlanError) as caught:
        convert(folder, tmp_path / "out.gguf")

    message = str(caught.value)
    for words in (
        "mlp_bias is true",
        "rms_norm_eps is 'small'",
        "missing tensor: model.layers.0.mlp.up_proj.weight (96, 64)",
        "missing tensor: lm_head.weight",
        "tie_word_embeddings",
        "unexpected tensor: model.layers.0.self_attn.q_norm.weight",
        "wrong shape: model.norm.weight is (65,), config.json says (64,)",
        "tokenizer",
    ):
        assert words in message, words
    assert not (tmp_path / "out.gguf").exists()


def test_tied_embeddings_ignore_a_stored_head_and_old_files_their_frequencies(tmp_path: Path) -> None:
    """Both are common in real checkpoints; the first is worth a warning."""
    folder = checkpoints.make(tmp_path / "model", "llama-tied")
    plain = convert(folder, tmp_path / "a.gguf")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, folder / "model.safetensors")

    done = convert(folder, tmp_path / "b.gguf")

    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert plain.plan.warnings == ()
    assert ["lm_head.weight is ignored"] == [warning[:25] for warning in done.plan.warnings]


def test_a_head_of_its_own_beside_tied_embeddings_is_written(tmp_path: Path) -> None:
    """A fine-tune that trained its head: transformers 5 uses the stored one; the folder form has it too."""
    folder = checkpoints.make(tmp_path / "model", "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    save_file(tensors, folder / "model.safetensors")
    expected = checkpoints.torch_logits(folder, TOKENS)

    done = convert(folder, tmp_path / "out.gguf")
    convert(folder, tmp_path / "dense.gguf", flat_options(dense=True))
    write_folder(folder, tmp_path / "folder")

    assert any("lm_head.weight is written" in warning for warning in done.plan.warnings)
    for name in ("out.gguf", "dense.gguf"):
        assert np.abs(expected - llama_logits(tmp_path / name, TOKENS)).max() <= 1e-3, name
    assert np.abs(expected - checkpoints.torch_logits(tmp_path / "folder", TOKENS)).max() <= 1e-3


@pytest.mark.parametrize("settings", [{}, {"quant_method": "bitsandbytes", "load_in_4bit": True}])
def test_leftovers_beside_plain_weights_do_no_harm(made: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    """A quantization_config (with a warning, unless empty) and derived buffers: the same bytes."""
    folder = shutil.copytree(made("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.rotary_emb.inv_freq"] = tensors["model.layers.0.self_attn.rotary_emb.cos_cached"] = np.ones(8)
    save_file(tensors, folder / "model.safetensors")
    checkpoints.rewrite_config(folder, quantization_config=settings)
    convert(made("llama"), tmp_path / "a.gguf", flat_options(name="Tiny"))

    done = convert(folder, tmp_path / "b.gguf", flat_options(name="Tiny"))

    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert bool(settings) == any("quantization_config is ignored" in warning for warning in done.plan.warnings)


def test_an_index_may_name_the_tied_head_and_omit_buffers(tmp_path: Path) -> None:
    """Neither holds numbers of its own."""
    folder = checkpoints.make(tmp_path / "model", "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    weight_map = dict.fromkeys([*tensors, "lm_head.weight"], "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, folder / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    assert () == plan_conversion(folder).warnings


@pytest.mark.parametrize("extra", ["weight.absmax", "qweight", "weight_scale_inv", "scales"])
def test_quantized_weights_are_one_problem(tmp_path: Path, extra: str) -> None:
    """Not one for every tensor; with what to do."""
    folder = checkpoints.make(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".mlp." in name]:
        tensors[name] = np.zeros((8, 1), np.uint8)
        tensors[name.replace("weight", extra)] = np.zeros(4, np.float32)
    save_file(tensors, folder / "model.safetensors")

    with pytest.raises(PlanError, match="the weights are quantized") as caught:
        plan_conversion(folder)

    assert 1 == len(caught.value.refusals)


@pytest.mark.parametrize(
    ("file", "rename", "says"),
    [
        ("model", lambda name: "module." + name, "begin with 'module.model.'"),
        ("model", lambda name: name.replace("model.", "transformer."), "begin with 'transformer.'"),
        ("model", lambda name: name.removeprefix("model."), "begin with ''"),
        ("model", lambda name: f"base_model.model.{name[:-7]}.lora_A.weight", "merge it into its base model"),
        ("model", lambda name: name.replace("_proj.", "_proj.base_layer."), "merge it into its base model"),
        ("adapter_model", lambda name: f"base_model.model.{name}", "merge it into its base model"),
        (
            "consolidated",
            lambda name: name.replace("model.embed_tokens", "tok_embeddings"),
            "original LLaMA or Mistral",
        ),
    ],
)
def test_foreign_names_are_one_problem(tmp_path: Path, file: str, rename: Callable[[str], str], says: str) -> None:
    """Not two lines for every tensor; with the way to a folder that can be read."""
    folder = checkpoints.make(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({rename(name): array for name, array in tensors.items()}, folder / f"{file}.safetensors")

    with pytest.raises(PlanError) as caught:
        plan_conversion(folder)

    (problem,) = caught.value.refusals
    assert says in problem


def test_a_head_without_an_embedding_is_both(tmp_path: Path) -> None:
    """Tied embeddings, stored under the head's name: the same file."""
    folder = checkpoints.make(tmp_path / "model", "llama-tied")
    convert(folder, tmp_path / "a.gguf", flat_options(name="Tiny"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")
    expected = checkpoints.torch_logits(folder, TOKENS)

    convert(folder, tmp_path / "b.gguf", flat_options(name="Tiny"))

    assert np.abs(expected - llama_logits(tmp_path / "b.gguf", TOKENS)).max() <= 1e-3
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_scaling_beside_rope_parameters_is_not_lost(tmp_path: Path) -> None:
    """Both generations of rope settings in one config.json: transformers' logits at positions beyond the original."""
    folder = checkpoints.make(tmp_path / "model")
    scaling = {"rope_type": "linear", "factor": 4.0}
    checkpoints.rewrite_config(folder, rope_theta=10000.0, rope_scaling=scaling)
    assert "rope_parameters" in json.loads((folder / "config.json").read_text())

    convert(folder, tmp_path / "out.gguf")

    expected = checkpoints.torch_logits(folder, TOKENS)
    assert np.abs(expected - llama_logits(tmp_path / "out.gguf", TOKENS)).max() <= 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": 0}, "--experts 0: must lie between 1 and"),
        ({"experts": 97}, "--experts 97: must lie between 1 and the MLP's width, 96"),
        ({"experts": 8, "used": 9}, "--used 9: must lie between 1 and the number of experts, 8"),
        ({"used": 0}, "--used 0"),
        ({"align": 0}, "--align 0"),
        ({"type": "q9_9"}, "type q9_9: unknown; choose"),
        ({"type": "q8_0", "experts": 8}, "pad the experts with --align 32"),
    ],
)
def test_each_bad_option_is_refused_with_the_way_out(made: Any, options: Any, words: str) -> None:
    """By the plan, so before anything is written."""
    with pytest.raises(PlanError) as caught:
        plan_conversion(made("llama"), flat_options(**options))

    assert words in str(caught.value)


def test_a_count_that_aborts_llama_cpp_is_refused(tmp_path: Path) -> None:
    """The limit of llama.cpp's graph, with its reason, instead of a file that kills every program."""
    folder = checkpoints.make(tmp_path / "model", num_hidden_layers=12, hidden_size=16)
    with pytest.raises(PlanError, match="the process aborts"):
        plan_conversion(folder, flat_options(experts=16))
    assert (16, 4) == counts_of(
        convert(folder, tmp_path / "out.gguf", flat_options(experts=16, used=4, preset="exact")).path
    )


def test_alignment_makes_a_block_type_possible_and_the_plan_says_what_it_costs(made: Any, tmp_path: Path) -> None:
    """96 neurons in 8 experts of 12, padded to 32: 8 * 32 - 96 zero neurons."""
    plan = plan_conversion(made("llama"), flat_options(experts=8, align=32, type="q8_0"))

    places = sum(t.n_bytes for t in plan.tensors if "_exps" in t.name)
    assert plan.padding_bytes == places - places * 96 // 256
    convert(made("llama"), tmp_path / "out.gguf", flat_options(experts=8, align=32, type="q8_0"))
    convert(made("llama"), tmp_path / "dense.gguf", flat_options(dense=True, type="q8_0"))
    ours, theirs = (llama_logits(tmp_path / name, TOKENS) for name in ("out.gguf", "dense.gguf"))
    assert mean_kl(theirs, ours) < 1e-3


def test_speed_bounds_by_hand(made: Any) -> None:
    """All experts: a little under 1, for the router is read too. Half of them: the arithmetic of bytes."""
    plan = plan_conversion(made("llama"), flat_options(experts=4))
    sizes = {tensor.name: tensor.n_bytes for tensor in plan.tensors}
    experts = sum(size for name, size in sizes.items() if "_exps" in name)
    other = sum(sizes.values()) - experts - sizes["token_embd.weight"]
    routers = 3 * 4 * 64 * 4

    assert other + experts // 2 == plan.active_bytes(2)
    assert (other - routers + experts) / (other + experts // 2) == plan.speed_bound(2)
    assert 0.9 < plan.speed_bound(4) < 1


def test_fewer_experts_with_a_zero_router_is_one_clear_warning(made: Any) -> None:
    """Never shipped silently; and all experts give no warning."""
    (warning,) = plan_conversion(made("llama"), flat_options(used=4, preset="exact")).warnings
    assert "not be coherent" in warning
    assert () == plan_conversion(made("llama")).warnings


def test_a_number_of_experts_that_is_no_power_of_two_is_said_to_round(made: Any) -> None:
    """The amplification is then not exact in the file's type."""
    assert "not a power of two" in plan_conversion(made("llama"), flat_options(experts=6)).warnings[0]


def test_targets(made: Any, tmp_path: Path) -> None:
    """An existing file needs force; a file of the model is refused always, by name and by link."""
    folder = shutil.copytree(made("llama"), tmp_path / "model")
    out = tmp_path / "out.gguf"
    convert(folder, out)
    with pytest.raises(OutputError, match="--force"):
        convert(folder, out)
    convert(folder, out, force=True)
    (tmp_path / "link").symlink_to(folder / "model.safetensors")
    for target in (folder / "model.safetensors", tmp_path / "link", folder / "config.json"):
        with pytest.raises(OutputError, match="would replace"):
            convert(folder, target, force=True)
    assert checkpoints.torch_logits(folder, [5, 6]).shape[0] == 2


@pytest.mark.parametrize("place", ["models--org--name/snapshots/0123abc", "links"])
def test_a_folder_of_links_gives_the_same_model(made: Any, place: str, tmp_path: Path) -> None:
    """A snapshot of the hub's cache, and a user's folder of links, which a warning names; neither is an output.

    The file of a snapshot says where it is from, the other one has the same bytes as the folder's.
    """
    blobs, folder = tmp_path / "models--org--name" / "blobs", tmp_path / place
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted(made("llama").iterdir())):
        (folder / path.name).symlink_to(shutil.copyfile(path, blobs / str(number)))
    convert(made("llama"), tmp_path / "real.gguf", flat_options(name="Tiny"))

    done = convert(folder, tmp_path / "links.gguf", flat_options(name="Tiny"))

    real, links = read_gguf(tmp_path / "real.gguf"), read_gguf(tmp_path / "links.gguf")
    origin = {"general.organization", "moe2gguf.source.repository", "moe2gguf.source.revision"}
    origin = origin if place != "links" else set()
    assert origin == {key for key in links.metadata if links.metadata[key] != real.metadata.get(key)}
    assert real.metadata == {key: value for key, value in links.metadata.items() if key not in origin}
    assert real.path.read_bytes()[real.data_offset :] == links.path.read_bytes()[links.data_offset :]
    assert (place == "links") == any("links to other places" in warning for warning in done.plan.warnings)
    with pytest.raises(OutputError, match="would replace"):
        convert(folder, blobs / "3", force=True)


def test_the_model_card_becomes_metadata(tmp_path: Path) -> None:
    """Licence, languages, base model and name as llama.cpp's converter writes them; a local path never."""
    folder = checkpoints.make(tmp_path / "model")
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage:\n- en\n- no\nbase_model: org/Base-Model-1B\ntags: [chat]\n---\n# Hi\n"
    )
    checkpoints.rewrite_config(folder, _name_or_path="org/Tiny-Chat")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_k": 40}))

    metadata = plan_conversion(folder).metadata

    expected = {
        "general.name": "Tiny Chat",
        "general.basename": "Tiny",
        "general.finetune": "Chat",
        "general.organization": "Org",
        "general.license": "apache-2.0",
        "general.languages": ["en", "no"],
        "general.tags": ["chat"],
        "general.base_model.count": 1,
        "general.base_model.0.name": "Base Model 1B",
        "general.base_model.0.organization": "Org",
        "general.base_model.0.repo_url": "https://huggingface.co/org/Base-Model-1B",
        "general.sampling.temp": 0.7,
        "general.sampling.top_k": 40,
    }
    assert expected == {key: metadata[key] for key in expected}
    checkpoints.rewrite_config(folder, _name_or_path=str(Path("/home/me/secret")))
    assert "secret" not in json.dumps(plan_conversion(folder).to_dict()["metadata"])
    assert "Mine" == plan_conversion(folder, flat_options(name="Mine")).metadata["general.name"]


@pytest.mark.parametrize(
    ("front", "skipped"),
    [
        ("a: &x [1]\nb: *x", True),
        ("a: [", True),
        ("_: !!python/object:os.x 1", True),
        ("base_model: {a: [1]}", False),
        ("tags: 5", False),
        ("license: [a, [b]]", False),
    ],
)
def test_a_senseless_model_card_is_skipped_and_never_a_crash(tmp_path: Path, front: str, skipped: bool) -> None:
    """YAML of a stranger: no aliases, no objects; it says nothing about the weights, so it stops no conversion."""
    folder = checkpoints.make(tmp_path / "model")
    (folder / "README.md").write_text(f"---\n{front}\n---\n")

    plan = plan_conversion(folder)

    assert skipped == any("README.md is skipped" in warning for warning in plan.warnings)
    assert plan.metadata["general.name"] == "Model"


def test_a_conversion_is_described_by_json_ready_values(made: Any, tmp_path: Path) -> None:
    """What --json prints."""
    done = convert(made("llama"), tmp_path / "out.gguf", flat_options(experts=4))

    values = json.loads(json.dumps(done.to_dict()))

    assert (tmp_path / "out.gguf").stat().st_size == values["file_size"]
    assert 4 == values["expert_count"] == len(values["speed_bound"])
    assert done.plan.slicing is not None
    assert dataclasses.asdict(done.plan.slicing) == values["slicing"]


def test_a_preset_in_one_pass(tmp_path: Path) -> None:
    """Experts padded to 256, types like the dense parent's, file type and bits per weight in metadata and plan."""
    folder = checkpoints.make(tmp_path / "model", hidden_size=256, intermediate_size=512, dtype="bfloat16")
    options = flat_options(experts=4, align=256, type="q4_k_m", tensor_types=(r"blk\.0\.ffn_up_exps\.weight=q8_0",))

    done = convert(folder, tmp_path / "out.gguf", options)
    dense = plan_conversion(folder, flat_options(dense=True, type="q4_k_m"))

    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    stored = {t.name: t.tensor_type.name for t in reader.tensors}
    expected = {t.name: t.type.name for t in dense.tensors} | {"blk.0.ffn_up.weight": "Q8_0"}
    assert expected == {name.replace("_exps", ""): kind for name, kind in stored.items() if "gate_inp" not in name}
    assert {"F32"} == {kind for name, kind in stored.items() if "gate_inp" in name or "norm" in name}
    assert gguf.LlamaFileType.MOSTLY_Q4_K_M == reader.fields["general.file_type"].contents()
    values = done.to_dict()
    bits = 8 * sum(t.n_bytes for t in reader.tensors) / sum(int(t.n_elements) for t in reader.tensors)
    assert round(bits, 4) == values["bits_per_weight"]
    assert ["Q8_0", "Q6_K"] == [rule["type"] for rule in values["rules"][:2]]


def test_q4_k_that_does_not_fit_offers_the_ways_out(made: Any) -> None:
    """24 wide experts in a 64 wide model: every misfit at once, nothing silent; allowed, each is listed."""
    with pytest.raises(PlanError) as caught:
        plan_conversion(made("llama"), flat_options(experts=4, type="q4_k_m"))
    (refusal,) = caught.value.refusals
    assert "24 (blk.0.ffn_down_exps.weight and 2 more)" in refusal
    assert "--allow-fallback" in refusal
    assert "--align" not in refusal  # the model is too narrow for whole blocks itself

    plan = plan_conversion(made("llama"), flat_options(experts=4, type="q4_k_m", allow_fallback=True))

    assert any("Q4_K does not fit" in text and "Q5_0 instead" in text for text in plan.warnings)
    assert {fallback["used"] for fallback in plan.to_dict()["fallbacks"]} == {"Q5_0", "Q8_0", "F16"}


SLOW = """
import sys, time, contextlib
from pathlib import Path
from moe2gguf import Options, convert

@contextlib.contextmanager
def slow(stage, total):
    def advance(n):
        print(stage, flush=True)
        time.sleep(0.02)
    yield advance

convert(Path(sys.argv[1]), Path(sys.argv[2]), Options(experts=4), threads=1, progress=slow)
"""


def test_a_killed_conversion_goes_on_where_it_was(made: Any, tmp_path: Path) -> None:
    """SIGKILL twice: the third run reuses what was done and gives the same bytes, the digest of the source included."""
    folder, undisturbed, target = made("llama"), tmp_path / "undisturbed.gguf", tmp_path / "out.gguf"
    digest = convert(folder, undisturbed, flat_options(experts=4)).source_digest
    for step in (4, 30):
        with subprocess.Popen([sys.executable, "-c", SLOW, folder, target], stdout=subprocess.PIPE) as process:
            for _ in range(step):
                assert process.stdout is not None
                process.stdout.readline()
            process.kill()

    done = convert(folder, target, flat_options(experts=4))

    assert done.reused > 5
    assert digest == done.source_digest
    assert undisturbed.read_bytes() == target.read_bytes()
    assert [target, undisturbed] == sorted(tmp_path.iterdir())


def test_an_f32_file_equals_the_folder_it_came_from(made: Any, tmp_path: Path) -> None:
    """Folder to experts, and folder to dense GGUF to experts: the same tensors, byte for byte."""

    convert(made("llama"), tmp_path / "dense.gguf", flat_options(dense=True))
    for n, scale in ((4, False), (6, True)):
        convert(made("llama"), tmp_path / "direct.gguf", flat_options(experts=n, expert_scale=scale), force=True)
        convert(tmp_path / "dense.gguf", tmp_path / "out.gguf", flat_options(experts=n), force=True)

        direct, out = (read_gguf(tmp_path / name) for name in ("direct.gguf", "out.gguf"))
        assert set(direct.tensors) == set(out.tensors)
        for name in direct.tensors:
            ours, theirs = (file.read_tensor(file.tensors[name]).tobytes() for file in (out, direct))
            assert ours == theirs, name
