"""From a dense GGUF to one with experts: the same weights bit for bit, and llama.cpp's logits."""

import re
from pathlib import Path
from typing import Any

import gguf
import gguf_bytes as g
import llama_quantize
import numpy as np
import pytest
import tiny_gguf
from flat_options import flat_options
from gguf import GGMLQuantizationType as GGMLType
from llama_logits import llama_logits_at, llama_logits_of, mean_kl

from moe2gguf import convert, plan_conversion
from moe2gguf.errors import CheckpointError, CorruptWeightError, GGUFError, OutputError, PlanError
from moe2gguf.experts.layer import LayerExperts
from moe2gguf.gguf.dense_model import open_dense
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.hf.safetensors import SourceDigest
from moe2gguf.recipes.tensors import ExpertSource
from moe2gguf.recipes.tensors_gguf import find_requantized, make_blocks, mark_copied, plan_tensors
from moe2gguf.spec import Method, Slicing

TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 300, 48)]
TYPES = ["F16", "BF16", "Q8_0", "Q6_K", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL"]
N = 4


def tiny(path: Any, *, d_ff: Any = 1024, d_model: Any = 256, seed: Any = 0, **settings: Any) -> Any:
    """A dense F32 file whose rows fit every block."""
    weights = tiny_gguf.dense_weights(seed, d_model=d_model, d_ff=d_ff, n_layer=2)
    return tiny_gguf.write_gguf(path, weights, **settings)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """llama.cpp's file type (all matrices of one type) -> a dense file, made once by llama.cpp's own quantizer."""
    folder = tmp_path_factory.mktemp("dense")
    made = {"F32": tiny(folder / "F32.gguf")}

    def get(name: Any) -> Any:
        if name not in made:
            number = gguf.LlamaFileType[f"MOSTLY_{name}"]
            llama_quantize.quantize(made["F32"], folder / f"{name}.gguf", number, pure=True)
            made[name] = folder / f"{name}.gguf"
        return made[name]

    return get


def numbers(path: Any) -> Any:
    """Name -> float32 weights, decoded by the gguf package."""
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(tuple(t.shape)[::-1])
        for t in gguf.GGUFReader(path).tensors
    }


def joined(weights: Any, d_ff: Any = 1024) -> Any:
    """The dense matrices that experts add up to: rows and columns behind one another, zero neurons left out."""
    out = {}
    for name, w in weights.items():
        if name.endswith((".ffn_gate_exps.weight", ".ffn_up_exps.weight")):
            w = np.concatenate(list(w))
            w = w[w.any(1)] if len(w) != d_ff else w
        elif name.endswith(".ffn_down_exps.weight"):
            scale = weights.get(name.replace(".weight", ".scale"))
            w = np.concatenate(list(w / len(w) if scale is None else w), axis=1)
            w = w[:, w.any(0)] if w.shape[1] != d_ff else w
        elif name.endswith(("ffn_gate_inp.weight", ".scale")):
            continue
        out[name.replace("_exps.", ".")] = w
    return out


def assert_same_weights(source: Any, out: Any, d_ff: Any = 1024) -> None:
    before, after = numbers(source), joined(numbers(out), d_ff)
    assert before.keys() == after.keys()
    for name, w in before.items():
        np.testing.assert_array_equal(w, after[name], err_msg=name)


@pytest.mark.parametrize("name", ["F32", *TYPES])
def test_all_experts_are_the_dense_weights_bit_for_bit(dense: Any, tmp_path: Path, name: Any) -> None:
    """Decoded by the gguf package; types and the other tensors' bytes unchanged, and the plan says so."""
    plan = plan_conversion(dense(name), flat_options(experts=N))
    convert(dense(name), tmp_path / "out.gguf", flat_options(experts=N))

    assert_same_weights(dense(name), tmp_path / "out.gguf")
    before, after = (read_gguf(path) for path in (dense(name), tmp_path / "out.gguf"))
    for tensor in before.tensors.values():
        other = after.tensors[re.sub(r"ffn_(gate|up|down)", r"ffn_\1_exps", tensor.name)]
        assert tensor.type == other.type
        if "ffn_" not in tensor.name:
            assert before.read_tensor(tensor).tobytes() == after.read_tensor(other).tobytes()
    copied = {tensor.name for tensor in plan.tensors if tensor.copied}
    assert copied == {t.name for t in after.tensors.values() if t.type.name not in ("F32", "F16", "BF16")}
    assert plan.warnings == ()


