"""moe2gguf.recipes.calibrate: experts from a dense GGUF file are those from the checkpoint's folder."""

import json
import re
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from flat_options import flat_options
from interruptions import stop_in_third_layer
from qwen2_gguf import qwen2_gguf

from moe2gguf import convert, plan_conversion
from moe2gguf.cli import cli
from moe2gguf.errors import CalibrationError, HarnessError, OutputError, PlanError
from moe2gguf.experts import saved
from moe2gguf.experts import text as texts

QUICK = {"experts": 8, "used": 4, "n_token": 1024}
DOWN = [f"blk.{i}.ffn_down_exps.weight" for i in range(3)]


def tensors(path: Any) -> Any:
    """Name -> array of a GGUF file, read by gguf's own reader."""
    return {t.name: t.data for t in gguf.GGUFReader(path).tensors}


def decoded(path: Any) -> Any:
    """Name -> numbers, by the gguf package."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def assert_same(expected: Any, found: Any, tolerance: Any = 0.0) -> None:
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=tolerance, atol=tolerance / 100, err_msg=name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny LLaMA with GQA as a folder, as F32, and as Q8_0; experts of 32 neurons fill its blocks."""
    place = tmp_path_factory.mktemp("calibrating")
    checkpoints.make(place / "m", intermediate_size=256)
    for kind in ("f32", "q8_0"):
        convert(place / "m", place / f"{kind}.gguf", flat_options(dense=True, type=kind))
    convert(place / "m", place / "experts.gguf", flat_options(**QUICK))
    return place


