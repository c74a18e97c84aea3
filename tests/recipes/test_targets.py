"""Files for graphs with a shared expert of their own: transformers' logits with all experts, plain sums below."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import llama_quantize
import numpy as np
import pytest
from flat_options import flat_options
from gguf import GGUFValueType as ValueType
from gguf_edit import edit_keys
from llama_logits import llama_logits, llama_logits_at
from reference import reference_logits
from shared_expert import SHARED, TARGETS, TEXT, TOKENS, N, assert_same_tensors, convert_calibrated

from moe2gguf import TypeOptions, convert, plan_conversion, quantize
from moe2gguf.errors import GGUFError, HarnessError, PlanError
from moe2gguf.experts.text import Text
from moe2gguf.gguf.counts import read_counts
from moe2gguf.gguf.inspect import inspect
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.gguf.set_used import set_used
from moe2gguf.gguf.verify import verify
from moe2gguf.measure.expert_usage import measure_expert_usage
from moe2gguf.recipes.densify import densify
from moe2gguf.recipes.hf_output import write_folder

FAMILIES = ["llama", "llama-tied", "llama-mqa", "yarn-rope", "mistral", "qwen2", "qwen2-tied", "qwen3", "llama3-rope"]
REFUSED = {("qwen3", "deepseek"), ("llama3-rope", "deepseek"), ("llama3-rope", "glm4moe")}
"""Families that a graph cannot carry, and says so."""


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    """A graph with a shared expert."""
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make(tmp_path_factory.mktemp("checkpoint"), "llama")


@pytest.fixture(scope="module")
def routed(target: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated file of each target."""
    return convert_calibrated(target, folder, tmp_path_factory.mktemp("routed") / "moe.gguf").path


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_are_the_dense_model(family: str, target: str, tmp_path: Path) -> None:
    """llama.cpp's logits are those of transformers, and a prefix of the experts is what numpy says."""
    if (family, target) in REFUSED:
        pytest.skip("the graph cannot carry the family, and says so")
    source = checkpoints.make(tmp_path / "hf", family)
    file = convert(source, tmp_path / "moe.gguf", flat_options(N, target=target, n_shared=SHARED, preset="exact")).path

    ours, fewer = llama_logits_at(file, TOKENS, [N, SHARED + 1])

    assert np.abs(ours - checkpoints.torch_logits(source, TOKENS)).max() < 1e-4
    assert np.abs(ours - reference_logits(file, TOKENS)).max() < 1e-4
    assert np.abs(fewer - ours).max() > 1e-2


def test_the_empty_layers_window_does_no_harm(tmp_path: Path) -> None:
    """A text longer than llama.cpp's cache for layers with a sliding window, which here is 256 places."""
    source = checkpoints.make(tmp_path / "hf", "llama3-rope", max_position_embeddings=2048)
    options = flat_options(N, target="step35", n_shared=SHARED, preset="exact")
    tokens = [int(t) for t in np.random.default_rng(1).integers(3, 300, 1100)]

    (ours,) = llama_logits_at(convert(source, tmp_path / "moe.gguf", options).path, tokens, [N])

    assert np.abs(ours - checkpoints.torch_logits(source, tokens)).max() < 1e-3


def test_every_count_is_what_numpy_says(routed: Path) -> None:
    """The router chooses by its own bias, and the weights do not depend on the count."""
    counts = range(SHARED + 1, N + 1)
    for k, ours in zip(counts, llama_logits_at(routed, TOKENS, list(counts)), strict=True):
        assert np.abs(ours - reference_logits(routed, TOKENS, k - SHARED)).max() < 2e-4, k


def test_a_calibrated_file_is_the_dense_model_with_all_experts(routed: Path, folder: Path) -> None:
    """Up to what the smallness of the router leaves."""
    (ours,) = llama_logits_at(routed, TOKENS, [N])
    dense = checkpoints.torch_logits(folder, TOKENS)
    assert np.abs(ours - dense).max() < 2e-2 * np.abs(dense).max()


def test_the_file_is_sound_and_says_what_it_is(routed: Path, target: str) -> None:
    """Counts are the router's in the file, and contain the shared expert here."""
    metadata = {name: field.contents() for name, field in gguf.GGUFReader(routed).fields.items()}
    counts = read_counts(read_gguf(routed))

    assert inspect(routed).n_layer == counts.size.n_layer == 3
    assert verify(routed).problems == ()
    assert metadata["general.architecture"] == target
    assert (metadata[f"{target}.expert_count"], metadata[f"{target}.expert_used_count"]) == (N - SHARED, N - SHARED)
    key, shared = ("shared_feed_forward_length", SHARED * 16) if target == "step35" else ("shared_count", SHARED)
    assert (metadata[f"{target}.expert_{key}"], metadata[f"{target}.expert_feed_forward_length"]) == (shared, 16)
    assert (counts.n_expert, counts.n_used, counts.n_shared) == (N, N, SHARED)