def test_llama_cpp_computes_the_same(dense: Any, tmp_path: Path) -> None:
    """k = n: the logits of the dense file, up to the order of sums and the rounding of activations, in every type."""
    paths = []
    for name in TYPES:
        convert(dense(name), tmp_path / f"{name}.gguf", flat_options(experts=N))
        paths += [dense(name), tmp_path / f"{name}.gguf"]

    found = llama_logits_of(paths, TOKENS)

    for name, expected, logits in zip(TYPES, found[::2], found[1::2], strict=True):
        assert mean_kl(expected, logits) <= 1e-4, name
        assert expected.std() > 0.5


@pytest.mark.parametrize(("n", "asked", "name"), [(N, True, "Q4_0"), (3, False, "Q6_K"), (3, False, "F16")])
def test_scale_tensors_leave_the_weights_alone(tmp_path: Path, n: Any, asked: bool, name: str) -> None:
    """Asked for, or where n is no power of two: the weights are the dense ones, and k = n computes the same."""
    source = tiny(tmp_path / "F32.gguf", d_ff=256 * n)
    llama_quantize.quantize(source, tmp_path / "in.gguf", gguf.LlamaFileType[f"MOSTLY_{name}"], pure=True)

    done = convert(tmp_path / "in.gguf", tmp_path / "out.gguf", flat_options(experts=n, expert_scale=asked))

    after = numbers(tmp_path / "out.gguf")
    np.testing.assert_array_equal(np.full(n, n, np.float32), after["blk.1.ffn_down_exps.scale"])
    assert_same_weights(tmp_path / "in.gguf", tmp_path / "out.gguf", d_ff=256 * n)
    assert any("older builds" in warning for warning in done.plan.warnings)
    assert mean_kl(*llama_logits_of([tmp_path / "in.gguf", tmp_path / "out.gguf"], TOKENS)) <= 1e-4


@pytest.mark.parametrize(("kind", "fused"), [("f32", False), ("q8_0", True)], ids=["q k v", "qkv"])
def test_qwen2_becomes_llama(tmp_path: Path, kind: str, fused: bool) -> None:
    """q and k rows and biases change places, blocks whole: llama.cpp's own qwen2 graph gives the same logits."""
    weights = tiny_gguf.dense_weights(0, d_model=256, d_ff=512)
    rng = np.random.default_rng(1)
    for i in range(2):
        for part in ("q", "k", "v"):
            rows = len(weights[f"blk.{i}.attn_{part}.weight"])
            weights[f"blk.{i}.attn_{part}.bias"] = rng.standard_normal(rows).astype(np.float32)
        if fused:
            for end in ("weight", "bias"):
                parts = [weights.pop(f"blk.{i}.attn_{part}.{end}") for part in "qkv"]
                weights[f"blk.{i}.attn_qkv.{end}"] = np.concatenate(parts)
    source = tiny_gguf.write_gguf(tmp_path / "in.gguf", weights, architecture="qwen2")
    if kind == "q8_0":
        llama_quantize.quantize(source, source := tmp_path / "q.gguf", gguf.LlamaFileType.MOSTLY_Q8_0)

    convert(source, tmp_path / "dense.gguf", flat_options(dense=True))
    convert(source, tmp_path / "out.gguf", flat_options(experts=2))

    names = ["dense.gguf", "out.gguf"]
    expected, *found = llama_logits_of([source, *(tmp_path / name for name in names)], TOKENS)
    for name, logits in zip(names, found, strict=True):
        assert mean_kl(expected, logits) <= (1e-8 if kind == "f32" else 1e-4), name
        fields = read_gguf(tmp_path / name).metadata
        assert "llama" == fields["general.architecture"]
        assert not [key for key in fields if key.startswith("qwen2.")]


