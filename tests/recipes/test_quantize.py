"""moe2gguf.recipes.quantize: llama.cpp's bytes, from our writer; everything else of the file as it was."""

import dataclasses
import hashlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import gguf_bytes as g
import imatrix_files
import numpy as np
import pytest
import tiny_gguf
from llama_logits import llama_logits, mean_kl
from llama_quantize import file_type_of
from llama_quantize import quantize as llama_quantize

from moe2gguf.errors import CorruptWeightError, GGUFError, HarnessError, OutputError, PlanError
from moe2gguf.gguf import kernels, types
from moe2gguf.gguf.file import ValueType
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.quant.presets import FILE_TYPE_NAMES, PRESETS
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.quantize import describe_network, plan_quantization, quantize

TOKENS = [1, *np.random.default_rng(0).integers(3, 300, 60).tolist()]
UNGUIDED = [
    name
    for name in PRESETS
    if not PRESETS[name].tiny and name not in ("Q2_K_S", "IQ3_XXS") and PRESETS[name].type not in ("F32", "BF16", "F16")
    and name != "IQ3_XS"
]  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dense file, 256 wide, whose weights are of the size that trained ones have."""
    weights = tiny_gguf.dense_weights(0, n_layer=2, d_model=256, d_ff=512)
    return tiny_gguf.write_gguf(tmp_path_factory.mktemp("dense") / "dense.gguf", weights)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same, in F16, one layer."""
    weights = tiny_gguf.dense_weights(1, n_layer=1, d_model=256, d_ff=256)
    return tiny_gguf.write_gguf(tmp_path_factory.mktemp("half") / "half.gguf", weights, f16=True)


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Four experts, 256 wide, with a random router."""
    weights = tiny_gguf.sliced_weights(tiny_gguf.dense_weights(0, n_layer=1, d_model=256, d_ff=1024), 4, router_seed=1)
    return tiny_gguf.write_gguf(tmp_path_factory.mktemp("sliced") / "sliced.gguf", weights)


def contents(path: Any) -> Any:
    """Name -> (type, SHA-256 of the bytes), by our reader."""
    file, data = read_gguf(path), path.read_bytes()
    return {
        t.name: (t.type.name, hashlib.sha256(data[t.offset : t.offset + t.n_bytes]).hexdigest())
        for t in file.tensors.values()
    }


@pytest.mark.parametrize("name", UNGUIDED)
def test_every_tensor_is_llama_cpps_byte_for_byte(half: Any, tmp_path: Path, name: Any) -> None:
    """Of every preset that needs no importance matrix; and llama.cpp finds the file type it would write."""
    llama_quantize(half, tmp_path / "theirs.gguf", types.file_type(FILE_TYPE_NAMES[name]))

    done = quantize(half, tmp_path / "ours.gguf", TypeOptions(name.lower()), threads=2)

    assert contents(tmp_path / "theirs.gguf") == contents(tmp_path / "ours.gguf")
    assert file_type_of(tmp_path / "theirs.gguf") == file_type_of(tmp_path / "ours.gguf")
    assert done.plan.file_size == (tmp_path / "ours.gguf").stat().st_size


def test_experts_are_llama_cpps_byte_for_byte(sliced: Any, tmp_path: Path) -> None:
    """Three-dimensional tensors, which it cuts into other pieces than we do."""
    llama_quantize(sliced, tmp_path / "theirs.gguf", types.file_type("MOSTLY_Q4_K_M"))

    quantize(sliced, tmp_path / "ours.gguf", TypeOptions("q4_k_m", llama_cpp_mix=True), threads=3)

    assert contents(tmp_path / "theirs.gguf") == contents(tmp_path / "ours.gguf")


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_floats_are_llama_cpps_byte_for_byte(dense: Any, half: Any, tmp_path: Path, kind: str) -> None:
    """Rounding is the same; from F32 and from F16."""
    for source in (dense, half):
        llama_quantize(source, tmp_path / "theirs.gguf", types.file_type(FILE_TYPE_NAMES[kind.upper()]))
        quantize(source, tmp_path / "ours.gguf", TypeOptions(kind), force=True)

        assert contents(tmp_path / "theirs.gguf") == contents(tmp_path / "ours.gguf")


SLOW = ("IQ2_S", "IQ2_XS", "IQ1_M", "IQ1_S")  # the kernels' tables take seconds to make
BLOCKS = [pytest.param(k, marks=pytest.mark.real) if k.name in SLOW else k for k in types.BLOCKS]


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_llama_cpp_loads_every_type(sliced: Any, tmp_path: Path, kind: Any) -> None:
    """A sliced file, every matrix in that type, guided; nearer to the source the more bits there are.

    The same file with its experts in another order, or with other weights, is at 3.6.
    """
    shapes = {tensor.name: tensor.shape for tensor in read_gguf(sliced).tensors.values()}
    matrix = imatrix_files.write_gguf(tmp_path / "m.gguf", imatrix_files.statistics_for(shapes, skip=()))
    quantize(sliced, tmp_path / "out.gguf", TypeOptions(tensor_types=(f".*={kind.name}",), imatrix=matrix))

    divergence = mean_kl(llama_logits(sliced, TOKENS), llama_logits(tmp_path / "out.gguf", TOKENS))

    assert {kind.name, "F32"} == {tensor.type.name for tensor in read_gguf(tmp_path / "out.gguf").tensors.values()}
    bits = types.bits_per_weight(kind)
    limits = {8: 0.005, 5.4: 0.2, 4.2: 0.6, 3.4: 1.0, 2.6: 2.2, 2.3: 3.0, 0: 4.0}  # ternary types are for other weights
    assert divergence < next(limit for least, limit in limits.items() if bits > least)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bytes_do_not_depend_on_threads(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """However rows are shared out."""
    monkeypatch.setattr("moe2gguf.gguf.writer.PIECE", 1000)
    monkeypatch.setattr(sys.modules["moe2gguf.recipes.quantize"], "BLOCK", 70_000)
    quantize(dense, tmp_path / "small.gguf", TypeOptions("q4_k_m"), threads=threads)
    monkeypatch.undo()

    quantize(dense, tmp_path / "large.gguf", TypeOptions("q4_k_m"), threads=2)

    assert (tmp_path / "large.gguf").read_bytes() == (tmp_path / "small.gguf").read_bytes()


def test_metadata_keeps_values_types_and_order(tmp_path: Path) -> None:
    """Every kind of value that GGUF has, odd strings, empty arrays and an unusual alignment, bit for bit."""
    pairs = [
        g.key("general.architecture", "str", "odd"),
        g.key("general.alignment", "u32", 64),
        *[g.key(f"x.{kind}", kind, 7) for kind in ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64")],
        g.key("x.f32", "f32", 0.1),
        g.key("x.f64", "f64", 0.1),
        g.key("x.bool", "bool", True),
        *[g.array(f"x.list.{kind}", kind, [1, 2, 3]) for kind in ("u8", "i16", "u64", "f64")],
        g.array("x.empty", "f32", []),
        g.array("x.words", "str", ["a", "ü", ""]),
        g.key("general.file_type", "u32", 0),
        g.key("moe2gguf.quantize.type", "str", "old"),
    ]
    source = tmp_path / "in.gguf"
    source.write_bytes(g.gguf(pairs, [g.f32("a.weight", (3, 64)), g.f32("b_norm.weight", (5,))], alignment=64))
    before = read_gguf(source)

    quantize(source, tmp_path / "out.gguf", TypeOptions("q8_0", pure=True, tensor_types=("a.*=q4_0",)))

    after = read_gguf(tmp_path / "out.gguf")
    changed = {"general.file_type", "moe2gguf.quantize.type"}
    for key in before.metadata.keys() - changed:
        assert (before.metadata[key], before.types[key]) == (after.metadata[key], after.types[key]), key
    assert [key for key in before.metadata if key not in changed] == [
        key for key in after.metadata if key in before.metadata and key not in changed
    ]
    assert (64, {0}) == (after.alignment, {t.offset % 64 for t in after.tensors.values()})
    added = {key: value for key, value in after.metadata.items() if before.metadata.get(key) != value}
    assert {
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0,
        "general.quantization_version": 2,
        "moe2gguf.quantize.version": added["moe2gguf.quantize.version"],
        "moe2gguf.quantize.type": "q8_0",
        "moe2gguf.quantize.rules": ["a.*=Q4_0"],
        "moe2gguf.quantize.source_file_type": 0,
        "moe2gguf.quantize.pure": True,
    } == added
    assert ValueType(gguf.GGUFValueType.UINT32) == after.types["general.quantization_version"]


def test_strings_that_are_not_utf8_come_back_as_they_were(tmp_path: Path) -> None:
    """Broken vocabularies exist; their bytes are nobody's business."""
    source = tmp_path / "in.gguf"
    data = g.gguf(
        [g.key("general.architecture", "str", "odd"), g.key("x", "str", "\x01\x02")], [g.f32("a.weight", (3, 64))]
    )
    source.write_bytes(data.replace(b"\x01\x02", b"\xff\x80"))

    quantize(source, tmp_path / "out.gguf", TypeOptions("q8_0", pure=True))

    assert b"\x02\x00\x00\x00\x00\x00\x00\x00\xff\x80" in (tmp_path / "out.gguf").read_bytes()


