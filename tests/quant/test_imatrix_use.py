"""--imatrix: llama.cpp's bytes for llama.cpp's numbers, and no guess where numbers are missing."""

import ctypes
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import checkpoints
import imatrix_files
import numpy as np
import pytest
import tiny_gguf
from flat_options import change_options, flat_options
from llama_cpp import llama_cpp as lib
from llama_quantize import quantize as llama_quantize

from moe2gguf import convert, plan_conversion
from moe2gguf.errors import ImportanceError, PlanError
from moe2gguf.gguf import types
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.gguf.source_tensor import SourceTensor
from moe2gguf.quant.imatrix import Activity, ImportanceMatrix, identify_model, write_imatrix
from moe2gguf.quant.presets import FILE_TYPE_NAMES
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.quantize import plan_quantization, quantize


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """256 wide, one layer."""
    weights = tiny_gguf.dense_weights(0, n_layer=1, d_model=256, d_ff=256)
    return tiny_gguf.write_gguf(tmp_path_factory.mktemp("dense") / "dense.gguf", weights)


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Four experts, 256 wide, with a random router."""
    weights = tiny_gguf.sliced_weights(tiny_gguf.dense_weights(0, n_layer=1, d_model=256, d_ff=1024), 4, router_seed=1)
    return tiny_gguf.write_gguf(tmp_path_factory.mktemp("sliced") / "sliced.gguf", weights)


def statistics_of(path: Any, seed: Any = 0) -> Any:
    return imatrix_files.statistics_for({t.name: t.shape for t in read_gguf(path).tensors.values()}, seed)


def contents(path: Any) -> Any:
    """Name -> (type, SHA-256 of the bytes)."""
    file, data = read_gguf(path), path.read_bytes()
    return {
        t.name: (t.type.name, hashlib.sha256(data[t.offset : t.offset + t.n_bytes]).hexdigest())
        for t in file.tensors.values()
    }


def theirs(source: Any, target: Any, preset: Any, statistics: Any, **settings: Any) -> Any:
    """llama_model_quantize with the averages that llama.cpp's tool makes of these statistics."""
    kept = []
    entries = (lib.llama_model_imatrix_data * (len(statistics) + 1))()
    for entry, (name, (sums, counts)) in zip(entries, statistics.items(), strict=False):
        counts = np.asarray(counts, np.float32)[:, None]
        means = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)
        kept += [means, ctypes.create_string_buffer(name.encode())]
        entry.name = ctypes.cast(kept[-1], ctypes.c_char_p)  # type: ignore[arg-type]
        entry.data = means.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = means.size
    llama_quantize(source, target, types.file_type(FILE_TYPE_NAMES[preset]), imatrix=entries, **settings)
    return contents(target)


LARGE = ("Q4_K_M", "IQ4_XS", "Q3_K_L", "Q2_K", "Q4_0", "Q5_0")
SMALL = ("Q2_K_S", "IQ2_XXS")  # without a matrix: refused
SLOW = ("IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ1_M", "IQ1_S")  # as well, after tables are made for long
GUIDED = [*LARGE, *SMALL, *(pytest.param(name, marks=pytest.mark.real) for name in SLOW)]


@pytest.mark.parametrize("preset", GUIDED)
def test_the_bytes_are_llama_cpps(dense: Any, tmp_path: Path, preset: Any) -> None:
    """For the same importance; presets that depend on having one choose what it chooses."""
    statistics = statistics_of(dense)
    matrix = imatrix_files.write_gguf(tmp_path / "m.gguf", statistics)

    quantize(dense, tmp_path / "ours.gguf", TypeOptions(preset, imatrix=matrix), threads=2)

    assert theirs(dense, tmp_path / "theirs.gguf", preset, statistics) == contents(tmp_path / "ours.gguf")
    if preset in LARGE:
        unguided = quantize(dense, tmp_path / "plain.gguf", TypeOptions(preset)).path
        assert contents(unguided) != contents(tmp_path / "ours.gguf")


