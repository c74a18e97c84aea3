"""quant.target: the types with the least error under a size, against exhaustive search and against plain numpy."""

import itertools
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe2gguf.errors import CorruptWeightError
from moe2gguf.gguf import types
from moe2gguf.gguf.layout import Entry
from moe2gguf.gguf.types import find_type
from moe2gguf.gguf.writer import OutputTensor
from moe2gguf.quant import target
from moe2gguf.quant.target import Option, choose_under_budget, find_range, list_types, lower_hull, spend_budget

Q4_0, Q8_0, F16 = find_type("q4_0"), find_type("q8_0"), find_type("f16")


def tensor(name: Any, rows: Any, importance: Any = None, shape: Any = None) -> Any:
    """An F32 tensor that comes in two pieces."""
    pieces = np.array_split(rows.astype(np.float32), 2)
    return OutputTensor(name, shape or rows.shape, find_type("f32"), (), lambda: iter(pieces), importance=importance)


points = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 100)), min_size=1, max_size=4)


@given(st.lists(points, min_size=1, max_size=4), st.integers(0, 150))
def test_the_choice_is_the_best_but_for_one_step(tensors: Any, extra: Any) -> None:
    """Never above the budget, and no worse than the best of all combinations by more than one step of one tensor."""
    options = {
        f"t{i}": [Option(Q8_0, n_bytes, float(error)) for n_bytes, error in choices]
        for i, choices in enumerate(tensors)
    }
    limit = sum(min(one.n_bytes for one in choices) for choices in options.values()) + extra
    best = min(
        sum(one.error for one in combination)
        for combination in itertools.product(*options.values())
        if sum(one.n_bytes for one in combination) <= limit
    )
    steps = [a.error - b.error for choices in options.values() for a, b in itertools.pairwise(lower_hull(choices))]

    found = spend_budget(options, limit)

    assert best - 1e-9 <= found.error <= best + max(steps, default=0) + 1e-9


def test_the_hull_drops_what_is_never_best() -> None:
    """Worked by hand: the same size and worse, larger and worse, and above the line between its neighbors."""
    a, b, c, d = (Option(Q8_0, n, e) for n, e in ((10, 9.0), (20, 3.0), (30, 2.9), (40, 1.0)))
    worse = [Option(Q4_0, 10, 9.5), Option(Q4_0, 25, 4.0)]

    assert [a, b, d] == lower_hull([d, c, *worse, b, a])
    assert [b] == lower_hull([b])


def test_bytes_go_to_the_tensor_that_gains() -> None:
    """One of two equally large tensors has values that four bits hold exactly; the other gets eight."""
    rng = np.random.default_rng(0)
    exact = rng.integers(-7, 8, (64, 64)).astype(np.float32)
    exact[:, ::32] = -8
    tensors = [tensor("blk.0.attn_q.weight", exact), tensor("blk.0.attn_k.weight", rng.standard_normal((64, 64)))]

    found = choose_under_budget(tensors, (), types.n_bytes((64, 64), Q4_0) + types.n_bytes((64, 64), Q8_0), threads=2)

    assert {"blk.0.attn_q.weight": Q4_0, "blk.0.attn_k.weight": Q8_0} == found.types
    assert 0 < found.error < 1e-4


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q5_1"])
def test_the_error_is_the_share_of_the_outputs_energy(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """By gguf's numpy kernels, with the mean squares of each expert's inputs as weights."""
    rng = np.random.default_rng(1)
    rows, means = rng.standard_normal((2, 8, 64)), rng.random((2, 64)).astype(np.float32)
    means[0] = 1
    monkeypatch.setattr(target, "list_types", lambda *_, **__: [find_type(kind)])

    flat = choose_under_budget([tensor("x.weight", rows)], (), 10**9, threads=1)
    monkeypatch.setattr(types, "encode", unguided(types.encode))
    weighted = choose_under_budget([tensor("x.weight", rows, lambda: list(means))], (), 10**9, threads=1)

    rounded = gguf.quants.dequantize(gguf.quants.quantize(rows.astype(np.float32), find_type(kind)), find_type(kind))
    square = (rows.astype(np.float32) - rounded.reshape(rows.shape).astype(np.float64)) ** 2
    assert flat.error == pytest.approx(square.sum() / (rows**2).sum(), rel=1e-4)
    m = means[:, None]
    assert weighted.error == pytest.approx((m * square).sum() / (m * rows**2).sum(), rel=1e-4)
    assert weighted.error != pytest.approx(flat.error, rel=1e-3)


def unguided(encode: Any) -> Any:
    """Without the importance, so that numpy's kernels can follow."""
    return lambda rows, kind, name, importance: encode(rows, kind, name)


def test_which_types_a_tensor_may_have() -> None:
    """Blocks that fit the rows; the smallest only with an importance; none that only the newest llama.cpp reads."""
    narrow, wide = Entry("x.weight", (4, 96), F16), Entry("x.weight", (4, 512), F16)

    assert {"F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "MXFP4"} == {
        kind.name for kind in list_types(narrow, guided=True)
    }
    more = {kind.name for kind in list_types(wide, guided=True)} - {
        kind.name for kind in list_types(wide, guided=False)
    }
    assert {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"} == more
    assert (4 * 96 // 32 * 17, 4 * 96 * 2) == find_range([narrow], ())


def test_a_weight_that_is_not_finite_is_an_error() -> None:
    """Named, as when it is written."""
    rows = np.ones((4, 64))
    rows[0, 3] = np.nan
    with pytest.raises(CorruptWeightError, match=r"x\.weight"):
        choose_under_budget([tensor("x.weight", rows)], (), 10**9, threads=1)