def test_auto_with_one_rule_changes_one_tensor(dense: Any, tmp_path: Path) -> None:
    """All others are copied."""
    quantize(dense, tmp_path / "out.gguf", TypeOptions(tensor_types=(r"blk\.0\.ffn_up\.weight=q8_0",)))

    before, after = contents(dense), contents(tmp_path / "out.gguf")
    assert ["blk.0.ffn_up.weight"] == [name for name in before if before[name] != after[name]]


def test_quantized_sources_need_permission(dense: Any, tmp_path: Path) -> None:
    """They lose twice; with permission, the bytes are those that llama.cpp's requantizing gives."""
    quantize(dense, tmp_path / "q8.gguf", TypeOptions("q8_0"))
    with pytest.raises(PlanError, match=r"16 tensors are Q8_0 already.*--allow-requantize"):
        plan_quantization(tmp_path / "q8.gguf", TypeOptions("q4_k_m"))
    llama_quantize(
        tmp_path / "q8.gguf", tmp_path / "theirs.gguf", types.file_type("MOSTLY_Q4_K_M"), allow_requantize=True
    )

    quantize(tmp_path / "q8.gguf", tmp_path / "ours.gguf", TypeOptions("q4_k_m"), allow_requantize=True)

    assert contents(tmp_path / "theirs.gguf") == contents(tmp_path / "ours.gguf")
    assert True is read_gguf(tmp_path / "ours.gguf").metadata["moe2gguf.quantize.requantized"]
    quantize(tmp_path / "q8.gguf", tmp_path / "same.gguf", TypeOptions("q8_0"))
    assert contents(tmp_path / "q8.gguf") == contents(tmp_path / "same.gguf")