def test_the_bytes_are_llama_cpps_from_the_older_form(dense: Any, tmp_path: Path) -> None:
    """Four calls, so that averages are made of their sums exactly as from the other form."""
    means = {name: np.float32(sums / np.float32(n[0])) for name, (sums, n) in statistics_of(dense).items()}
    statistics = {name: (value * np.float32(4), [4]) for name, value in means.items()}
    matrix = tmp_path / "m.dat"
    matrix.write_bytes(imatrix_files.dat({name: (4, sums) for name, (sums, _) in statistics.items()}))  # type: ignore[misc]

    quantize(dense, tmp_path / "ours.gguf", TypeOptions("Q3_K_M", imatrix=matrix), threads=2)

    assert theirs(dense, tmp_path / "theirs.gguf", "Q3_K_M", statistics) == contents(tmp_path / "ours.gguf")
    unguided = quantize(dense, tmp_path / "plain.gguf", TypeOptions("Q3_K_M")).path
    assert contents(unguided) != contents(tmp_path / "ours.gguf")


@pytest.mark.parametrize("preset", ["Q4_K_M", "IQ3_XXS"])
def test_every_expert_gets_its_own(sliced: Any, tmp_path: Path, preset: str) -> None:
    """Experts are pieces of one tensor, and the importance changes with each, wherever we cut it."""
    statistics = statistics_of(sliced)
    matrix = imatrix_files.write_gguf(tmp_path / "m.gguf", statistics)
    options = TypeOptions(preset, imatrix=matrix, llama_cpp_mix=True, pure=preset == "IQ3_XXS")

    quantize(sliced, tmp_path / "ours.gguf", options, threads=3)

    expected = theirs(sliced, tmp_path / "theirs.gguf", preset, statistics, pure=options.pure)
    assert expected == contents(tmp_path / "ours.gguf")
    swapped = {name: (sums[::-1], counts[::-1]) for name, (sums, counts) in statistics.items()}
    assert expected != theirs(sliced, tmp_path / "swapped.gguf", preset, swapped, pure=options.pure)


def test_the_smallest_types_need_it(sliced: Any, tmp_path: Path) -> None:
    """Without an importance matrix they are refused with the way to one; so is a tensor that it leaves out."""
    options = TypeOptions(tensor_types=(r"blk\..*exps\.weight=iq3_xxs",))
    with pytest.raises(PlanError, match=r"IQ3_XXS needs an importance matrix.*moe2gguf imatrix"):
        plan_quantization(sliced, options)
    statistics = statistics_of(sliced)
    matrix = imatrix_files.write_gguf(tmp_path / "m.gguf", statistics)
    plan_quantization(sliced, dataclasses.replace(options, imatrix=matrix))
    del statistics["blk.0.ffn_up_exps.weight"]
    matrix = imatrix_files.write_gguf(tmp_path / "m.gguf", statistics)

    with pytest.raises(PlanError) as caught:
        plan_quantization(sliced, dataclasses.replace(options, imatrix=matrix))

    assert any(
        "IQ3_XXS needs an importance matrix, for blk.0.ffn_up_exps.weight;" in one for one in caught.value.refusals
    )


def test_the_file_records_it_as_llama_cpp_does(dense: Any, tmp_path: Path) -> None:
    """llama.cpp's four keys, with names instead of paths; quantizing again without one drops them."""
    matrix = imatrix_files.write_gguf(tmp_path / "words.gguf", statistics_of(dense))

    quantize(dense, tmp_path / "a.gguf", TypeOptions("q8_0", imatrix=matrix))
    quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", TypeOptions("q8_0"))

    found, again = (
        {key: value for key, value in read_gguf(tmp_path / name).metadata.items() if "imatrix" in key}
        for name in ("a.gguf", "b.gguf")
    )
    assert {
        "quantize.imatrix.file": "words.gguf",
        "quantize.imatrix.dataset": "words.txt",
        "quantize.imatrix.entries_count": 7,
        "quantize.imatrix.chunks_count": 3,
    } == found
    assert {} == again
    assert str(tmp_path).encode() not in (tmp_path / "a.gguf").read_bytes()