def test_the_routers_choices_are_counted(routed: Path) -> None:
    """Every routed expert runs for half of the tokens on average where two of four are chosen."""
    use = measure_expert_usage(routed, used=SHARED + 2, text=Text(TEXT, "fox"), n_token=256, n_context=64)
    loads = np.array([layer.load for layer in use.layers])
    assert loads.shape == (3, N - SHARED)
    assert np.allclose(loads.sum(1), 2)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3", "llama3-rope"])
def test_a_gguf_file_gives_the_same_model(family: str, target: str, tmp_path: Path) -> None:
    """From the dense file as from the folder."""
    if (family, target) in REFUSED:
        pytest.skip("the graph cannot carry the family, and says so")
    source = checkpoints.make(tmp_path / "hf", family)
    dense = convert(source, tmp_path / "dense.gguf", flat_options(dense=True)).path
    options = flat_options(N, target=target, n_shared=SHARED, preset="exact")
    files = [convert(one, tmp_path / f"{one.stem}-moe.gguf", options).path for one in (dense, source)]
    assert_same_tensors(*files)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_folder_form_computes_the_same(family: str, tmp_path: Path) -> None:
    """transformers' own class gives the logits of the GGUF file, at every count, routers and biases included."""
    source = checkpoints.make(tmp_path / "hf", family)
    file = convert_calibrated("glm4moe", source, tmp_path / "moe.gguf").path
    text = tmp_path / "moe.txt"
    options = flat_options(N, target="glm4moe", n_shared=SHARED, text=text, n_token=1024)
    folder = write_folder(source, tmp_path / "glm", options).path
    counts = [SHARED + 1, SHARED + 2, N]
    for k, ours in zip(counts, llama_logits_at(file, TOKENS, counts), strict=True):
        checkpoints.rewrite_config(folder, num_experts_per_tok=k - SHARED)
        assert np.abs(ours - checkpoints.torch_logits(folder, TOKENS)).max() < 2e-4, k

    again = convert(folder, tmp_path / "again.gguf").path
    assert_same_tensors(file, again)


def test_densify_gives_the_dense_model_back(routed: Path, folder: Path, tmp_path: Path) -> None:
    """A calibrated file too: the experts were only sorted."""
    densify(routed, tmp_path / "dense.gguf")
    (ours,) = llama_logits_at(tmp_path / "dense.gguf", TOKENS, [None])
    assert np.abs(ours - checkpoints.torch_logits(folder, TOKENS)).max() < 1e-4


def test_densify_gives_qwen3_back(tmp_path: Path) -> None:
    """As architecture qwen3, whose rows need no other order."""
    source = checkpoints.make(tmp_path / "hf", "qwen3")
    options = flat_options(N, target="glm4moe", n_shared=SHARED, preset="exact")
    densify(convert(source, tmp_path / "moe.gguf", options).path, tmp_path / "dense.gguf")
    convert(source, tmp_path / "reference.gguf", flat_options(dense=True))
    assert_same_tensors(tmp_path / "dense.gguf", tmp_path / "reference.gguf")
    assert verify(tmp_path / "dense.gguf").problems == ()


def test_densify_gives_llama3_factors_back(tmp_path: Path) -> None:
    """The keys of the empty layer are gone, and so is the copy of the embedding."""
    source = checkpoints.make(tmp_path / "hf", "llama3-rope", tie_word_embeddings=True)
    moe = convert(source, tmp_path / "moe.gguf", flat_options(N, target="step35", n_shared=SHARED, preset="exact")).path
    densify(moe, tmp_path / "dense.gguf")
    reference = convert(source, tmp_path / "reference.gguf", flat_options(dense=True)).path
    assert_same_tensors(tmp_path / "dense.gguf", reference)
    ours, dense = gguf.GGUFReader(tmp_path / "dense.gguf"), gguf.GGUFReader(reference)
    keys = [{n: f.contents() for n, f in reader.fields.items() if n.startswith("llama.")} for reader in (ours, dense)]
    assert keys[0] == keys[1]
    assert "output.weight" in {tensor.name for tensor in gguf.GGUFReader(moe).tensors}