def test_what_does_not_change_is_copied_not_made_again(dense: Any, tmp_path: Path) -> None:
    """Q4_K blocks would come out otherwise if they were decoded between."""
    quantize(dense, tmp_path / "q4.gguf", TypeOptions("q4_k"))

    quantize(tmp_path / "q4.gguf", tmp_path / "copy.gguf", TypeOptions())

    assert contents(tmp_path / "q4.gguf") == contents(tmp_path / "copy.gguf")
    assert "moe2gguf.quantize.requantized" not in read_gguf(tmp_path / "copy.gguf").metadata


def test_a_misfit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """With --allow-fallback it is llama.cpp's substitute, byte for byte."""
    source = tiny_gguf.write_gguf(tmp_path / "in.gguf", tiny_gguf.dense_weights(0, n_layer=1))
    with pytest.raises(PlanError, match="--allow-fallback") as caught:
        quantize(source, tmp_path / "ours.gguf", TypeOptions("q4_k_m"))
    assert not (tmp_path / "ours.gguf").exists()
    assert all("rows whose width is a multiple of 256" in text for text in caught.value.refusals)
    llama_quantize(source, tmp_path / "theirs.gguf", types.file_type("MOSTLY_Q4_K_M"))

    done = quantize(source, tmp_path / "ours.gguf", TypeOptions("q4_k_m", allow_fallback=True))

    assert contents(tmp_path / "theirs.gguf") == contents(tmp_path / "ours.gguf")
    assert 8 == len(done.plan.assigned.fallbacks)
    assert True is read_gguf(tmp_path / "ours.gguf").metadata["moe2gguf.quantize.fallback"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_a_bad_weight_is_named_and_leaves_nothing(tmp_path: Path, value: Any) -> None:
    """NaN, infinity, and what the type's scales cannot hold."""
    weights = tiny_gguf.dense_weights(0, n_layer=1)
    weights["blk.0.attn_k.weight"][3, 5] = value
    source = tiny_gguf.write_gguf(tmp_path / "in.gguf", weights)

    with pytest.raises(CorruptWeightError, match=r"blk\.0\.attn_k\.weight"):
        quantize(source, tmp_path / "out.gguf", TypeOptions("q8_0"))

    assert [source] == list(tmp_path.iterdir())


def test_targets_and_sources_that_are_refused(dense: Any, tmp_path: Path) -> None:
    """The file itself, an existing one, an absurd alignment, a file without tensors, no GGUF at all."""
    with pytest.raises(OutputError, match="would replace"):
        quantize(dense, dense, TypeOptions("q8_0"), force=True)
    (tmp_path / "old.gguf").write_text("old")
    with pytest.raises(OutputError, match="--force"):
        quantize(dense, tmp_path / "old.gguf", TypeOptions("q8_0"))
    name = g.key("general.architecture", "str", "odd")
    files = {
        "aligned": (
            g.gguf([name, g.key("general.alignment", "u32", 2**21)], [g.f32("a", (4,))], alignment=2**21),
            "aligns tensors to 2097152 bytes",
        ),
        "empty": (g.gguf([name], []), "holds no tensors"),
    }
    for label, (data, words) in files.items():
        (tmp_path / label).write_bytes(data)
        with pytest.raises(PlanError, match=words):
            quantize(tmp_path / label, tmp_path / "out.gguf", TypeOptions("q8_0"))
    (tmp_path / "text").write_text("not a model at all, but long enough")
    with pytest.raises(GGUFError, match="not a GGUF file"):
        quantize(tmp_path / "text", tmp_path / "out.gguf", TypeOptions("q8_0"))


def test_a_set_of_shards_is_quantized_as_one(tmp_path: Path) -> None:
    """Given any of its shards; a set that is not whole is refused."""
    for i in range(2):
        keys = [g.key("split.no", "u16", i), g.key("split.count", "u16", 2), g.key("split.tensors.count", "i32", 2)]
        keys += [g.key("general.architecture", "str", "odd")] if i == 0 else []
        (tmp_path / f"m-0000{i + 1}-of-00002.gguf").write_bytes(g.gguf(keys, [g.f32(f"t{i}.weight", (2, 32))]))

    quantize(tmp_path / "m-00002-of-00002.gguf", tmp_path / "out.gguf", TypeOptions("q8_0", pure=True))

    assert {"t0.weight": "Q8_0", "t1.weight": "Q8_0"} == {
        name: tensor.type.name for name, tensor in read_gguf(tmp_path / "out.gguf").tensors.items()
    }
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(GGUFError, match="00002-of-00002"):
        quantize(tmp_path / "m-00001-of-00002.gguf", tmp_path / "out2.gguf", TypeOptions("q8_0"))


def test_the_network_of_a_file_and_of_a_hostile_one(dense: Any, sliced: Any, tmp_path: Path) -> None:
    """From the metadata; a missing number and a billion layers are errors, not a crash or a long wait."""
    assert (2, 4, 2, 256, False, 0) == dataclasses.astuple(describe_network(read_gguf(dense)))[1:7]
    assert 4 == describe_network(read_gguf(sliced)).n_expert
    for n, words in ((None, "block_count is missing"), (10**9, "1000000000 layers, but only 1 tensors")):
        keys = [g.key("general.architecture", "str", "llama")] + ([g.key("llama.block_count", "u32", n)] if n else [])
        keys += [g.key("llama.attention.head_count", "u32", 4)]
        (tmp_path / "bad").write_bytes(g.gguf(keys, [g.f32("a.weight", (2, 64))]))
        with pytest.raises(GGUFError, match=re.escape(words)):
            describe_network(read_gguf(tmp_path / "bad"))


def test_the_plan_is_the_file(dense: Any, tmp_path: Path) -> None:
    """Size, types and bits per weight before anything is read; as JSON too."""
    plan = plan_quantization(dense, TypeOptions("q5_k_m"))

    quantize(dense, tmp_path / "out.gguf", TypeOptions("q5_k_m"))

    file = read_gguf(tmp_path / "out.gguf")
    assert plan.file_size == file.file_size
    assert [(t.name, t.type) for t in plan.tensors] == [(t.name, t.type) for t in file.tensors.values()]
    n_bytes, n = sum(t.n_bytes for t in file.tensors.values()), sum(t.n_elements for t in file.tensors.values())
    values = plan.to_dict()
    assert round(8 * n_bytes / n, 4) == values["bits_per_weight"]
    assert 15 + 1 == sum(rule["tensors"] for rule in values["rules"])
    assert {5.5, 6.5625, 32.0} == {tensor["bits_per_weight"] for tensor in values["tensors"]}


def test_kernels_are_asked_for_before_a_byte_is_written(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installation without them says so and leaves no file."""
    monkeypatch.setattr(kernels, "_folder", lambda: tmp_path)
    kernels.library.cache_clear()
    try:
        with pytest.raises(
            HarnessError, match=r"Q4_K, Q6_K: quantized by llama.cpp's kernels.*pip install -U llama-cpp-python"
        ):
            quantize(dense, tmp_path / "out.gguf", TypeOptions("q4_k_m"))
    finally:
        kernels.library.cache_clear()
    assert [] == list(tmp_path.iterdir())


SLOW_CODE = """
import sys, time, contextlib
from pathlib import Path
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.quantize import quantize

@contextlib.contextmanager
def slow(stage, total):
    def advance(n):
        print(stage, flush=True)
        time.sleep(0.02)
    yield advance

quantize(Path(sys.argv[1]), Path(sys.argv[2]), TypeOptions("q4_k_m"), threads=1, progress=slow)
"""


@pytest.mark.parametrize("steps", [(3, 8), (12, 12)])
def test_a_killed_quantization_goes_on_where_it_was(dense: Any, tmp_path: Path, steps: Any) -> None:
    """SIGKILL twice, at several offsets: the third run reuses what was done and gives the same bytes."""
    undisturbed, target = tmp_path / "undisturbed.gguf", tmp_path / "out.gguf"
    quantize(dense, undisturbed, TypeOptions("q4_k_m"))
    for step in steps:
        with subprocess.Popen([sys.executable, "-c", SLOW_CODE, dense, target], stdout=subprocess.PIPE) as process:
            for _ in range(step):
                assert process.stdout is not None
                process.stdout.readline()
            process.kill()
        assert not target.exists()

    done = quantize(dense, target, TypeOptions("q4_k_m"))

    assert done.reused >= max(steps) - 3  # header, the tensor in the works, and the line that came early
    assert undisturbed.read_bytes() == target.read_bytes()
    assert [target, undisturbed] == sorted(tmp_path.iterdir())


def test_an_unfinished_file_of_other_options_is_refused(dense: Any, tmp_path: Path) -> None:
    """The option that differs is named, nothing is lost; resume=False starts anew."""
    target = tmp_path / "out.gguf"
    with subprocess.Popen([sys.executable, "-c", SLOW_CODE, dense, target], stdout=subprocess.PIPE) as process:
        for _ in range(5):
            process.stdout.readline()  # type: ignore[union-attr]
        process.kill()

    with pytest.raises(OutputError, match=r"type: q4_k_m there, q5_k_m now"):
        quantize(dense, target, TypeOptions("q5_k_m"))

    assert 0 == quantize(dense, target, TypeOptions("q5_k_m"), resume=False).reused
    assert [target] == list(tmp_path.iterdir())


def test_no_input_is_replaced_from_python_either(dense: Path, tmp_path: Path) -> None:
    """The rule of the command line stands below it: rules and matrices are inputs, whatever `force` says."""
    rules = tmp_path / "rules.toml"
    rules.write_text("[[rules]]\npattern = '.*ffn_.*'\ntype = 'q8_0'\n")

    with pytest.raises(OutputError, match=r"rules\.toml: would replace .*rules\.toml, which is read"):
        quantize(dense, rules, TypeOptions("q8_0", type_rules=rules), force=True)
    assert rules.read_text().startswith("[[rules]]")