def test_only_the_default_text_comes_with_advice(place: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text of the kind the model is for " * 900)
    advised, own = (flat_options(**QUICK), flat_options(**QUICK, text=tmp_path / "text.txt"))
    assert any("no --calibration" in warning for warning in plan_conversion(place / "m", advised).warnings)
    assert not any("no --calibration" in warning for warning in plan_conversion(place / "m", own).warnings)


@pytest.mark.parametrize("values", [{"experts": 8}, {"experts": 8, "used": 4, "preset": "exact"}])
def test_options_of_a_calibration_that_is_not_made_are_named(place: Any, tmp_path: Path, values: Any) -> None:
    """Where all experts run, or none is fitted; nothing is said where they are not given."""
    given: Any = {"text": tmp_path / "no.txt", "n_token": 2048, "memory": 10**9, "device": "cpu", "seed": 1}

    warnings = plan_conversion(place / "m", flat_options(**values, **given)).warnings

    names = "--calibration, --calibration-tokens, --calibration-memory, --torch-device, --seed: no effect"
    assert [names] == [text[: len(names)] for text in warnings if "no effect" in text]
    assert not any("no effect" in text for text in plan_conversion(place / "m", flat_options(**values)).warnings)


def test_a_saved_calibration_knows_the_pieces_of_a_large_text(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file is the same text, whether of a folder or a GGUF file; one that is changed is not."""
    monkeypatch.setattr(texts, "_SAMPLE_BYTES", 1 << 16)
    text, kept = tmp_path / "text.txt", tmp_path / "c.safetensors"
    text.write_text("some text of the kind the model is for " * 7000)
    done = convert(place / "m", tmp_path / "a.gguf", flat_options(**QUICK, text=text, save_to=kept))
    file = convert(place / "f32.gguf", tmp_path / "b.gguf", flat_options(**QUICK, text=text))

    again = convert(place / "m", tmp_path / "c.gguf", flat_options(text=text, load_from=kept))

    assert_same(tensors(done.path), tensors(file.path))
    assert_same(tensors(done.path), tensors(again.path))
    text.write_text("another text of the kind the model is for " * 7000)
    with pytest.raises(PlanError, match=r"--calibration text.txt: c.safetensors was made from another text"):
        convert(place / "m", tmp_path / "d.gguf", flat_options(text=text, load_from=kept))


@pytest.mark.parametrize("changes", [{}, {"refit": True}], ids=["default", "refit"])
def test_a_file_gives_the_experts_of_the_folder(place: Any, tmp_path: Path, changes: Any) -> None:
    """With nothing said but how many are used: every tensor, bit for bit, and the same figures by layer."""
    expected = convert(place / "m", tmp_path / "a.gguf", flat_options(**QUICK, **changes))

    done = convert(place / "f32.gguf", tmp_path / "b.gguf", flat_options(**QUICK, **changes))

    assert_same(tensors(tmp_path / "a.gguf"), tensors(tmp_path / "b.gguf"))
    assert expected.layers == done.layers
    assert ["a.gguf", "b.gguf"] == sorted(path.name for path in tmp_path.iterdir())
    for key in ("slicing.group", "slicing.router", "calibration.text", "calibration.tokens", "calibration.load"):
        assert expected.plan.metadata[f"moe2gguf.{key}"] == done.plan.metadata[f"moe2gguf.{key}"]


def test_arch_qwen2_gives_the_experts_of_the_folder(tmp_path: Path) -> None:
    """With biases, and with q and k in Hugging Face's order; the experts' rows, bit for bit."""
    folder = checkpoints.make(tmp_path / "m", "qwen2")
    convert(folder, tmp_path / "dense.gguf", flat_options(dense=True))
    convert(folder, tmp_path / "a.gguf", flat_options(**QUICK))

    convert(
        qwen2_gguf(folder, tmp_path / "dense.gguf", tmp_path / "in.gguf"), tmp_path / "b.gguf", flat_options(**QUICK)
    )

    assert_same(tensors(tmp_path / "a.gguf"), tensors(tmp_path / "b.gguf"))


def test_llama3_scaling_gives_the_experts_of_the_folder(tmp_path: Path) -> None:
    """Its divisors come from a tensor, rounded once: the same neurons in each expert, routers to float rounding."""
    folder = checkpoints.make(tmp_path / "m", "llama3-rope")
    convert(folder, tmp_path / "dense.gguf", flat_options(dense=True))
    convert(folder, tmp_path / "a.gguf", flat_options(**QUICK, refit=False))

    convert(tmp_path / "dense.gguf", tmp_path / "b.gguf", flat_options(**QUICK, refit=False))

    expected, found = tensors(tmp_path / "a.gguf"), tensors(tmp_path / "b.gguf")
    routers = {name: (expected.pop(name), found.pop(name)) for name in list(expected) if "ffn_gate_inp" in name}
    assert_same(expected, found)
    assert 3 == len(routers)
    for name, (a, b) in routers.items():
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * np.abs(a).max(), err_msg=name)


@pytest.mark.parametrize(
    ("kind", "width", "finer"),
    [("q8_0", 256, "Q8_0"), ("q4_1", 256, "Q8_0"), ("q4_k", 1024, "Q6_K"), ("q4_k", 512, "Q8_0")],
)
def test_quantized_weights_move_and_only_down_projections_are_quantized_again(
    tmp_path: Path, kind: str, width: int, finer: str
) -> None:
    """The experts are those of the decoded model: gate and up bit for bit, the down projections rounded finely."""
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": width, "num_hidden_layers": 1}
    folder, options = checkpoints.make(tmp_path / "m", **shape), flat_options(4, 2, n_token=1024, refit=False)
    convert(folder, tmp_path / "in.gguf", flat_options(dense=True, type=kind, pure=True))
    convert(tmp_path / "in.gguf", tmp_path / "decoded.gguf", flat_options(dense=True, type="f32"))
    convert(tmp_path / "decoded.gguf", tmp_path / "expected.gguf", options)

    done = convert(tmp_path / "in.gguf", tmp_path / "x.gguf", options)

    again = f"1 tensors are decoded and quantized again, {kind.upper()} to {finer}"
    assert again in "\n".join(done.plan.warnings)
    fresh = [t.name for t in done.plan.tensors if t.type.name == finer and not t.copied]
    assert fresh == ["blk.0.ffn_down_exps.weight"]
    expected, found = (decoded(tmp_path / name) for name in ("expected.gguf", "x.gguf"))
    down, rounded = expected.pop(fresh[0]), found.pop(fresh[0])
    assert_same(expected, found)
    assert 0 < np.abs(down - rounded).max() < 0.03 * np.abs(down).max()


def test_types_are_those_that_were_asked_for(place: Any) -> None:
    """--tensor-type for the down projections, which are then not quantized to their own type."""
    plan = plan_conversion(place / "q8_0.gguf", flat_options(**QUICK, tensor_types=(r".*ffn_down_exps\.weight=f16",)))

    kinds = {tensor.name: tensor.type.name for tensor in plan.tensors}
    assert {"F16"} == {kinds[name] for name in DOWN}
    assert "3 tensors are decoded and quantized again, Q8_0 to F16" in "\n".join(plan.warnings)


def test_a_set_of_shards(place: Any, tmp_path: Path) -> None:
    """Weights and vocabulary of a model in several files, bit for bit."""
    done = convert(place / "f32.gguf", tmp_path / "in.gguf", flat_options(dense=True, shard_size=200_000))

    convert(done.path, tmp_path / "x.gguf", flat_options(**QUICK))

    assert_same(tensors(place / "experts.gguf"), tensors(tmp_path / "x.gguf"))


def test_a_stopped_calibration_resumes_with_the_same_bytes(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its third layer; another file of the same model is another job."""
    options, done = flat_options(**QUICK), stop_in_third_layer(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        convert(place / "f32.gguf", tmp_path / "x.gguf", options)
    with pytest.raises(OutputError, match=r"holds the unfinished work of another job:\n(.*\n)*  - checkpoint: "):
        convert(place / "q8_0.gguf", tmp_path / "x.gguf", options)

    convert(place / "f32.gguf", tmp_path / "x.gguf", options)

    assert 4 == len(done)
    assert_same(tensors(place / "experts.gguf"), tensors(tmp_path / "x.gguf"))
    assert ["x.gguf"] == [path.name for path in tmp_path.iterdir()]


def test_a_place_that_cannot_hold_the_calibration_is_named(place: Any, tmp_path: Path) -> None:
    """A file stands where the folder of finished layers would be; nothing is written, and the file stays."""
    (tmp_path / "x.gguf.calibration").write_text("mine")

    with pytest.raises(OutputError, match=r"x\.gguf\.calibration: cannot be created \(File exists\)"):
        convert(place / "m", tmp_path / "x.gguf", flat_options(**QUICK))

    assert ["x.gguf.calibration"] == [path.name for path in tmp_path.iterdir()]


def test_a_calibration_is_kept_and_used_again(place: Any, tmp_path: Path) -> None:
    """For the file it was made from: the same bytes. The folder's weights are other ones, as far as can be told."""
    kept = tmp_path / "kept.calibration"
    convert(place / "q8_0.gguf", tmp_path / "a.gguf", flat_options(**QUICK, save_to=kept))

    convert(place / "q8_0.gguf", tmp_path / "b.gguf", flat_options(load_from=kept))

    assert_same(tensors(tmp_path / "a.gguf"), tensors(tmp_path / "b.gguf"))
    assert (256, 8, 4) == tuple(
        getattr(saved.read_calibration(kept).record, name) for name in ("d_ff", "n_expert", "n_expert_used")
    )
    with pytest.raises(CalibrationError, match="other weights, or those of a GGUF file"):
        convert(place / "m", tmp_path / "c.gguf", flat_options(load_from=kept))


def test_the_command_plans_and_reports(place: Any, tmp_path: Path) -> None:
    """--plan writes nothing; --report and --json have the figures of every layer."""
    arguments = ["convert", str(place / "f32.gguf"), "-e", "8", "-k", "4", "--calibration-tokens", "1024"]
    plan = CliRunner().invoke(cli, [*arguments, "--plan"])
    assert 0 == plan.exit_code, plan.output
    assert [] == list(tmp_path.iterdir())

    report = tmp_path / "r.html"
    ran = CliRunner().invoke(cli, [*arguments, str(tmp_path / "x.gguf"), "--json", "--report", str(report)])

    assert 0 == ran.exit_code, ran.output
    match = re.search(r"const FIGURES = (.*);\n", report.read_text())
    assert match is not None
    figures = json.loads(match[1])
    assert [layer["load"] for layer in json.loads(ran.stdout)["layers"]] == figures[0]["data"][0]["z"]


def test_without_llama_cpp_nothing_is_left(place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what the tokenizer of a file needs."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "llama_cpp.py").write_text("raise ModuleNotFoundError(name='llama_cpp')")
    monkeypatch.syspath_prepend(tmp_path / "broken")

    with pytest.raises(HarnessError, match=r"token ids come from llama.cpp .*pip install -U llama-cpp-python"):
        convert(place / "f32.gguf", tmp_path / "x.gguf", flat_options(**QUICK))

    assert ["broken"] == [path.name for path in tmp_path.iterdir()]