def test_everything_else_is_carried_over(tmp_path: Path) -> None:
    """Keys of every type, unknown ones, tokens that are not UTF-8, the alignment; only what experts need differs."""
    model = g.LlamaFile(d_ff=64, d_model=32)
    model.set("some.u8", "u8", 7).set("some.i64", "i64", -(2**40)).set("some.f64", "f64", 0.1)
    model.set("llama.unknown", "bool", 1).set("tokenizer.chat_template", "str", "{{ x }}\x00\n")
    model.set_array("tokenizer.ggml.tokens", "str", [b"\xff\xfe", *(f"t{i}" for i in range(9))])
    model.set_array("some.empty", "f32", []).set_array("some.u16", "u16", [1, 2])
    model.set("general.alignment", "u32", 64)
    path = tmp_path / "in.gguf"
    path.write_bytes(g.gguf(list(model.keys.values()), list(model.tensors.values()), alignment=64))

    convert(path, tmp_path / "out.gguf", flat_options(experts=2))

    before, after = read_gguf(path), read_gguf(tmp_path / "out.gguf")
    changed = {"llama.feed_forward_length": 32, "llama.expert_count": 2, "llama.expert_used_count": 2}
    new = [key for key in after.metadata if key not in before.metadata and key not in changed]
    assert all(key.startswith("moe2gguf.") for key in new)
    assert {**before.metadata, **changed} == {key: after.metadata[key] for key in after.metadata if key not in new}
    assert before.types == {key: after.types[key] for key in before.types}
    assert after.alignment == 64
    assert "model.gguf" not in str(after.metadata)


def test_name_and_type_change_their_keys(dense: Any, tmp_path: Path) -> None:
    """--name, and --type, which quantizes anew and says what was quantized before."""
    done = convert(dense("Q8_0"), tmp_path / "out.gguf", flat_options(experts=N, name="Other", type="q4_0"))

    file = read_gguf(tmp_path / "out.gguf")
    assert ("Other", 2) == (file.metadata["general.name"], file.metadata["general.file_type"])
    assert "Q4_0" == file.tensors["blk.0.ffn_down_exps.weight"].type.name
    assert any(
        re.search(r"tensors are decoded and quantized again, Q8_0 to Q4_0", warning) for warning in done.plan.warnings
    )
    expected = numbers(dense("Q8_0"))["blk.0.ffn_gate.weight"]
    restored = joined(numbers(tmp_path / "out.gguf"))["blk.0.ffn_gate.weight"]
    assert 0 < np.abs(expected - restored).max() < 0.15 * np.abs(expected).max()


def test_blocks_that_slices_cut_are_refused_with_every_way_out(tmp_path: Path) -> None:
    """Q4_K, 5 blocks of 256 per row, 4 experts; each way that the refusal names is open."""
    source = tiny(tmp_path / "F32.gguf", d_ff=5 * 256)
    llama_quantize.quantize(source, path := tmp_path / "in.gguf", gguf.LlamaFileType.MOSTLY_Q4_K_S, pure=True)

    with pytest.raises(PlanError) as caught:
        plan_conversion(path, flat_options(experts=4))
    for way in ("--align 256", "--experts", "--allow-fallback", "--tensor-type"):
        assert way in str(caught.value)

    convert(path, tmp_path / "padded.gguf", flat_options(experts=4, align=256))
    assert_same_weights(path, tmp_path / "padded.gguf", d_ff=5 * 256)
    convert(path, tmp_path / "five.gguf", flat_options(experts=5))
    assert_same_weights(path, tmp_path / "five.gguf", d_ff=5 * 256)

    done = convert(path, tmp_path / "fallback.gguf", flat_options(experts=4, allow_fallback=True))
    kinds = {tensor.name: tensor.type.name for tensor in done.plan.tensors}
    assert ("Q5_0", "Q4_K") == (kinds["blk.0.ffn_down_exps.weight"], kinds["blk.0.ffn_gate_exps.weight"])
    assert [tensor.name for tensor in done.plan.tensors if not tensor.copied and tensor.type != GGMLType.F32] == [
        "blk.0.ffn_down_exps.weight",
        "blk.1.ffn_down_exps.weight",
    ]
    expected, *found = llama_logits_of([path, tmp_path / "padded.gguf", tmp_path / "fallback.gguf"], TOKENS)
    assert mean_kl(expected, found[0]) <= 1e-4
    assert 1e-5 <= mean_kl(expected, found[1]) <= 0.05

    convert(path, tmp_path / "typed.gguf", flat_options(experts=4, tensor_types=(r".*ffn_down_exps\.weight=q8_0",)))