@pytest.mark.parametrize(("kind", "idle"), [("f16", True), ("q8_0", True), ("q4_k", False)])
def test_a_matrix_that_nothing_looks_at_is_named(dense: Any, tmp_path: Path, kind: str, idle: bool) -> None:
    """Where nothing is quantized, or only to types whose kernels ignore it."""
    matrix = imatrix_files.write_gguf(tmp_path / "words.gguf", statistics_of(dense))

    warnings = plan_quantization(dense, TypeOptions(kind, imatrix=matrix)).warnings

    assert idle == any("--imatrix: no effect" in one for one in warnings)


def without(statistics: Any, expert: Any) -> Any:
    """Expert `expert` of every tensor saw no token."""
    result = {}
    for name, (sums, counts) in statistics.items():
        sums, counts = sums.copy(), [*counts]
        if len(counts) > 1:
            sums[expert], counts[expert] = 0, 0
        result[name] = sums, counts
    return result


def test_an_expert_without_data_is_refused_or_counts_all_columns_alike(sliced: Any, tmp_path: Path) -> None:
    """Named with its number; `ones` gives llama.cpp's bytes."""
    statistics = without(statistics_of(sliced), 2)
    matrix = imatrix_files.write_gguf(tmp_path / "m.gguf", statistics)
    options = TypeOptions("q4_k", imatrix=matrix)
    with pytest.raises(PlanError, match=r"no token reached some experts.*blk\.0\.ffn_gate_exps\.weight \(experts 2\)"):
        plan_quantization(sliced, options)

    quantize(sliced, tmp_path / "ones.gguf", dataclasses.replace(options, imatrix_repair="ones"))

    assert "ones" == read_gguf(tmp_path / "ones.gguf").metadata["moe2gguf.quantize.imatrix_repair"]
    expected = theirs(sliced, tmp_path / "theirs.gguf", "Q4_K_S", statistics, pure=True)
    ours = contents(tmp_path / "ones.gguf")
    assert {n: expected[n] for n in expected if "exps" in n} == {n: ours[n] for n in ours if "exps" in n}


def test_an_expert_without_data_in_the_older_form(sliced: Any, tmp_path: Path) -> None:
    """There it says 1.0 in every column, which is not taken for data."""
    statistics = statistics_of(sliced)
    values = {name: (1, np.float32(sums / np.array(counts)[:, None])) for name, (sums, counts) in statistics.items()}
    values["blk.0.ffn_up_exps.weight"][1][3] = 1  # type: ignore[index]
    (tmp_path / "m.dat").write_bytes(imatrix_files.dat(values))  # type: ignore[arg-type]

    with pytest.raises(PlanError, match=r"no token reached some.*blk\.0\.ffn_up_exps\.weight \(experts 3\)$"):
        plan_quantization(sliced, TypeOptions("q4_k", imatrix=tmp_path / "m.dat"))


def test_barely_seen_experts_are_a_warning(sliced: Any, tmp_path: Path) -> None:
    """With the tensor and the fewest tokens."""
    statistics = statistics_of(sliced)
    statistics["blk.0.ffn_up_exps.weight"][1][1] = 7.0
    matrix = imatrix_files.write_gguf(tmp_path / "m.gguf", statistics)

    plan = plan_quantization(sliced, TypeOptions("q4_k", imatrix=matrix))

    assert ["--imatrix: 1 tensors have experts that saw fewer than 64 tokens (blk.0.ffn_up_exps.weight: 7)"] == [
        text.partition(";")[0] for text in plan.warnings
    ]


