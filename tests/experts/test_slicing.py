"""moe2gguf.experts.slicing: every neuron in exactly one expert, nothing lost, padding exactly zero."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe2gguf.experts.layer import LayerExperts
from moe2gguf.experts.slicing import (
    PADDING,
    PIECE,
    contiguous_order,
    expert_width,
    slice_columns,
    slice_rows,
)
from moe2gguf.spec import Slicing

WIDTHS = st.integers(1, 300)
EXPERTS = st.integers(1, 40)
ALIGNS = st.sampled_from([1, 3, 32, 256])


@given(d_ff=WIDTHS, n_expert=EXPERTS, align=ALIGNS)
def test_every_neuron_lies_in_exactly_one_expert(d_ff: Any, n_expert: Any, align: Any) -> None:
    """Whatever the numbers, the order holds each neuron once; the rest is padding."""
    order = contiguous_order(d_ff, n_expert, align)

    assert list(range(d_ff)) == sorted(order[order != PADDING])


@given(d_ff=WIDTHS, n_expert=EXPERTS, align=ALIGNS)
def test_experts_are_equally_wide_aligned_and_no_wider_than_needed(d_ff: Any, n_expert: Any, align: Any) -> None:
    """The width is the smallest multiple of `align` that holds ceil(d_ff / n_expert) neurons."""
    width = expert_width(d_ff, n_expert, align)

    assert (n_expert, width) == contiguous_order(d_ff, n_expert, align).shape
    assert width % align == 0
    assert width >= d_ff / n_expert > width - align - 1


@given(d_ff=WIDTHS, n_expert=EXPERTS, align=ALIGNS)
def test_real_neurons_are_spread_evenly(d_ff: Any, n_expert: Any, align: Any) -> None:
    """No expert has more than one neuron more than another, so alignment never leaves whole experts empty."""
    counts = (contiguous_order(d_ff, n_expert, align) != PADDING).sum(axis=1)

    assert counts.max() - counts.min() <= 1


@given(d_ff=WIDTHS, n_expert=EXPERTS, align=ALIGNS, seed=st.integers(0, 99))
def test_concatenated_experts_restore_the_matrices(d_ff: Any, n_expert: Any, align: Any, seed: Any) -> None:
    """Rows (gate, up) and columns (down) come back in order once padding, which is exactly zero, is dropped."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((d_ff, 5)).astype(np.float32)
    order = contiguous_order(d_ff, n_expert, align)
    real = order.ravel() != PADDING

    rows = np.concatenate(list(slice_rows(weight, order)))
    columns = np.concatenate(list(slice_columns(weight.T, order, np.full(n_expert, 4.0))), axis=1)

    assert np.array_equal(weight, rows[real])
    assert np.array_equal(weight.T * 4, columns[:, real])
    assert not rows[~real].any()
    assert not columns[:, ~real].any()


def test_four_neurons_by_hand() -> None:
    """Two experts of a four-neuron MLP, amplified by two: the experts' mean is the dense output."""
    gate, up, down = np.eye(4, dtype=np.float32), np.ones((4, 4), np.float32), np.arange(8.0, dtype=np.float32)
    down = down.reshape(2, 4)  # type: ignore[assignment]
    order = contiguous_order(4, 2)
    x = np.array([1.0, -2.0, 3.0, 0.5], np.float32)

    def mlp(g: Any, u: Any, d: Any) -> Any:
        z = g @ x
        return d @ (z / (1 + np.exp(-z)) * (u @ x))

    parts = zip(slice_rows(gate, order), slice_rows(up, order), slice_columns(down, order, [2.0, 2.0]), strict=True)

    np.testing.assert_allclose(mlp(gate, up, down), np.mean([mlp(*part) for part in parts], axis=0), rtol=1e-6)


def test_a_scattered_order_is_gathered() -> None:
    """An order that is no run of neurons works the same, padding in the middle included."""
    weight = np.arange(8.0, dtype=np.float32).reshape(4, 2)
    order = np.array([[3, PADDING, 0], [1, 2, PADDING]])

    first, second = slice_rows(weight, order)

    assert [[6, 7], [0, 0], [0, 1]] == first.tolist()
    assert [[2, 3], [4, 5], [0, 0]] == second.tolist()
    assert [[6, 0, 0], [7, 0, 1]] == next(slice_columns(weight.T, order, [1.0, 1.0])).tolist()


def test_an_overflow_of_the_amplification_becomes_an_infinity_not_a_warning() -> None:
    """f16 times 16 can overflow; the writer sees the infinity and refuses it."""
    weight = np.full((1, 2), 60000, np.float16)

    (only,) = slice_columns(weight, contiguous_order(2, 1), [2.0])

    assert np.isinf(only).all()


def test_an_infinity_stays_one() -> None:
    """However small the factor."""
    (only,) = slice_columns(np.array([[1.0, np.inf]], np.float16), contiguous_order(2, 1), [0.25])

    assert [[0.25, np.inf]] == only.tolist()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_power_of_two_amplifies_exactly(dtype: str) -> None:
    """Dividing again gives the same bits, subnormals included."""
    weight = np.array([[1e-7, 0.1, -3.3, 6e-8]], dtype)

    (only,) = slice_columns(weight, contiguous_order(4, 1), [8.0])

    assert np.array_equal(weight, only / weight.dtype.type(8))


@pytest.mark.parametrize("dtype", ["float16", "float32", ml_dtypes.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_pieces_are_the_whole(dtype: Any, factor: float) -> None:
    """More elements than a piece has: the same numbers in the same order, each product rounded once."""
    d_ff, d_model = 96, PIECE // 40
    weight = np.random.default_rng(0).standard_normal((d_ff, d_model)).astype(dtype)
    for order in (contiguous_order(d_ff, 2), np.random.default_rng(1).permutation(d_ff).reshape(2, -1)):
        rows, columns = [*slice_rows(weight, order)], [*slice_columns(weight.T, order, [factor, factor])]

        assert len(rows) > 2
        assert len(columns) > 2
        assert np.array_equal(weight[order.ravel()], np.concatenate(rows))
        expected = np.concatenate([weight.T[:, one] for one in order]).astype(np.float64) * factor
        assert np.array_equal(expected.astype(dtype), np.concatenate(columns))


def test_the_zero_router_is_zero_and_f32() -> None:
    """Every expert weighs the same."""
    router = LayerExperts.plain(6, 5, Slicing(3, 3, 2)).router

    assert ((3, 5), np.float32, 0.0) == (router.shape, router.dtype, np.abs(router).max())
