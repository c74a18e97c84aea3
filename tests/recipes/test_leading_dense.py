"""The first layers keep their dense MLP: exact with all experts, and every count is what numpy says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import llama_quantize
import numpy as np
import pytest
from flat_options import flat_options
from gguf_edit import edit_keys
from llama_logits import llama_logits_at
from reference import reference_logits
from shared_expert import SHARED, TARGETS, TEXT, TOKENS, N, assert_same_tensors, convert_calibrated, read_tensors

from moe2gguf import PruneOptions, TypeOptions, convert, plan_conversion, prune, quantize
from moe2gguf.errors import CalibrationError, PlanError
from moe2gguf.experts.text import Text
from moe2gguf.gguf.verify import verify
from moe2gguf.measure.expert_usage import measure_expert_usage
from moe2gguf.recipes.densify import densify
from moe2gguf.recipes.hf_output import write_folder

EXACT: dict[str, Any] = {"n_shared": SHARED, "preset": "exact", "leading_dense": 1}


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    """A graph with a shared expert."""
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three layers."""
    return checkpoints.make(tmp_path_factory.mktemp("checkpoint"), "llama")


@pytest.fixture(scope="module")
def calibrated(target: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated file of each target; its calibration is beside it."""
    place = tmp_path_factory.mktemp("leading")
    made = convert_calibrated(target, folder, place / "moe.gguf", leading_dense=1, save_to=place / "kept")
    assert [1, 2] == [*made.numbered_layers]
    return made.path


@pytest.mark.parametrize("family", ["llama", "qwen2-tied", "llama-mqa"])
def test_all_experts_are_the_dense_model(family: str, target: str, tmp_path: Path) -> None:
    """By transformers' logits and by numpy's; two of three layers have experts."""
    source = checkpoints.make(tmp_path / "hf", family)
    file = convert(source, tmp_path / "moe.gguf", flat_options(N, target=target, **EXACT)).path

    (ours,) = llama_logits_at(file, TOKENS, [N])

    assert np.abs(ours - checkpoints.torch_logits(source, TOKENS)).max() < 1e-4
    assert np.abs(ours - reference_logits(file, TOKENS)).max() < 1e-4
    assert verify(file).problems == ()
    assert ["blk.1.ffn_gate_inp.weight", "blk.2.ffn_gate_inp.weight"] == [
        n for n in read_tensors(file) if "gate_inp" in n
    ]


def test_every_count_is_what_numpy_says(calibrated: Path) -> None:
    """The experts of the later layers were found behind a dense first one."""
    counts = range(SHARED + 1, N + 1)
    for k, ours in zip(counts, llama_logits_at(calibrated, TOKENS, list(counts)), strict=True):
        assert np.abs(ours - reference_logits(calibrated, TOKENS, k - SHARED)).max() < 2e-4, k


def test_a_gguf_file_gives_the_same_model(target: str, folder: Path, tmp_path: Path) -> None:
    """From the dense file as from the folder."""
    dense = convert(folder, tmp_path / "dense.gguf", flat_options(dense=True)).path
    files = [
        convert(one, tmp_path / f"{one.stem}-moe.gguf", flat_options(N, target=target, **EXACT)).path
        for one in (dense, folder)
    ]
    assert_same_tensors(*files)


def test_densify_gives_the_dense_model_back(target: str, folder: Path, tmp_path: Path) -> None:
    """Tensors and keys."""
    moe = convert(folder, tmp_path / "moe.gguf", flat_options(N, target=target, **EXACT)).path
    densify(moe, tmp_path / "dense.gguf")
    reference = convert(folder, tmp_path / "reference.gguf", flat_options(dense=True)).path
    assert_same_tensors(tmp_path / "dense.gguf", reference)
    files = [gguf.GGUFReader(path) for path in (tmp_path / "dense.gguf", reference)]
    keys = [{n: f.contents() for n, f in file.fields.items() if n.startswith("llama.")} for file in files]
    assert keys[0] == keys[1]


def test_the_loads_are_those_of_the_layers_with_experts(calibrated: Path) -> None:
    """Numbered as in the model, and compared with what calibration saw in the same layer."""
    use = measure_expert_usage(calibrated, used=SHARED + 1, text=Text(TEXT, "fox"), n_token=256, n_context=64)
    assert "compared with the load in calibration (moe.txt)" == use.calibration
    assert [1, 2] == [layer.layer for layer in use.layers]
    loads = gguf.GGUFReader(calibrated).fields["moe2gguf.calibration.load"].contents()
    for layer, load in zip(use.layers, np.reshape(loads, (2, N))[:, SHARED:], strict=True):
        assert layer.moved == pytest.approx(np.abs(np.array(layer.load) - load).sum() / 2)


def test_a_calibration_is_kept_and_used_again(calibrated: Path, folder: Path, tmp_path: Path) -> None:
    """With the number of dense layers; another is refused."""
    kept = calibrated.parent / "kept"
    assert_same_tensors(calibrated, convert(folder, tmp_path / "again.gguf", flat_options(load_from=kept)).path)
    with pytest.raises(PlanError, match="--leading-dense 2: kept was made with 1"):
        convert(folder, tmp_path / "other.gguf", flat_options(load_from=kept, leading_dense=2))
    bytes_ = kept.read_bytes().replace(b'\\"leading_dense\\": 1', b'\\"leading_dense\\": 3')
    (tmp_path / "broken").write_bytes(bytes_)
    with pytest.raises(CalibrationError, match="the number of dense layers is out of range"):
        convert(folder, tmp_path / "other.gguf", flat_options(load_from=tmp_path / "broken"))


@pytest.mark.parametrize("target", ["glm4moe", "deepseek"])
def test_verify_finds_another_number_of_dense_layers(target: str, folder: Path, tmp_path: Path) -> None:
    """llama.cpp would not find the tensors."""
    file = convert(folder, tmp_path / "moe.gguf", flat_options(N, target=target, **EXACT)).path
    for value, missing in ((None, "blk.0.ffn_gate_exps.weight"), (2, "blk.1.ffn_gate.weight")):
        broken = edit_keys(file, tmp_path / "broken.gguf", {f"{target}.leading_dense_block_count": value})
        assert missing in "\n".join(verify(broken).problems)


def test_pruned_files_keep_the_dense_layer(calibrated: Path, tmp_path: Path) -> None:
    """Only layers with experts lose some."""
    prune(calibrated, tmp_path / "pruned.gguf", PruneOptions(SHARED + 3, score="random"))
    before, after = read_tensors(calibrated), read_tensors(tmp_path / "pruned.gguf")
    assert before.keys() == after.keys()
    assert np.array_equal(before["blk.0.ffn_down.weight"], after["blk.0.ffn_down.weight"])
    assert len(after["blk.2.ffn_down_exps.weight"]) == 3
    assert verify(tmp_path / "pruned.gguf").problems == ()


@pytest.mark.parametrize("preset", ["q4_k_m", "q3_k_m"])
def test_quantized_types_are_llama_cpps(preset: str, target: str, tmp_path: Path) -> None:
    """As its own quantizer chooses them for the same file."""
    weights: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": N * 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 8,
    }
    source = checkpoints.make(tmp_path / "hf", "llama", **weights)
    file = convert(source, tmp_path / "moe.gguf", flat_options(N, target=target, type="f16", **EXACT)).path
    quantize(file, tmp_path / "ours.gguf", TypeOptions(preset, llama_cpp_mix=True))
    llama_quantize.quantize(file, tmp_path / "theirs.gguf", gguf.LlamaFileType[f"MOSTLY_{preset.upper()}"])
    ours, theirs = (
        {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("ours.gguf", "theirs.gguf")
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "mixtral", "leading_dense": 1}, "every layer has experts in this target; choose --target glm4moe"),
        ({"target": "glm4moe", "leading_dense": 3}, "must lie between 0 and 2"),
        ({"target": "glm4moe", "leading_dense": -1}, "must lie between 0 and 2"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, folder: Path) -> None:
    """One message with the way out."""
    with pytest.raises(PlanError, match=message):
        plan_conversion(folder, flat_options(N, **options))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_folder_form_computes_the_same(family: str, tmp_path: Path) -> None:
    """transformers' own class has such layers too; the file made of the folder is the one made of the dense model."""
    source = checkpoints.make(tmp_path / "hf", family)
    file = convert_calibrated("glm4moe", source, tmp_path / "moe.gguf", leading_dense=1).path
    options = flat_options(
        N, target="glm4moe", n_shared=SHARED, text=tmp_path / "moe.txt", n_token=1024, leading_dense=1
    )
    folder = write_folder(source, tmp_path / "glm", options).path
    counts = [SHARED + 1, N]
    for k, ours in zip(counts, llama_logits_at(file, TOKENS, counts), strict=True):
        checkpoints.rewrite_config(folder, num_experts_per_tok=k - SHARED)
        assert np.abs(ours - checkpoints.torch_logits(folder, TOKENS)).max() < 2e-4, k

    assert_same_tensors(file, convert(folder, tmp_path / "again.gguf").path)
    assert verify(tmp_path / "again.gguf").problems == ()
    card = (folder / "README.md").read_text()
    assert "Every MLP of the dense model from layer 1 on is cut into 6 experts" in card
    assert ["1", "2"] == re.findall(r"^\| (\d) ", card, re.MULTILINE)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "first_k_dense_replace is -1; expected an integer from 0"),
        ("1", "first_k_dense_replace is '1'; expected an integer"),
        (3, "first_k_dense_replace is 3 instead of 1"),
        (0, "first_k_dense_replace is 0 instead of 1"),
    ],
)
def test_a_folder_with_another_number_is_refused(value: Any, message: str, folder: Path, tmp_path: Path) -> None:
    """What its tensors are not."""
    made = write_folder(folder, tmp_path / "glm", flat_options(N, target="glm4moe", **EXACT)).path
    checkpoints.rewrite_config(made, first_k_dense_replace=value)
    with pytest.raises(PlanError, match=message):
        plan_conversion(made)


def test_a_model_that_has_experts_keeps_them(folder: Path, tmp_path: Path) -> None:
    """And says so once."""
    source = write_folder(folder, tmp_path / "mixtral", flat_options(8)).path
    with pytest.raises(PlanError) as caught:
        plan_conversion(source, flat_options(leading_dense=1))
    (refusal,) = caught.value.refusals
    assert "--leading-dense: the checkpoint has" in refusal