@pytest.mark.parametrize("repair", ["none", "ones"])
def test_another_models_matrix_is_refused(sliced: Any, tmp_path: Path, repair: str) -> None:
    """Other widths and other expert counts, whatever the repair: it is the wrong file."""
    statistics = statistics_of(sliced)
    sums, counts = statistics["blk.0.ffn_down_exps.weight"]
    statistics["blk.0.ffn_down_exps.weight"] = sums[:, :128], counts
    sums, counts = statistics["blk.0.ffn_up_exps.weight"]
    statistics["blk.0.ffn_up_exps.weight"] = np.concatenate([sums, sums]), counts * 2
    matrix = imatrix_files.write_gguf(tmp_path / "m.gguf", statistics)

    with pytest.raises(PlanError) as caught:
        plan_quantization(sliced, TypeOptions("q4_k", imatrix=matrix, imatrix_repair=repair))

    assert {
        "--imatrix: is of another number of experts: blk.0.ffn_up_exps.weight (8, the tensor has 4)",
        "--imatrix: is of another model: blk.0.ffn_down_exps.weight (512 columns, the tensor has 4 x 256 = 1024)",
    } == {*caught.value.refusals}


def test_missing_tensors_are_refused_unless_a_repair_is_chosen(dense: Any, tmp_path: Path) -> None:
    """All of them are listed; with ones each column counts alike; a broken file is an error of its own."""
    matrix = imatrix_files.write_gguf(tmp_path / "m.gguf", {"blk.9.attn_q.weight": (np.ones((1, 256)), [5])})  # type: ignore[dict-item]
    options = TypeOptions("q4_k", imatrix=matrix)
    with pytest.raises(PlanError, match=r"has no entry.*blk\.0\.attn_q\.weight.*and 4 more"):
        plan_quantization(dense, options)

    quantize(dense, tmp_path / "out.gguf", dataclasses.replace(options, imatrix_repair="ones"))

    even = {t.name: (np.ones((1, t.shape[-1]), np.float32), [1]) for t in read_gguf(dense).tensors.values()}
    expected = theirs(dense, tmp_path / "theirs.gguf", "Q4_K_S", even, pure=True)
    ours = contents(tmp_path / "out.gguf")
    assert {n: expected[n] for n in expected if "blk" in n} == {n: ours[n] for n in ours if "blk" in n}
    (tmp_path / "bad").write_bytes(b"nothing of the kind")
    with pytest.raises(ImportanceError):
        plan_quantization(dense, TypeOptions("q4_k", imatrix=tmp_path / "bad"))


