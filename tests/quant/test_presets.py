"""moe2gguf.quant.presets: the same types as llama.cpp's own quantizer chooses, for every file type and network."""

from pathlib import Path
from typing import Any

import pytest
from llama_quantize import chosen_types, hollow
from moe_files import MORE, make

from moe2gguf.gguf import types
from moe2gguf.gguf.layout import Entry
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.quant.assign import assign
from moe2gguf.quant.presets import FILE_TYPE_NAMES, PRESETS, Network
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.quantize import describe_network

DENSE = {
    "24 layers, grouped queries": {"n_layer": 24, "n_head_kv": 2},
    "33 layers, tied, pairs": {"n_layer": 33, "n_head_kv": 4, "tied": True},
    "80 layers, 70B": {"n_layer": 80, "n_head_kv": 4},
    "80 layers, no groups": {"n_layer": 80, "n_head_kv": 8},
    "one layer": {"n_layer": 1},
    "fused": {"n_layer": 17, "fused": True},
    "qwen2, 80 layers": {"n_layer": 80, "n_head_kv": 8, "architecture": "qwen2"},
}
SLICED = {
    "8 experts": {"n_layer": 24, "n_expert": 8},
    "4 experts": {"n_layer": 16, "n_expert": 4, "n_head_kv": 4, "tied": True},
    "8 experts, 80 layers": {"n_layer": 80, "n_expert": 8, "n_head_kv": 4},
    "one expert": {"n_layer": 16, "n_expert": 1},
}
MISFITS = {
    "64 wide": {"n_layer": 9, "d_model": 64, "d_ff": 96},
    "MLP 96": {"n_layer": 9, "tied": True, "d_ff": 96},
    "MLP 72": {"n_layer": 9, "d_ff": 72},
    "experts 96": {"n_layer": 9, "n_expert": 8, "d_ff": 96},
}


def entries(path: Any) -> Any:
    """The tensors of a file."""
    return [Entry(t.name, t.shape, t.type) for t in read_gguf(path).tensors.values()]


def network(settings: Any, importance: Any = False) -> Any:
    """The same network in our terms."""
    values = {"n_head_kv": 2, "tied": False, "n_expert": 0, "d_model": 256, "architecture": "llama"} | settings
    return Network(
        values["architecture"],
        values["n_layer"],
        8,
        values["n_head_kv"],
        values["d_model"],
        values["tied"],
        values["n_expert"],
        importance,
    )


@pytest.mark.parametrize("settings", (DENSE | SLICED | MISFITS).values(), ids=DENSE | SLICED | MISFITS)  # type: ignore[operator]
@pytest.mark.parametrize("importance", [False, True], ids=["", "with importance"])
def test_every_preset_chooses_as_llama_cpp_does(tmp_path: Path, settings: Any, importance: bool) -> None:
    """Tensor by tensor, substitutes for misfits included; where it gives up, we refuse."""
    path = hollow(tmp_path / "hollow.gguf", **settings)
    tensors, seen = entries(path), network(settings, importance)

    for name in PRESETS:
        ours = assign(tensors, TypeOptions(name.lower(), allow_fallback=True, llama_cpp_mix=True), seen)
        try:
            expected = chosen_types(path, types.file_type(FILE_TYPE_NAMES[name]), importance=importance)
        except RuntimeError:
            assert [text for text in ours.refusals if "rows whose width" in text], name
            continue
        changed = {tensor: kind.name for tensor, kind in ours.types.items() if kind.name != "F16"}
        kept = {tensor for tensor, kind in expected.items() if kind == "F16"}
        assert {tensor: kind for tensor, kind in expected.items() if tensor not in kept} == {
            tensor: kind for tensor, kind in changed.items() if not tensor.endswith("norm.weight")
        }, name
        assert types.file_type(FILE_TYPE_NAMES[name]) == ours.file_type


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "MXFP4_MOE"])
@pytest.mark.parametrize("n_expert", [4, 8, 16])
def test_experts_get_the_types_of_their_dense_parent(tmp_path: Path, name: Any, n_expert: int) -> None:
    """So that files with different numbers of experts can be compared; attention too is as in the dense file."""
    dense = hollow(tmp_path / "dense.gguf", n_layer=24)
    sliced = hollow(tmp_path / "sliced.gguf", n_layer=24, n_expert=n_expert)
    expected = assign(entries(dense), TypeOptions(name), network({"n_layer": 24})).types

    chosen = assign(entries(sliced), TypeOptions(name), network({"n_layer": 24, "n_expert": n_expert})).types

    assert expected == {
        tensor.replace("_exps", ""): kind for tensor, kind in chosen.items() if "gate_inp" not in tensor
    }


def test_mxfp4_moe_is_about_experts(tmp_path: Path) -> None:
    """The one preset that means experts and nothing else: they are MXFP4 without asking for llama.cpp's mix."""
    sliced = hollow(tmp_path / "sliced.gguf", n_layer=2, n_expert=4)

    chosen = assign(entries(sliced), TypeOptions("mxfp4_moe"), network({"n_layer": 2, "n_expert": 4})).types

    assert {"MXFP4"} == {kind.name for tensor, kind in chosen.items() if "_exps" in tensor}
    assert "Q8_0" == chosen["blk.0.attn_q.weight"].name


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_pure_is_llama_cpps_pure(tmp_path: Path, name: Any) -> None:
    """One type for every matrix, the vocabulary's included."""
    path = hollow(tmp_path / "hollow.gguf", n_layer=2, n_expert=2)
    expected = chosen_types(path, types.file_type(FILE_TYPE_NAMES[name]), pure=True)

    ours = assign(entries(path), TypeOptions(name, pure=True), network({"n_layer": 2, "n_expert": 2}))

    same = {tensor: kind.name for tensor, kind in ours.types.items() if tensor in expected}
    assert expected == same
    assert {"F16"} == {ours.types[tensor].name for tensor in ours.types if "norm" in tensor or "gate_inp" in tensor}


@pytest.mark.parametrize("architecture", MORE)
def test_presets_of_other_architectures_are_llama_cpps(tmp_path: Path, architecture: str) -> None:
    """Beside shared experts, dense layers, latent attention, or none."""
    path = make(tmp_path / "moe.gguf", architecture, 6)
    file = read_gguf(path)
    tensors, seen = entries(path), describe_network(file)
    stored = {tensor.name: tensor.type.name for tensor in tensors}
    downs = [name.split(".")[1] for name in stored if ".ffn_down" in name and name.endswith("weight")]
    has_several = len(downs) > len({*downs})

    for name, preset in PRESETS.items():
        if preset.tiny and has_several:  # llama.cpp counts every down projection as a layer
            continue
        ours = assign(tensors, TypeOptions(name.lower(), allow_fallback=True, llama_cpp_mix=True), seen)
        try:
            expected = chosen_types(path, types.file_type(FILE_TYPE_NAMES[name]))
        except RuntimeError:
            assert ours.refusals, name
            continue
        assert stored | expected == {tensor: kind.name for tensor, kind in ours.types.items()}, name
