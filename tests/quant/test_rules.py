"""moe2gguf.quant.rules and .assignment: rules of the user's, in their order, and nothing that happens silently."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType

from moe2gguf.errors import PlanError
from moe2gguf.gguf.layout import Entry
from moe2gguf.quant.assign import assign, find_stored_type, may_quantize
from moe2gguf.quant.presets import Network
from moe2gguf.quant.rules import TypeOptions, make_preset_rules, read_own_rules, read_type_rules, refuse_type

F16, F32 = GGMLType.F16, GGMLType.F32


def tensors(d_expert: Any = 96) -> Any:
    """A sliced model of three layers, 256 wide."""
    entries = [Entry("token_embd.weight", (32, 256), F16), Entry("output_norm.weight", (256,), F32)]
    for i in range(3):
        entries += [
            Entry(f"blk.{i}.attn_q.weight", (256, 256), F16),
            Entry(f"blk.{i}.attn_q.bias", (256,), F32),
            Entry(f"blk.{i}.attn_v.weight", (64, 256), F16),
            Entry(f"blk.{i}.ffn_gate_inp.weight", (4, 256), F32),
            Entry(f"blk.{i}.ffn_up_exps.weight", (4, d_expert, 256), F16),
            Entry(f"blk.{i}.ffn_down_exps.weight", (4, 256, d_expert), F16),
        ]
    return entries


NETWORK = Network("llama", 3, 8, 2, 256, True, 4)


def choose(d_expert: Any = 256, list_cuts: Any = lambda _block: [], **options: Any) -> Any:
    """The assignment for those tensors."""
    return assign(tensors(d_expert), TypeOptions(**options), NETWORK, list_cuts=list_cuts)


def names(found: Any) -> Any:
    """Name -> type name."""
    return {name: kind.name for name, kind in found.types.items()}


def test_auto_keeps_every_tensor_as_stored() -> None:
    """No rule, no change, no count."""
    found = choose()

    assert {t.name: t.type.name for t in tensors()} == names(found)
    assert ((), (), ()) == (found.counts, found.fallbacks, found.refusals)


def test_the_first_pattern_that_matches_the_whole_name_decides() -> None:
    """Options before the file before the type; each says how many tensors it decided."""
    found = choose(type="q4_K", tensor_types=(r"blk\.1\..*=q6_k", r"blk\..*\.attn_v\.weight=Q5_K"))

    assert {"Q6_K"} == {kind for name, kind in names(found).items() if name.startswith("blk.1.") and "F" not in kind}
    assert "Q5_K" == names(found)["blk.2.attn_v.weight"]
    assert "Q4_K" == names(found)["blk.0.ffn_down_exps.weight"]
    assert "Q8_0" == names(found)["token_embd.weight"]
    assert [4, 2, 1, 6] == [count for _, count in found.counts]


def test_norms_biases_and_routers_stay_as_they_are() -> None:
    """Whatever the patterns say; a pattern that means only them is refused with the reason."""
    found = choose(type="q8_0", pure=True, tensor_types=(".*(norm|inp|bias).*=q8_0",))

    kept = {"output_norm.weight"} | {
        f"blk.{i}.{part}" for i in range(3) for part in ("attn_q.bias", "ffn_gate_inp.weight")
    }
    assert {"F32"} == {names(found)[name] for name in kept}
    assert {"Q8_0"} == {kind for name, kind in names(found).items() if name not in kept}
    assert ["matches only tensors that are never quantized"] == [
        re.search("matches only tensors that are never quantized", text)[0]  # type: ignore[index]
        for text in found.refusals
    ]


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_q.weight", (4, 4), True),
        ("blk.0.attn_q.weight", (1, 4), False),
        ("blk.0.ffn_up_exps.weight", (1, 4, 4), True),
        ("blk.0.ffn_down_exps.scale", (4, 4), False),
        ("blk.0.attn_norm.weight", (4, 4), False),
        ("blk.0.ffn_gate_inp.weight", (4, 4), False),
        ("token_embd.weight", (4,), False),
        ("x.weight", (), False),
    ],
)
def test_what_may_be_quantized(name: str, shape: Any, expected: bool) -> None:
    """Matrices of weights; leading ones do not make a matrix, as in llama.cpp."""
    assert expected == may_quantize(name, shape)


def test_as_stored_keeps_matrices_and_widens_vectors_and_routers() -> None:
    """llama.cpp wants norms, biases and routers in F32."""
    half = np.dtype(np.float16)

    assert GGMLType.F16 == find_stored_type("blk.0.attn_q.weight", (4, 4), half)
    assert GGMLType.F32 == find_stored_type("blk.0.attn_norm.weight", (4,), half)
    assert GGMLType.F32 == find_stored_type("blk.0.ffn_gate_inp.weight", (4, 4), half)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ((r"blk\.9\..*=q8_0",), "no tensor's whole name matches it"),
        (("attn_q=q8_0",), "no tensor's whole name matches it"),
        ((".*=q8_0", ".*attn_q.*=q6_k"), "decided by an earlier pattern"),
    ],
)
def test_a_pattern_that_decides_nothing_is_an_error(rules: Any, words: str) -> None:
    """Never a rule that the user believes in and the file does not show."""
    (refusal,) = choose(tensor_types=rules).refusals

    assert words in refusal
    assert repr(rules[-1].split("=")[0]) in refusal


def test_everything_wrong_with_the_rules_is_listed_at_once(tmp_path: Path) -> None:
    """Unknown types, broken expressions, missing parts, an unreadable file."""
    options = TypeOptions("q9_9", ("x=q9_9", "(=q8_0", "q8_0", "=q8_0"), tmp_path / "missing.json")

    with pytest.raises(PlanError) as caught:
        assign(tensors(), options, NETWORK)

    words = ("type q9_9: unknown", "'q9_9' is not a type", "not a regular expression", "PATTERN=TYPE", "missing.json")
    assert 6 == len(caught.value.refusals)
    for word in words:
        assert word in str(caught.value)


def test_a_type_that_does_not_fit_is_one_refusal_with_ways_out() -> None:
    """96 wide rows in blocks of 256: the plan refuses, with what each way would give, those of the cut first."""
    (refusal,) = choose(96, lambda block: [f"cut into {block}"], type="q4_k").refusals

    bytes_more = 3 * 4 * 256 * 96 * (5.5 - 4.5) / 8
    assert (
        "Q4_K needs rows whose width is a multiple of 256, which 96 (blk.0.ffn_down_exps.weight and 2 more) is not:",
        "cut into 256",
        "or take larger types there with --allow-fallback (Q5_0 for Q4_K, 5.5 bits per weight for 4.5; "
        f"{bytes_more:,.0f} bytes more in all)",
        "or choose another type, for all or with --tensor-type",
    ) == tuple(refusal.split("\n      "))


def test_types_that_do_not_fit_rows_that_no_cut_changes() -> None:
    """All types and widths are in one refusal, and it says nothing of cutting."""
    narrow = [Entry("blk.0.attn_q.weight", (96, 96), F16), Entry("blk.0.ffn_down_exps.weight", (4, 96, 48), F16)]
    rules = (r".*attn_q\.weight=q6_k",)

    (refusal,) = assign(narrow, TypeOptions("q4_k", rules), NETWORK, list_cuts=lambda _: ["cut"]).refusals

    assert refusal.startswith(
        "Q6_K and Q4_K need rows whose width is a multiple of 256, which 96 (blk.0.attn_q.weight) and 48 "
        "(blk.0.ffn_down_exps.weight) are not:\n      take larger types there"
    )
    assert "Q8_0 for Q6_K, 8.5 bits per weight for 6.5625; " in refusal
    assert "F16 for Q4_K, 16 bits per weight for 4.5; " in refusal


def test_a_fallback_is_listed_with_its_cost() -> None:
    """In a warning and tensor by tensor; the other tensors keep what was asked for."""
    found = choose(96, type="q4_k", allow_fallback=True)

    assert () == found.refusals
    assert ["Q5_0"] * 3 == [names(found)[f"blk.{i}.ffn_down_exps.weight"] for i in range(3)]
    assert "Q4_K" == names(found)["blk.0.ffn_up_exps.weight"]
    assert [1.0] * 3 == [one.extra_bits for one in found.fallbacks]
    assert ["Q5_0 instead, 5.5 bits per weight for 4.5"] == [text.split(": ")[1] for text in found.warnings]
    first = found.to_dict()["fallbacks"][0]
    assert {
        "tensor": "blk.0.ffn_down_exps.weight",
        "wanted": "Q4_K",
        "used": "Q5_0",
        "extra_bits_per_weight": 1,
    } == first


def test_rows_that_fit_no_block_fall_back_to_f16_and_types_without_substitute_are_refused() -> None:
    """72 is no multiple of 32; Q1_0 has no substitute in llama.cpp either."""
    assert "F16" == names(choose(72, type="q4_k", allow_fallback=True))["blk.0.ffn_down_exps.weight"]
    (refusal,) = choose(96, type="q1_0", pure=True, allow_fallback=True).refusals
    assert "--allow-fallback" not in refusal


@pytest.mark.parametrize("kind", ["iq2_xxs", "iq2_xs", "iq1_s", "iq1_m", "iq2_s", "iq3_xxs", "q2_k_s"])
def test_types_that_need_an_importance_matrix_are_refused_without(kind: str) -> None:
    """Three of them would abort the process, the others make garbage; llama.cpp refuses them as well."""
    refusals = choose(type=kind).refusals

    assert any("needs an importance matrix" in text for text in refusals)
    network = Network("llama", 3, 8, 2, 256, True, 4, importance=True)
    guided = {tensor.name for tensor in tensors(256)}
    assert () == assign(tensors(256), TypeOptions(kind), network, guided).refusals


def test_the_embedding_may_be_small_without_an_importance_matrix() -> None:
    """Where the kernel does not abort, as in llama.cpp."""
    assert () == choose(tensor_types=(r"token_embd\.weight=iq3_xxs",)).refusals
    assert 1 == len(choose(tensor_types=(r"token_embd\.weight=iq2_xxs",)).refusals)


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_a_type_rules(tmp_path: Path, suffix: str) -> None:
    """TOML or JSON by its suffix; tried after the options."""
    path = tmp_path / f"recipe{suffix}"
    rules = [(r"blk\.(0|2)\..*_exps\.weight", "q6_k"), (r"blk\..*_exps\.weight", "q4_k")]
    if suffix == ".json":
        path.write_text(json.dumps({"rules": [{"pattern": pattern, "type": kind} for pattern, kind in rules]}))
    else:
        path.write_text("".join(f"[[rules]]\npattern = '{pattern}'\ntype = '{kind}'\n" for pattern, kind in rules))

    found = choose(type_rules=path, tensor_types=(r"blk\.2\.ffn_up_exps\.weight=q8_0",))

    assert rules == read_type_rules(path)
    expected = {
        "blk.0.ffn_up_exps.weight": "Q6_K",
        "blk.1.ffn_up_exps.weight": "Q4_K",
        "blk.2.ffn_up_exps.weight": "Q8_0",
    }
    assert expected == {name: names(found)[name] for name in expected}
    assert {str(path)} == {rule.origin for rule, _ in found.counts[1:]}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"rules": {}}', '{"rules": [{"pattern": "x"}]}', '{"rules": [{"pattern": "x", "type": 5}]}',
     '{"rules": [], "more": 1}', "[" * 100_000, b"\xff\xfe"],
)  # fmt: skip
def test_a_senseless_type_rules_is_an_error(tmp_path: Path, content: Any) -> None:
    """With its name, never a crash."""
    path = tmp_path / "recipe.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(PlanError, match=r"recipe\.json"):
        read_type_rules(path)


def test_a_type_rules_is_not_read_without_end(tmp_path: Path) -> None:
    """A model file named by mistake costs a megabyte, not all memory."""
    path = tmp_path / "recipe.json"
    path.write_text('{"rules": []}' + " " * (1 << 20))

    with pytest.raises(PlanError, match="more than 1048576 bytes"):
        read_type_rules(path)


def test_a_preset_is_a_list_of_rules() -> None:
    """Q4_K_M of 16 layers, written out: the two first, the two last and every third layer get more bits."""
    rules = make_preset_rules("Q4_K_M", Network("llama", 16, 8, 8, 256, False))

    layers = r"blk\.(0|1|4|7|10|13|14|15)"
    assert [
        (r"output\.weight", "Q6_K"),
        (layers + r"\.attn_(v|qkv|kv_b)\.weight", "Q6_K"),
        (layers + r"\.ffn_down(_\w+)?\.weight", "Q6_K"),
        (".*", "Q4_K"),
    ] == [(rule.pattern, rule.type.name) for rule in rules]


def test_names_are_known_in_any_case_and_the_nearest_to_unknown_ones_are_named() -> None:
    """Presets and plain types; a name that is like none gets the presets."""
    for name in ("auto", "Q4_K_M", "q4_k_m", "Q4_K", "q4_k", "MXFP4", "bf16"):
        assert [] == refuse_type(name)
    assert ["type q4km: unknown; choose q4_k_m or q4_k or q5_k_m"] == refuse_type("q4km")
    assert ["type fp16: unknown; choose f16 or bf16"] == refuse_type("fp16")
    for kind, words in (("q4-kk", "choose q4_k or "), ("gibberish", "choose one of f32, ")):
        with pytest.raises(PlanError, match=f"--tensor-type x={kind}: '{kind}' is not a type; {words}"):
            read_own_rules(TypeOptions(tensor_types=(f"x={kind}",)))
    (refusal,) = refuse_type("gibberish")
    assert refusal.startswith("type gibberish: unknown; choose one of f32, bf16, f16, q8_0, q6_k, q5_k_m")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Network("falcon", 3, 8, 2, 256, True), "is not known here for 'falcon'; use --pure"),
        (Network("odd", 0, 0, 0, 0, True), "needs a block_count; use --pure"),
    ],
)
def test_a_preset_is_refused_where_its_choice_is_not_known(other: Network, words: str) -> None:
    """Falcon's rules differ, and a file may not say how many layers it has; one type for everything is possible."""
    with pytest.raises(PlanError, match=words):
        assign(tensors(256), TypeOptions("q4_k_m"), other)
    for options in (TypeOptions("q4_k_m", pure=True), TypeOptions("f16"), TypeOptions("q4_k")):
        assert () == assign(tensors(256), options, other).refusals
