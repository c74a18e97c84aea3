"""quant.imatrix_match: which importance each tensor gets, from a matrix of the same file or of its dense parent."""

from pathlib import Path
from typing import Any

import gguf_bytes as g
import numpy as np
import pytest

from moe2gguf.gguf.layout import Entry
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.gguf.types import find_type
from moe2gguf.quant.imatrix import Activity, ImportanceMatrix
from moe2gguf.quant.imatrix_match import Neurons, find_neurons, guide

F32 = find_type("f32")
GATE, DOWN = "blk.1.ffn_gate_exps.weight", "blk.1.ffn_down_exps.weight"


def dense(d_ff: Any = 6, width: Any = 2) -> Any:
    """Means 1, 2, ... of the down projection's columns, 10, 20 of the gate's, from 4 tokens."""
    entries = {
        "blk.1.ffn_gate.weight": Activity(np.array([40, 80][:width], np.float32), np.array([4])),
        "blk.1.ffn_down.weight": Activity(4 * np.arange(1, d_ff + 1, dtype=np.float32), np.array([4])),
    }
    return ImportanceMatrix(entries, (), 1, 4)


def test_neurons_are_picked_in_the_experts_order() -> None:
    """Asked for only when the vectors are made; zero neurons (-1) get zero; layers have orders of their own."""
    asked = []

    def order(layer: Any) -> Any:
        asked.append(layer)
        return np.array([[5, 0, -1], [1, 2, 3], [4, -1, -1]])

    found = guide(dense(), [Entry(GATE, (3, 3, 2), F32), Entry(DOWN, (3, 2, 3), F32)], Neurons(6, order))

    assert ({}, {GATE, DOWN}, []) == (found.problems, found.importance.keys(), asked)
    assert [[10, 20]] * 3 == [row.tolist() for row in found.importance[GATE]()]
    assert [[6, 1, 0], [2, 3, 4], [5, 0, 0]] == [row.tolist() for row in found.importance[DOWN]()]
    assert [1] == asked


def test_a_dense_matrix_of_other_widths_is_refused() -> None:
    """The MLP's, and the model's."""
    order = Neurons(6, lambda _: np.zeros((3, 3), np.int64))
    found = guide(dense(d_ff=7, width=1), [Entry(GATE, (3, 3, 2), F32), Entry(DOWN, (3, 2, 3), F32)], order)

    assert {
        GATE: ("is of another model", " (1 columns of the dense matrix, expected 2)"),
        DOWN: ("is of another model", " (7 columns of the dense matrix, expected 6)"),
    } == {name: (problem.why, problem.detail) for name, problem in found.problems.items()}


def test_a_dense_entry_without_tokens_is_no_data() -> None:
    """Neither for gate and up nor for down."""
    entries = {
        f"blk.1.ffn_{part}.weight": Activity(np.zeros(n, np.float32), np.array([0]))
        for part, n in (("gate", 2), ("down", 6))
    }
    matrix = ImportanceMatrix(entries, (), 1, 4)
    order = Neurons(6, lambda _: np.zeros((3, 3), np.int64))
    tensors = [Entry(GATE, (3, 3, 2), F32), Entry(DOWN, (3, 2, 3), F32)]

    refused, ones = guide(matrix, tensors, order), guide(matrix, tensors, order, "ones")

    assert {GATE, DOWN} == refused.problems.keys()
    assert all("no token was seen" in problem.why for problem in refused.problems.values())
    assert [[1, 1, 1]] * 3 == [row.tolist() for row in ones.importance[DOWN]()]


def test_unknown_neurons_are_refused_or_ones() -> None:
    """Which columns of the dense down projection an expert holds is not guessed."""
    tensors = [Entry(DOWN, (3, 2, 3), F32)]

    assert DOWN in guide(dense(), tensors).problems
    assert [[1] * 3] * 3 == [row.tolist() for row in guide(dense(), tensors, repair="ones").importance[DOWN]()]


@pytest.mark.parametrize("head", ["", "blk.x.", f"blk.{'9' * 50}."])
def test_a_down_projection_of_no_layer_has_unknown_neurons(head: str) -> None:
    """A file may call its tensors anything; which layer's neurons they hold is not guessed."""
    name = f"{head}ffn_down_exps.weight"
    entries = {name.replace("_exps", ""): dense().entries["blk.1.ffn_down.weight"]}
    matrix = ImportanceMatrix(entries, (), 1, 4)

    found = guide(matrix, [Entry(name, (3, 2, 3), F32)], Neurons(6, lambda _: np.zeros((3, 3), np.int64)))

    assert "neurons the experts hold is not known" in found.problems[name].why


@pytest.mark.parametrize(("shape", "known"), [((2, 16, 24), True), ((3, 16, 24), False), ((2, 16, 32), False)])
def test_layers_that_differ_have_unknown_neurons(tmp_path: Path, shape: Any, known: bool) -> None:
    """One order serves all layers of a contiguous file only where all have the shape that the metadata says."""
    model = g.LlamaFile(n_expert=2)
    for key, value in {"expert_count": 2, "dense_feed_forward_length": 48, "align": 1}.items():
        model.set(f"moe2gguf.slicing.{key}", "u32", value)
    model.set("moe2gguf.slicing.group", "str", "contiguous").put(g.f32("blk.1.ffn_down_exps.weight", shape))
    (tmp_path / "m.gguf").write_bytes(model.bytes())

    assert known == (find_neurons(read_gguf(tmp_path / "m.gguf")) is not None)


def test_an_expert_without_tokens_is_refused_or_ones() -> None:
    """The others keep their means; the fewest tokens of those that have some are told."""
    sums, counts = np.array([2, 4, 0, 0, 30, 60], np.float32), np.array([1, 0, 3])
    matrix = ImportanceMatrix({GATE: Activity(sums, counts)}, (), 1, 4)
    tensors = [Entry(GATE, (3, 5, 2), F32)]

    refused, ones = guide(matrix, tensors), guide(matrix, tensors, repair="ones")

    assert (" (experts 1)", {}) == (refused.problems[GATE].detail, refused.importance)
    assert [[2, 4], [1, 1], [10, 20]] == [row.tolist() for row in ones.importance[GATE]()]
    assert ({GATE}, {GATE: 1}) == (ones.importance.keys(), ones.few)


def test_the_vocabulary_and_what_is_never_quantized_need_no_entry() -> None:
    """llama.cpp's tool leaves the vocabulary out; routers and norms stay F32."""
    names = ["token_embd.weight", "output.weight", "blk.1.ffn_gate_inp.weight", "blk.1.attn_norm.weight"]
    found = guide(dense(), [Entry(name, (4, 4), F32) for name in names])

    assert ({}, {}) == (found.importance, found.problems)