def test_a_dense_matrix_on_a_sliced_file_of_unknown_order(dense: Any, sliced: Any, tmp_path: Path) -> None:
    """Gate and up see what the dense ones see; which neurons the down projections hold is not guessed."""
    statistics = imatrix_files.statistics_for(
        {t.name.replace("_exps", ""): t.shape[-2:] for t in read_gguf(sliced).tensors.values()}
    )
    statistics["blk.0.ffn_down.weight"] = (np.ones((1, 1024), np.float32), [1])
    matrix = imatrix_files.write_gguf(tmp_path / "m.gguf", statistics)
    options = TypeOptions("q4_k", imatrix=matrix)
    with pytest.raises(PlanError, match=r"neurons the experts hold is not known.*blk\.0\.ffn_down_exps\.weight$"):
        plan_quantization(sliced, options)

    quantize(sliced, tmp_path / "ours.gguf", dataclasses.replace(options, imatrix_repair="ones"))

    own = {name: value for name, value in statistics.items() if "ffn_" not in name}
    for part in ("gate", "up"):
        sums, counts = statistics[f"blk.0.ffn_{part}.weight"]
        own[f"blk.0.ffn_{part}_exps.weight"] = np.repeat(sums, 4, axis=0), counts * 4
    expected, ours = (
        theirs(sliced, tmp_path / "theirs.gguf", "Q4_K_S", own, pure=True),
        contents(tmp_path / "ours.gguf"),
    )
    assert {name: expected[name] for name in own} == {name: ours[name] for name in own}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One layer, 64 wide, 96 neurons."""
    return checkpoints.make(tmp_path_factory.mktemp("checkpoint") / "model", num_hidden_layers=1)


@pytest.mark.parametrize(("experts", "align"), [(3, 32), (4, 32)], ids=["exact", "padded"])
def test_a_dense_matrix_is_sliced_with_the_model(checkpoint: Any, tmp_path: Path, experts: int, align: int) -> None:
    """convert gives the bytes that quantizing the sliced file with the sliced numbers gives; zero neurons get zero."""
    convert(checkpoint, tmp_path / "dense.gguf", flat_options(dense=True))
    convert(checkpoint, tmp_path / "sliced.gguf", flat_options(experts=experts, align=align))
    statistics = statistics_of(tmp_path / "dense.gguf")
    matrix = imatrix_files.write_gguf(tmp_path / "m.gguf", statistics)
    own = {name: value for name, value in statistics.items() if "ffn_" not in name}
    for part in ("gate", "up"):
        sums, counts = statistics[f"blk.0.ffn_{part}.weight"]
        own[f"blk.0.ffn_{part}_exps.weight"] = np.repeat(sums, experts, axis=0), counts * experts
    sums, counts = statistics["blk.0.ffn_down.weight"]
    width = 96 // experts
    padded = np.pad(sums.reshape(experts, width), ((0, 0), (0, 32 - width)))
    own["blk.0.ffn_down_exps.weight"] = padded, counts * experts
    expected = theirs(tmp_path / "sliced.gguf", tmp_path / "theirs.gguf", "IQ4_NL", own, pure=True)

    convert(
        checkpoint, tmp_path / "ours.gguf", flat_options(experts, align=align, type="iq4_nl", pure=True, imatrix=matrix)
    )
    quantize(tmp_path / "sliced.gguf", tmp_path / "later.gguf", TypeOptions("iq4_nl", pure=True, imatrix=matrix))

    ours = contents(tmp_path / "ours.gguf")
    assert {name: expected[name] for name in own} == {name: ours[name] for name in own}
    assert contents(tmp_path / "later.gguf") == ours
    assert "m.gguf" == read_gguf(tmp_path / "ours.gguf").metadata["quantize.imatrix.file"]
    own["blk.0.ffn_down_exps.weight"] = padded[::-1], counts * experts
    assert expected != theirs(tmp_path / "sliced.gguf", tmp_path / "theirs.gguf", "IQ4_NL", own, pure=True)


def test_experts_of_a_matrix_are_not_those_of_a_new_grouping(checkpoint: Any, tmp_path: Path) -> None:
    """A per-expert matrix fits contiguous experts; which neurons a calibrated expert gets is not known before."""
    convert(checkpoint, tmp_path / "sliced.gguf", flat_options(experts=3))
    matrix = imatrix_files.write_gguf(tmp_path / "m.gguf", statistics_of(tmp_path / "sliced.gguf"))
    options = flat_options(3, type="q4_0", pure=True, imatrix=matrix)
    plan_conversion(checkpoint, options)

    with pytest.raises(PlanError, match="which neurons an expert gets is decided in this run"):
        plan_conversion(checkpoint, dataclasses.replace(options, used=2))


def held_neurons(sliced: Any, dense: Any, layer: Any) -> Any:
    """(n_expert, d_expert): which neuron of the dense file each place of an expert holds, by its row of the gate."""
    rows, numbers = (
        file.read_tensor(file.tensors[name])
        for file, name in (
            (read_gguf(sliced), f"blk.{layer}.ffn_gate_exps.weight"),
            (read_gguf(dense), f"blk.{layer}.ffn_gate.weight"),
        )
    )
    found = {row.tobytes(): neuron for neuron, row in enumerate(numbers)}
    return np.array([[found[row.tobytes()] for row in expert] for expert in rows])


def test_calibrated_experts_get_the_importance_of_their_own_neurons(tmp_path: Path) -> None:
    """Neurons regrouped and refitted by a calibration, k < n, Q4_K in one pass with a matrix of the dense model.

    The oracle is llama.cpp's quantizer on the unquantized file of the same calibration, given the dense columns in the
    order that the rows of that file's gates show. In any other order its bytes are others.
    """
    n, d_ff = 3, 768
    folder = checkpoints.make(tmp_path / "model", hidden_size=256, intermediate_size=d_ff, num_hidden_layers=2)
    dense, sliced, ours = (tmp_path / f"{name}.gguf" for name in ("dense", "sliced", "ours"))
    convert(folder, dense, flat_options(dense=True))
    statistics = statistics_of(dense)
    matrix = imatrix_files.write_gguf(tmp_path / "m.gguf", statistics)
    kept = tmp_path / "kept"
    calibrated = flat_options(n, used=2, n_shared=1, refit=True, n_token=1024, save_to=kept)

    convert(folder, ours, change_options(calibrated, type="q4_k", pure=True, imatrix=matrix))

    convert(folder, sliced, flat_options(load_from=kept))
    own = {name: value for name, value in statistics.items() if "ffn_" not in name}
    unpermuted = {}
    for i in range(2):
        for part in ("gate", "up"):
            sums, counts = statistics[f"blk.{i}.ffn_{part}.weight"]
            own[f"blk.{i}.ffn_{part}_exps.weight"] = np.repeat(sums, n, axis=0), counts * n
        sums, counts = statistics[f"blk.{i}.ffn_down.weight"]
        order = held_neurons(sliced, dense, i)
        assert sorted(order.flat) == [*range(d_ff)] != [*order.flat]
        own[f"blk.{i}.ffn_down_exps.weight"] = sums[0][order], counts * n
        unpermuted[f"blk.{i}.ffn_down_exps.weight"] = sums.reshape(n, -1), counts * n
    expected = theirs(sliced, tmp_path / "theirs.gguf", "Q4_K_S", own, pure=True)
    found = contents(ours)
    assert {"Q4_K"} == {found[name][0] for name in own}
    assert {name: expected[name] for name in own} == {name: found[name] for name in own}
    other = theirs(sliced, tmp_path / "theirs.gguf", "Q4_K_S", own | unpermuted, pure=True)
    assert {*unpermuted} == {name for name in own if other[name] != found[name]}


def test_a_matrix_of_another_model_is_mentioned(tmp_path: Path) -> None:
    """Its norms tell, in every type and slice of a model; llama.cpp's own files do not say."""
    warning = "--imatrix: was collected from a model with other norms, so from another one, or before it was trained"
    folder = checkpoints.make(tmp_path / "hf", "llama")
    dense = convert(folder, tmp_path / "dense.gguf", flat_options(dense=True, type="f16")).path
    file = read_gguf(dense)
    tensors = {name: SourceTensor(file, info) for name, info in file.tensors.items()}
    entries = {name: Activity(s[0], np.array(n)) for name, (s, n) in statistics_of(dense).items()}
    fewer = {name: tensor for name, tensor in tensors.items() if name != "output_norm.weight"}
    for model, known in ((tensors, True), (fewer, False)):
        matrix = tmp_path / f"{known}.gguf"
        write_imatrix(ImportanceMatrix(entries, ("x",), 1, 512, model=identify_model(model)), matrix)
        for cut in ({"dense": True}, {"experts": 4, "align": 32, "target": "glm4moe"}):
            options = flat_options(**cut, type="q4_0", allow_fallback=True, imatrix=matrix)
            for source in (folder, dense):
                done = convert(source, tmp_path / "out.gguf", options, force=True)
                assert (warning in done.plan.warnings) != known
        done_again = quantize(
            dense, tmp_path / "q.gguf", TypeOptions("q4_0", imatrix=matrix, allow_fallback=True), force=True
        )
        assert (warning in done_again.plan.warnings) != known
