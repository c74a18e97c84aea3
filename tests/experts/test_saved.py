"""moe2gguf.experts.saved: a calibration in a file gives the same experts again, and refuses what does not fit it."""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import numpy as np
import pytest
from flat_options import change_options, flat_options
from safetensors.numpy import load_file, save_file

from moe2gguf import convert, plan_conversion
from moe2gguf.errors import CalibrationError, Moe2GgufError, OutputError, PlanError
from moe2gguf.experts import saved
from moe2gguf.measure.check import compare_conversion
from moe2gguf.recipes.hf_output import write_folder

QUICK = {"experts": 8, "n_token": 1024}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny LLaMA."""
    return checkpoints.make(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="module")
def kept(folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(GGUF file, calibration file) of one conversion without a refit: 8 experts, 4 used, 2 of them always on."""
    place = tmp_path_factory.mktemp("kept")
    options = flat_options(**QUICK, used=4, n_shared=2, refit=False, save_to=place / "kept.calibration")
    convert(folder, place / "x.gguf", options)
    return place / "x.gguf", place / "kept.calibration"


@pytest.fixture(scope="module")
def refitted(folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same with a refit."""
    place = tmp_path_factory.mktemp("refitted")
    options = flat_options(**QUICK, used=4, refit=True, save_to=place / "kept.calibration")
    convert(folder, place / "x.gguf", options)
    return place / "x.gguf", place / "kept.calibration"


def tensors(path: Any) -> Any:
    """Name -> array of a GGUF file, read by gguf's own reader."""
    return {t.name: t.data for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("which", ["kept", "refitted"])
def test_a_kept_calibration_gives_the_same_bytes(
    folder: Any, tmp_path: Path, which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a pass over the text: torch is not needed; no option has to be repeated."""
    file, calibration = request.getfixturevalue(which)
    monkeypatch.setitem(sys.modules, "moe2gguf.experts.calibration", None)

    done = convert(folder, tmp_path / "y.gguf", flat_options(load_from=calibration))

    assert file.read_bytes() == (tmp_path / "y.gguf").read_bytes()
    assert 3 == len(done.layers)
    assert ["y.gguf"] == [path.name for path in tmp_path.iterdir()]


def test_a_gguf_file_of_the_same_model(folder: Any, kept: Any, refitted: Any, tmp_path: Path) -> None:
    """F32: the same tensors. Q8_0: gate and up are the dense blocks, only the down projections are quantized again."""
    for kind in ("f32", "q8_0"):
        convert(folder, tmp_path / f"{kind}.gguf", flat_options(dense=True, type=kind))
    for kept_file, calibration in (kept, refitted):
        convert(tmp_path / "f32.gguf", tmp_path / "a.gguf", flat_options(load_from=calibration), force=True)
        before, after = tensors(kept_file), tensors(tmp_path / "a.gguf")
        assert before.keys() == after.keys()
        assert all(np.array_equal(array, after[name]) for name, array in before.items())

    done = convert(tmp_path / "q8_0.gguf", tmp_path / "b.gguf", flat_options(load_from=kept[1], align=32))

    convert(folder, tmp_path / "c.gguf", flat_options(load_from=kept[1], align=32))
    dense, exact, found = (tensors(tmp_path / name) for name in ("q8_0.gguf", "c.gguf", "b.gguf"))
    down = [f"blk.{i}.ffn_down_exps.weight" for i in range(3)]
    assert down == [t.name for t in done.plan.tensors if t.type.name == "Q8_0" and not t.copied]
    warnings = "\n".join(done.plan.warnings)
    assert "3 tensors are decoded and quantized again, Q8_0 to Q8_0" in warnings
    assert "only its shapes can be compared" in warnings
    for name in ("gate", "up"):
        rows = found[f"blk.1.ffn_{name}_exps.weight"].reshape(8 * 32, -1)
        moved = {row.tobytes() for row in rows if row.any()}
        assert moved == {row.tobytes() for row in dense[f"blk.1.ffn_{name}.weight"]}
    near = gguf.quants.dequantize(found[down[1]], gguf.GGMLQuantizationType.Q8_0)
    assert np.abs(near - exact[down[1]]).max() < 0.02 * np.abs(exact[down[1]]).max()


def test_another_type_and_padding(folder: Any, refitted: Any, tmp_path: Path) -> None:
    """The same experts in F16, padded to 32: equal to a conversion that calibrates for them."""
    convert(folder, tmp_path / "a.gguf", flat_options(load_from=refitted[1], type="f16", align=32))
    convert(folder, tmp_path / "b.gguf", flat_options(**QUICK, used=4, refit=True, type="f16", align=32))

    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(("options", "factor", "size"), [({"used": 6}, 6 / 4, 1), ({"amplify": "exact"}, 8 / 4, 0.1)])
def test_another_count_or_amplification_without_a_new_pass(
    folder: Any, kept: Any, tmp_path: Path, options: Any, factor: Any, size: float
) -> None:
    """Down projections times the ratio of the factors, the router smaller for `exact`, all else equal."""
    convert(folder, tmp_path / "y.gguf", flat_options(load_from=kept[1], **options))

    before, after = tensors(kept[0]), tensors(tmp_path / "y.gguf")
    for name, data in before.items():
        times = factor if "down_exps" in name else size if "gate_inp" in name else 1
        np.testing.assert_allclose(data * np.float32(times), after[name], rtol=1e-6, err_msg=name)


def test_the_dense_twin_of_a_check_needs_no_calibration(folder: Any, kept: Any, tmp_path: Path) -> None:
    """--check auto beside --load-calibration: 4 of 8 experts are not the dense model, but both files run."""
    done = convert(folder, tmp_path / "y.gguf", flat_options(load_from=kept[1]))

    checked = compare_conversion(done, "auto", threads=1)

    assert checked.difference.n_token > 0
    assert ["y.gguf"] == [path.name for path in tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("which", "options", "words"),
    [
        ("refitted", {"used": 5}, "--used 5: kept.calibration was made with 4"),
        ("refitted", {"refit": False}, "--refit False: kept.calibration was made with True"),
        ("kept", {"amplify": "any"}, "--amplify any: kept.calibration was made with used"),
        ("kept", {"experts": 4, "group": "activations"}, "--group activations: kept.calibration was made with routed"),
        ("kept", {"used": 2}, "--used 2: kept.calibration has layers with 2 shared experts"),
        ("kept", {"seed": 3}, "--seed 3: kept.calibration was made with 0"),
        ("kept", {"preset": "exact"}, "--preset exact and --dense use no calibration"),
    ],
)
def test_options_that_do_not_fit_are_named(
    folder: Any, which: str, options: Any, words: str, request: pytest.FixtureRequest
) -> None:
    """By the plan, all of them."""
    with pytest.raises(PlanError) as caught:
        plan_conversion(folder, flat_options(load_from=request.getfixturevalue(which)[1], **options))

    assert words in str(caught.value)


def test_another_text_is_refused(folder: Any, kept: Any, tmp_path: Path) -> None:
    """By its digest; the file's own text is named."""
    (tmp_path / "other.txt").write_text("other words " * 100)

    with pytest.raises(PlanError, match="made from another text, moe2gguf texts 1"):
        plan_conversion(folder, flat_options(load_from=kept[1], text=tmp_path / "other.txt"))


def test_another_checkpoint_is_refused(folder: Any, kept: Any, tmp_path: Path) -> None:
    """Of another shape by the plan; of the same shape, for one changed number, before anything gets its name."""
    wide = checkpoints.make(tmp_path / "wide", intermediate_size=128)
    with pytest.raises(PlanError, match="made for d_ff 96, the checkpoint has 128"):
        plan_conversion(wide, flat_options(load_from=kept[1]))
    twin = checkpoints.make(tmp_path / "twin")
    weights = load_file(twin / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] += 1
    save_file(weights, twin / "model.safetensors", metadata={"format": "pt"})

    options = flat_options(load_from=kept[1])

    for write in (
        lambda: convert(twin, tmp_path / "y.gguf", options),
        lambda: convert(twin, tmp_path / "y.gguf", change_options(options, shard_size=200_000)),
        lambda: write_folder(twin, tmp_path / "y", options),
    ):
        with pytest.raises(CalibrationError, match="made from another checkpoint"):
            write()

    assert ["twin", "wide"] == sorted(path.name for path in tmp_path.iterdir())


def changed(source: Any, target: Any, change: Any) -> Any:
    """A copy of a calibration with its header changed by `change(header)`."""
    data = source.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return target


def _job(**values: Any) -> Any:
    def change(header: Any) -> None:
        header["__metadata__"]["job"] = json.dumps(json.loads(header["__metadata__"]["job"]) | values)

    return change


def _metadata(**values: Any) -> Any:
    return lambda header: header["__metadata__"].update(values)


def _swap(header: Any) -> None:
    """Two tensors change places: the first is another's size."""
    header["0.router"], header["0.amplification"] = header["0.amplification"], header["0.router"]


@pytest.mark.parametrize(
    "change",
    [
        _job(n_layer=2**39),
        _job(n_expert=2**39),
        _job(d_ff=-1),
        _job(refit="yes"),
        _job(surplus=1),
        _job(n_shared=99),
        _metadata(job="[" * 100000),
        _metadata(reports="[]"),
        _metadata(reports='[{"n_shared": 1}, {}, {}]'),
        _metadata(format="2"),
        _swap,
        lambda header: header.pop("1.order"),
        lambda header: header.pop("__metadata__"),
    ],
)
def test_damaged_and_hostile_files(folder: Any, kept: Any, tmp_path: Path, change: Any) -> None:
    """One clear error each; nothing is allocated from their numbers, nothing is written."""
    bad = changed(kept[1], tmp_path / "bad", change)

    with pytest.raises(Moe2GgufError, match="bad"):
        convert(folder, tmp_path / "y.gguf", flat_options(load_from=bad))

    assert ["bad"] == [path.name for path in tmp_path.iterdir()]


def test_orders_that_are_no_permutation(folder: Any, kept: Any, tmp_path: Path) -> None:
    """A neuron twice, or a number out of range, never reaches a weight."""
    stored = load_file(kept[1])
    for value in (0, 10**6):
        data = bytearray(kept[1].read_bytes())
        old = stored["2.order"].tobytes()
        new = stored["2.order"].copy()
        new[0, 0] = new[0, 1] if value == 0 else value
        at = bytes(data).index(old)
        data[at : at + len(old)] = new.tobytes()
        (tmp_path / "bad").write_bytes(data)

        with pytest.raises(CalibrationError, match="layer 2 does not place every neuron once"):
            convert(folder, tmp_path / "y.gguf", flat_options(load_from=tmp_path / "bad"))


def test_other_files_are_refused(folder: Any, tmp_path: Path) -> None:
    """Not a calibration at all: text, another safetensors file."""
    (tmp_path / "text").write_text("hello")
    for path in (tmp_path / "text", folder / "model.safetensors"):
        with pytest.raises(CalibrationError, match="not a calibration that --save-calibration wrote"):
            plan_conversion(folder, flat_options(load_from=path))


def test_an_existing_file_is_not_replaced(folder: Any, kept: Any, tmp_path: Path) -> None:
    """Said before the calibration starts."""
    before = kept[1].read_bytes()
    with pytest.raises(OutputError, match="exists"):
        convert(folder, tmp_path / "y.gguf", flat_options(**QUICK, used=4, save_to=kept[1]))

    assert before == kept[1].read_bytes()


def test_nothing_to_keep_is_refused(folder: Any, kept: Any, tmp_path: Path) -> None:
    """All experts on, or a calibration that was kept already; and the file itself is no place for it."""
    for options in (flat_options(experts=8), flat_options(load_from=kept[1])):
        with pytest.raises(PlanError, match="--save-calibration: "):
            plan_conversion(folder, change_options(options, save_to=tmp_path / "new"))
    options = flat_options(**QUICK, used=4, shard_size=200_000)
    shard = tmp_path / f"y-00001-of-{len(plan_conversion(folder, options).shards):05}.gguf"
    for size, place in ((None, tmp_path / "y"), (200_000, shard)):
        with pytest.raises(OutputError, match="is the file to write already"):
            convert(folder, tmp_path / "y", change_options(options, shard_size=size, save_to=place))

    assert [] == list(tmp_path.iterdir())


def test_the_file_is_read_by_the_safetensors_library(kept: Any) -> None:
    """Names, shapes and types are those that the module says."""
    stored = load_file(kept[1])

    assert {f"{i}.{name}" for i in range(3) for name in ("order", "router", "amplification")} == set(stored)
    assert ((8, 12), (8, 64)) == (stored["0.order"].shape, stored["0.router"].shape)
    assert list(range(96)) == sorted(stored["0.order"].ravel().tolist())
    assert saved.read_calibration(kept[1]).record.label == "moe2gguf texts 1"