@pytest.mark.parametrize("preset", ["q8_0", "q4_k_m", "q3_k_m"])
def test_quantized_types_are_llama_cpps(preset: str, target: str, tmp_path: Path) -> None:
    """As its own quantizer chooses them for the same file, the shared expert's too."""
    weights: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": N * 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 8,
    }
    source = checkpoints.make(tmp_path / "hf", "llama", **weights)
    options = flat_options(N, target=target, n_shared=SHARED, preset="exact", type="f16")
    file = convert(source, tmp_path / "moe.gguf", options).path
    quantize(file, tmp_path / "ours.gguf", TypeOptions(preset, llama_cpp_mix=True))
    llama_quantize.quantize(file, tmp_path / "theirs.gguf", gguf.LlamaFileType[f"MOSTLY_{preset.upper()}"])
    ours, theirs = (
        {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("ours.gguf", "theirs.gguf")
    )
    assert ours == theirs


def test_set_used_writes_the_routers_count(target: str, folder: Path, tmp_path: Path) -> None:
    """4 experts are 2 shared and 2 routed; fewer than one routed expert is refused."""
    file = convert(folder, tmp_path / "moe.gguf", flat_options(N, target=target, n_shared=SHARED, preset="exact")).path
    set_used(file, 4)
    assert gguf.GGUFReader(file).fields[f"{target}.expert_used_count"].contents() == 2
    with pytest.raises(GGUFError, match="2 shared ones always run"):
        set_used(file, 2)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("expert_shared_count", 0, "expert_shared_count: expected 1"),
        ("expert_feed_forward_length", None, "expert_feed_forward_length is missing"),
        ("expert_gating_func", 1, "these experts are cut for 2, found 1"),
        ("expert_gating_func", 9, "llama.cpp knows 1 to 4"),
        ("expert_weights_scale", 1.0, "these experts are cut for 2.0, found 1.0"),
        ("expert_weights_norm", True, "these experts are cut for False, found True"),
        ("expert_used_count", 40, "expected 1 to glm4moe.expert_count"),
        ("leading_dense_block_count", 1, "ffn_gate.weight"),
    ],
)
def test_verify_finds_what_llama_cpp_would_compute_wrongly(
    key: str, value: object, problem: str, folder: Path, tmp_path: Path
) -> None:
    """Each would load and compute garbage, or end the process."""
    options = flat_options(N, target="glm4moe", n_shared=SHARED, preset="exact")
    file = convert(folder, tmp_path / "moe.gguf", options).path
    broken = edit_keys(file, tmp_path / "broken.gguf", {f"glm4moe.{key}": value})
    assert problem in "\n".join(verify(broken).problems)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("nextn_predict_layers", None, "these experts are cut for 1, found None"),
        ("attention.sliding_window", 4096, "these experts are cut for 1, found 4096"),
        (
            "attention.sliding_window_pattern",
            [0, 1, 0, 0],
            r"these experts are cut for [0, 0, 0, 1], found [0, 1, 0, 0]",
        ),
        ("rope.dimension_count", 16, "these experts are cut for 32, found 16"),
        ("rope.freq_base_swa", 1.0, "these experts are cut for 500.0, found 1.0"),
        ("expert_shared_feed_forward_length", 16, "ffn_gate_shexp.weight: expected the shape (16, 64), found (32, 64)"),
        ("block_count", 3, "blk.2.attn_k.weight"),
    ],
)
def test_verify_finds_a_wrong_empty_layer(key: str, value: object, problem: str, tmp_path: Path) -> None:
    """llama.cpp would compute another model, or end the process."""
    source = checkpoints.make(tmp_path / "hf", "llama3-rope")
    file = convert(
        source, tmp_path / "moe.gguf", flat_options(N, target="step35", n_shared=SHARED, preset="exact")
    ).path
    broken = edit_keys(file, tmp_path / "broken.gguf", {f"step35.{key}": value})
    assert problem in "\n".join(verify(broken).problems)
    assert verify(file).problems == ()


@pytest.mark.parametrize(
    ("graph", "key"),
    [
        ("glm4moe", "leading_dense_block_count"),
        ("glm4moe", "expert_gating_func"),
        ("step35", "nextn_predict_layers"),
    ],
)
def test_verify_finds_a_number_of_another_type(graph: str, key: str, folder: Path, tmp_path: Path) -> None:
    """Once. llama.cpp does not load the file, though the number is right."""
    options = flat_options(N, target=graph, n_shared=SHARED, preset="exact", leading_dense=1)
    file = convert(folder, tmp_path / "moe.gguf", options).path
    name = f"{graph}.{key}".encode()
    unsigned, signed = (name + struct.pack("<I", int(kind)) for kind in (ValueType.UINT32, ValueType.INT32))
    assert 1 == file.read_bytes().count(unsigned)

    file.write_bytes(file.read_bytes().replace(unsigned, signed))

    assert [f"metadata {graph}.{key}: expected a UINT32, found INT32"] == [
        problem for problem in verify(file).problems if key in problem
    ]
    with pytest.raises(HarnessError):
        llama_logits(file, TOKENS)