def test_a_grouping_that_moves_neurons(dense: Any) -> None:
    """Any order of neurons: gate and up are the dense rows bit for bit, only the down projection is quantized again."""
    source = open_dense(dense("Q8_0"))
    order = np.random.default_rng(0).permutation(1024).reshape(N, 256)
    method = Method(group="activations", n_shared=None, router="least-squares")
    slicing = Slicing(N, N, 256, method, grain=32)
    layer = LayerExperts(order, np.zeros((N, 256), np.float32), np.full(N, N, np.float32))

    tensors = mark_copied(source, slicing, plan_tensors(source, slicing))

    def made(name: Any) -> Any:
        (tensor,) = (tensor for tensor in tensors if tensor.name == f"blk.1.ffn_{name}_exps.weight")
        blocks = make_blocks(tensor, source, ExpertSource(lambda _: layer), SourceDigest())
        return tensor.copied, np.stack([np.asarray(block) for block in blocks])

    before = numbers(dense("Q8_0"))
    for name in ("gate", "up"):
        copied, raw = made(name)
        assert copied
        np.testing.assert_array_equal(
            before[f"blk.1.ffn_{name}.weight"][order], gguf.quants.dequantize(raw, GGMLType.Q8_0)
        )
    copied, down = made("down")
    assert not copied
    np.testing.assert_array_equal(before["blk.1.ffn_down.weight"][:, order].swapaxes(0, 1) * N, down)
    groups = find_requantized(source, slicing, tensors)
    assert {"Q8_0 to Q8_0": [f"blk.{i}.ffn_down_exps.weight" for i in range(2)]} == groups


def test_more_experts_than_blocks(tmp_path: Path) -> None:
    """Padding to whole blocks cannot help then: refused, or the same type again on request, as the plan says."""
    source = tiny(tmp_path / "F32.gguf", d_ff=3 * 256)
    llama_quantize.quantize(source, path := tmp_path / "in.gguf", gguf.LlamaFileType.MOSTLY_Q6_K, pure=True)

    with pytest.raises(
        PlanError, match=r"(?s)4 experts of 256 neurons cut through the blocks of 256.*:\n +choose --experts 3, which"
    ) as caught:
        plan_conversion(path, flat_options(experts=4, align=256))
    assert "--align" not in str(caught.value)

    done = convert(path, tmp_path / "out.gguf", flat_options(experts=4, align=256, allow_fallback=True))

    assert any("2 tensors are decoded and quantized again, Q6_K to Q6_K" in line for line in done.plan.warnings)
    assert mean_kl(*llama_logits_of([path, tmp_path / "out.gguf"], TOKENS)) <= 0.01


def test_used_counts_run_as_planned(dense: Any, tmp_path: Path) -> None:
    """--preset exact --used 2 --amplify used: factor 2, k = 2 in the file, and llama.cpp runs every count."""
    convert(dense("Q8_0"), tmp_path / "out.gguf", flat_options(experts=N, used=2, preset="exact", amplify="used"))

    file = read_gguf(tmp_path / "out.gguf")
    assert 2 == file.metadata["llama.expert_used_count"]
    down = numbers(dense("Q8_0"))["blk.0.ffn_down.weight"]
    np.testing.assert_array_equal(
        down * 2, np.concatenate(list(numbers(tmp_path / "out.gguf")["blk.0.ffn_down_exps.weight"]), axis=1)
    )
    assert all(np.isfinite(logits).all() for logits in llama_logits_at(tmp_path / "out.gguf", TOKENS, [1, 2, 4]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.set("general.architecture", "str", "gemma3"), "architecture is 'gemma3'; of GGUF files"),
        (lambda m: m.set("general.architecture", "u32", 1), "architecture is none"),
        (lambda m: m.set("general.type", "str", "adapter"), "only a model can be cut"),
        (lambda m: m.put(g.f32("blk.0.ffn_up.bias", (24,))), "experts have no place for 1 tensors.*ffn_up.bias"),
        (lambda m: m.put(g.f32("extra", (24,))), "unexpected"),
        (lambda m: m.tensors.pop("blk.1.ffn_up.weight"), "1 tensors are missing: blk.1.ffn_up.weight"),
        (lambda m: m.put(g.f32("blk.0.ffn_up.weight", (23, 16))), r"expected the shape \(24, 16\), found \(23, 16\)"),
        (lambda m: m.put(g.Tensor("blk.0.ffn_up.weight", (24, 16), g.I8, bytes(384))), "I8 is no type of weights"),
        (lambda m: m.keys.pop("llama.block_count"), "block_count is missing"),
        (lambda m: m.set("llama.block_count", "u32", 10**9), "block_count: expected 1 to 512"),
    ],
)
def test_files_that_are_no_dense_llama_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    """Another architecture, no model, MLP biases, wrong, missing or surplus tensors, absurd counts."""
    model = g.LlamaFile()
    change(model)
    (tmp_path / "in.gguf").write_bytes(model.bytes())

    with pytest.raises(PlanError, match=words):
        plan_conversion(tmp_path / "in.gguf", flat_options(experts=2))


