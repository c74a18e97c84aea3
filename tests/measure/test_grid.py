"""What is to be measured, decided before anything runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny_gguf

from moe2gguf.errors import GGUFError
from moe2gguf.gguf.layout import active_bytes
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.gguf.shards import read_shards
from moe2gguf.measure.grid import plan_grid, plan_run
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.quantize import quantize


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    dense = tiny_gguf.dense_weights()
    return {
        "dense": tiny_gguf.write_gguf(folder / "dense.gguf", dense),
        "moe": tiny_gguf.write_gguf(folder / "moe.gguf", tiny_gguf.sliced_weights(dense, 4), n_expert_used=2),
        "f16": tiny_gguf.write_gguf(folder / "f16.gguf", tiny_gguf.sliced_weights(dense, 4), f16=True),
    }


def test_every_combination_once_and_dense_files_once(files: dict[str, Path]) -> None:
    """Files, then counts, then devices; equal counts once; a dense file has no count."""
    found = plan_grid([files["moe"], files["dense"]], [4, 2, 4], ["cpu", "gpu"])
    expected = [
        "moe.gguf k=4/4",
        "moe.gguf k=4/4 gpu",
        "moe.gguf k=2/4",
        "moe.gguf k=2/4 gpu",
        "dense.gguf",
        "dense.gguf gpu",
    ]
    assert expected == [one.label for one in found]
    assert ["F32", "F16"] == [one.type for one in plan_grid([files["dense"], files["f16"]])]


def test_a_mix_of_types_has_the_name_that_the_file_gives(files: dict[str, Path], tmp_path: Path) -> None:
    """Q4_K_M, not the type of most bytes, which is another where blocks of 256 do not fit."""
    options = TypeOptions("q4_k_m", allow_fallback=True)
    path = quantize(files["moe"], tmp_path / "q4_k_m.gguf", options).path

    assert ["Q4_K_M"] == [one.type for one in plan_grid([path])]
    assert "Q4_K" not in {tensor.type.name for tensor in read_gguf(path).tensors.values()}


def test_bits_per_weight_are_of_all_tensors(files: dict[str, Path]) -> None:
    """32 in an F32 file; norms and routers stay F32 in an F16 one, counted by hand."""
    tensors = read_gguf(files["f16"]).tensors.values()
    small = sum(t.n_elements for t in tensors if "norm" in t.name or "gate_inp" in t.name)
    total = sum(t.n_elements for t in tensors)
    dense, half = plan_grid([files["dense"], files["f16"]])
    assert (32, 16 + 16 * small / total) == (dense.bits_per_weight, half.bits_per_weight)


def test_a_set_of_shards_is_one_file(files: dict[str, Path], tmp_path: Path) -> None:
    """Sizes, counts and weights are those of the whole; a shard that is rewritten makes it another file."""
    shards = [
        shard.path
        for shard in read_shards(quantize(files["moe"], tmp_path / "m.gguf", TypeOptions(), shard_size=200_000).path)
    ]
    (one,), (whole,) = plan_grid(shards[:1]), plan_grid([files["moe"]])
    assert len(shards) > 1
    assert (whole.active_bytes, whole.bits_per_weight) == (one.active_bytes, one.bits_per_weight)
    assert sum(path.stat().st_size for path in shards) == one.file_size
    os.utime(shards[-1], (1, 1))
    assert one.identity != plan_grid(shards[:1])[0].identity


def test_without_counts_a_file_runs_as_it_says(files: dict[str, Path]) -> None:
    """The file's own used count."""
    assert [2] == [one.n_expert_used for one in plan_grid([files["moe"]])]


def test_a_count_that_cannot_run_is_refused_with_the_reason(files: dict[str, Path]) -> None:
    """Below one and above n, in words that name the fix; the others are not touched by it."""
    found = plan_grid([files["moe"]], [0, 3, 5])
    assert ["at least 1 must run", "", "there are only 4"] == [
        next((w for w in ("at least 1 must run", "there are only 4") if w in one.refusal), one.refusal) for one in found
    ]


def test_a_count_above_the_graph_budget_is_refused(tmp_path: Path) -> None:
    """With many layers llama.cpp aborts on more than about 16 experts per token."""
    weights = tiny_gguf.sliced_weights(tiny_gguf.dense_weights(n_layer=20, d_model=16, n_head=2, n_head_kv=1), 32)
    path = tiny_gguf.write_gguf(tmp_path / "many.gguf", weights, n_head=2, n_head_kv=1)
    found = plan_grid([path], [32, 16])
    assert "above the limit the process aborts" in found[0].refusal
    assert found[1].refusal == ""


def test_active_bytes_are_what_a_token_reads(files: dict[str, Path]) -> None:
    """All but the embedding, which is not the output matrix here, and k of n of the expert stacks."""
    dense = tiny_gguf.dense_weights()
    mlp = sum(w.nbytes for name, w in dense.items() if ".ffn_" in name and "norm" not in name)
    rest = sum(w.nbytes for name, w in dense.items() if name != "token_embd.weight") - mlp
    router = 2 * 4 * 64 * 4
    file = read_gguf(files["moe"])
    assert [rest + router + mlp * k // 4 for k in (1, 2, 4)] == [
        active_bytes(file.tensors.values(), 4, k) for k in (1, 2, 4)
    ]
    assert rest + mlp == plan_run(read_gguf(files["dense"]), 0).active_bytes


def test_tied_embeddings_are_read(tmp_path: Path) -> None:
    """Without an output matrix the embedding is it."""
    weights = tiny_gguf.dense_weights()
    del weights["output.weight"]
    file = read_gguf(tiny_gguf.write_gguf(tmp_path / "tied.gguf", weights))
    assert sum(w.nbytes for w in weights.values()) == active_bytes(file.tensors.values(), 0, 0)


def test_a_rewritten_file_is_another(files: dict[str, Path], tmp_path: Path) -> None:
    """The identity stays while the file does, and changes with its time or its header."""
    path = tmp_path / "copy.gguf"
    path.write_bytes(files["moe"].read_bytes())
    before = plan_grid([path])[0].identity
    assert before == plan_grid([path], [1])[0].identity
    os.utime(path, ns=(1, 1))
    assert before != plan_grid([path])[0].identity


def test_a_damaged_file_is_an_error(files: dict[str, Path], tmp_path: Path) -> None:
    """Before anything runs."""
    path = tmp_path / "cut.gguf"
    path.write_bytes(files["moe"].read_bytes()[:-100])
    with pytest.raises(GGUFError, match=r"cut\.gguf"):
        plan_grid([files["moe"], path])


def test_files_of_one_name_are_told_apart(files: dict[str, Path], tmp_path: Path) -> None:
    """By their whole path; the same path twice is one file."""
    path = tmp_path / "moe.gguf"
    path.write_bytes(files["moe"].read_bytes())
    found = plan_grid([files["moe"], path, path, files["dense"]])
    assert [f"{files['moe']} k=2/4", f"{path} k=2/4", "dense.gguf"] == [one.label for one in found]