def test_a_gguf_file_is_amplified_in_its_weights(tmp_path: Path) -> None:
    """Three of four are routed, and `deepseek` takes a third of each: its graph knows no scales, nor do blocks."""
    source = checkpoints.make(tmp_path / "hf", "llama", num_key_value_heads=4, intermediate_size=128)
    plain, blocks = (
        convert(source, tmp_path / f"{kind}.gguf", flat_options(dense=True, type=kind)).path for kind in ("f32", "q8_0")
    )
    options = flat_options(4, target="deepseek", n_shared=1, preset="exact")

    file = convert(plain, tmp_path / "moe.gguf", options).path

    assert np.abs(llama_logits(file, TOKENS) - checkpoints.torch_logits(source, TOKENS)).max() < 1e-4
    with pytest.raises(
        PlanError, match=r"the 3 routed experts are multiplied by 3, and the blocks of .* only by powers"
    ):
        plan_conversion(blocks, options)


def test_verify_misses_the_selection_bias(folder: Path, tmp_path: Path) -> None:
    """Without it llama.cpp does not load the file."""
    options = flat_options(N, target="glm4moe", n_shared=SHARED, preset="exact")
    file = convert(folder, tmp_path / "moe.gguf", options).path
    broken = edit_keys(file, tmp_path / "broken.gguf", {}, drop=["blk.1.exp_probs_b.bias"])
    assert "blk.1.exp_probs_b.bias" in "\n".join(verify(broken).problems)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama3-rope", {}, "no factors for the rotary embedding.*choose --target step35"),
        ("llama-bias", {}, "no bias of the attention's output"),
        ("llama", {"amplify": "used"}, "the same at every count"),
        ("llama", {"expert_scale": True}, "does not amplify experts"),
        ("llama", {"n_shared": 0}, "needs a shared expert"),
        ("llama", {"n_shared": 4, "used": 4}, "--shared 4"),
    ],
)
def test_what_a_graph_cannot_be_given_is_refused(
    family: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """One message with the way out, of a folder and of its dense file."""
    source = checkpoints.make(tmp_path / "hf", family)
    dense = convert(source, tmp_path / "dense.gguf", flat_options(dense=True)).path
    for one in (source, dense):
        with pytest.raises(PlanError, match=message):
            plan_conversion(one, flat_options(N, target="glm4moe", **options))


@pytest.mark.parametrize(
    ("family", "better"), [("llama", ["glm4moe"]), ("llama3-rope", ["step35"]), ("llama-bias", [])]
)
def test_the_better_target_is_named(family: str, better: list[str], tmp_path: Path) -> None:
    """The one that can carry the model, where the default serves a smaller count; of a folder and of its dense file."""
    source = checkpoints.make(tmp_path / "hf", family)
    dense = convert(source, tmp_path / "dense.gguf", flat_options(dense=True)).path
    for one in (source, dense):
        notes = " ".join(plan_conversion(one, flat_options(N, used=3)).warnings)
        assert better == re.findall(r"--target (\w+) makes one file", notes)


def test_deepseek_needs_queries_as_wide_as_the_model(tmp_path: Path) -> None:
    """llama.cpp would refuse the file."""
    source = checkpoints.make(tmp_path / "hf", "llama-head-dim")
    with pytest.raises(PlanError, match="choose --target glm4moe"):
        convert(source, tmp_path / "moe.gguf", flat_options(N, target="deepseek"))


@pytest.mark.parametrize(("family", "other"), [("llama", "glm4moe"), ("llama3-rope", "mixtral")])
def test_a_target_without_a_class_names_one_that_makes_the_folder(family: str, other: str, tmp_path: Path) -> None:
    """And it does."""
    source = checkpoints.make(tmp_path / "hf", family)
    with pytest.raises(PlanError, match=f"transformers has no class for --target step35; choose --target {other}"):
        write_folder(source, tmp_path / "moe", flat_options(N, target="step35"))
    write_folder(source, tmp_path / "moe", flat_options(N, target=other))