def test_other_refusals(dense: Any, tmp_path: Path) -> None:
    """Experts already, no GGUF, nothing there, the source as target, a broken target."""
    (tmp_path / "moe.gguf").write_bytes(g.LlamaFile(n_expert=4).bytes())
    with pytest.raises(PlanError, match="has 4 experts already; `moe2gguf inspect, expert-usage, set-used, prune"):
        plan_conversion(tmp_path / "moe.gguf")
    (tmp_path / "text").write_text("no model at all, but long enough for one")
    with pytest.raises(GGUFError, match="not a GGUF file"):
        plan_conversion(tmp_path / "text")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        plan_conversion(tmp_path / "absent")
    with pytest.raises(OutputError, match="would replace"):
        convert(dense("Q8_0"), dense("Q8_0"), flat_options(experts=4), force=True)


def test_a_scale_that_would_overflow_names_the_way_out(tmp_path: Path) -> None:
    """Nothing is left behind, and the scale tensor is the way."""
    values = np.full((16, 64), 60000.0 * 127)
    model = g.LlamaFile(d_ff=64)
    for i in range(2):
        raw = gguf.quants.quantize(values.astype(np.float32), GGMLType.Q8_0)
        model.put(g.Tensor(f"blk.{i}.ffn_down.weight", (16, 64), g.Q8_0, raw.tobytes()))
    (tmp_path / "in.gguf").write_bytes(model.bytes())

    with pytest.raises(CorruptWeightError, match=r"blk\.\d\.ffn_down\.weight.*--expert-scale"):
        convert(tmp_path / "in.gguf", tmp_path / "out.gguf", flat_options(experts=2))
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]

    convert(tmp_path / "in.gguf", tmp_path / "out.gguf", flat_options(experts=2, expert_scale=True))


def test_equal_inputs_give_equal_bytes(dense: Any, tmp_path: Path) -> None:
    """No time, no path."""
    for name in ("a.gguf", "b.gguf"):
        convert(dense("Q4_K_S"), tmp_path / name, flat_options(experts=N), threads=1 if name == "a.gguf" else 3)

    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_count_that_does_not_fit_is_one_problem(tmp_path: Path) -> None:
    """Counts that divide the blocks and that llama.cpp runs come first, then what padding costs."""
    source = tiny(tmp_path / "f32.gguf", d_ff=10 * 256)
    llama_quantize.quantize(source, tmp_path / "q4.gguf", gguf.LlamaFileType.MOSTLY_Q4_K_S, pure=True)

    with pytest.raises(PlanError) as caught:
        plan_conversion(tmp_path / "q4.gguf", flat_options(experts=4))

    (refusal,) = caught.value.refusals
    _, *ways = refusal.split("\n      ")
    assert [
        "choose --experts 2, 5 or 10, which divide the blocks evenly",
        "or pad the experts with --align 256, which loses nothing: 20% more bytes in the MLPs",
    ] == ways[:2]
    assert ways[2].startswith("or take larger types there with --allow-fallback")


@pytest.mark.parametrize(
    ("d_ff", "options", "experts", "words"),
    [
        (7 * 256, {}, 7, "7 experts, not 8: they divide the 7 blocks"),
        (6 * 256, {}, 6, "6 experts, not 8: they divide the 6 blocks of every MLP; so do 2, 3"),
        (8 * 256, {}, 8, ""),
        (7 * 256, {"target": "glm4moe", "preset": "exact"}, 7, "7 experts, not 16: they divide"),
        (97 * 256, {}, 8, "8 experts are padded to 3328 neurons, whole blocks of 256: 7% more bytes"),
    ],
)
def test_without_a_number_the_experts_keep_the_blocks_whole(
    tmp_path: Any, d_ff: int, options: Any, experts: int, words: str
) -> None:
    """A newcomer's K-quant file converts at the first command, and the plan says what was chosen."""
    source = tiny(tmp_path / "f32.gguf", d_ff=d_ff)
    llama_quantize.quantize(source, tmp_path / "q4.gguf", gguf.LlamaFileType.MOSTLY_Q4_K_S, pure=True)

    plan = plan_conversion(tmp_path / "q4.gguf", flat_options(**options))

    assert plan.n_expert == experts
    assert words in "\n".join(plan.warnings)
    assert all(tensor.copied for tensor in plan.tensors if tensor.name.endswith("_exps.weight"))
