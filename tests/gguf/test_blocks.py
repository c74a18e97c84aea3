"""moe2gguf.gguf.blocks: every block type is multiplied and cut exactly, judged by llama.cpp's and gguf's decoders."""

from typing import Any

import gguf
import numpy as np
import pytest

from moe2gguf.errors import CorruptWeightError
from moe2gguf.gguf import blocks, kernels, types
from moe2gguf.gguf.file import BLOCK_SIZES
from moe2gguf.gguf.finite import FIELDS

ROWS, WIDTH = 2, 512
UNKNOWN_TO_GGUF = ("Q1_0", "Q2_0")


def encoded(kind: Any) -> Any:
    """Rows of blocks (ROWS, row_bytes): random codes, which are weights in every type, and scales of many sizes."""
    n, size = BLOCK_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (ROWS * WIDTH // n, size), np.uint8)
    halves = (rng.standard_normal(len(raw)) * 10.0 ** rng.integers(-6, 1, len(raw))).astype("<f2")
    if kind.name == "MXFP4":
        raw[:, 0] = rng.integers(0, 160, len(raw))
    elif kind.name == "NVFP4":
        raw[:, :4] = rng.integers(8, 80, (len(raw), 4))
    elif kind.name == "IQ1_M":
        words, bits = raw.view("<u2"), halves.view("<u2")[:, None]
        words[:, -4:] = words[:, -4:] & 0xFFF | (bits >> np.array([0, 4, 8, 12]) & 0xF) << 12
    else:
        for _, at, _ in FIELDS[kind]:
            raw[:, at : at + 2] = halves[:, None].view(np.uint8)
    return raw.reshape(ROWS, -1)


def decoded(raw: Any, kind: Any) -> Any:
    pytest.importorskip("llama_cpp")
    return kernels.dequantize(np.ascontiguousarray(raw), kind).reshape(len(raw), -1)


@pytest.mark.parametrize("kind", types.BLOCKS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("factor", [2.0, 8.0, 16.0])
def test_a_power_of_two_multiplies_every_weight_exactly(kind: Any, factor: float) -> None:
    """Decoded by llama.cpp, and by the gguf package where it can: bit for bit the factor times the weights."""
    raw = encoded(kind)

    after = blocks.amplify(raw.reshape(-1, BLOCK_SIZES[kind][1]).copy(), kind, factor, "test").reshape(raw.shape)

    np.testing.assert_array_equal(decoded(raw, kind) * np.float32(factor), decoded(after, kind))
    assert decoded(raw, kind).any()
    if kind.name not in UNKNOWN_TO_GGUF:
        theirs = [gguf.quants.dequantize(bytes_, kind) for bytes_ in (raw, after)]
        np.testing.assert_array_equal(theirs[0] * np.float32(factor), theirs[1])


@pytest.mark.parametrize("kind", types.BLOCKS, ids=lambda kind: kind.name)
def test_dividing_back_gives_the_same_bytes(kind: Any) -> None:
    """Up and down again is the identity, so nothing else of a block was touched."""
    raw = encoded(kind).reshape(-1, BLOCK_SIZES[kind][1])

    up = blocks.amplify(raw.copy(), kind, 4.0, "test")

    assert not np.array_equal(raw, up)
    np.testing.assert_array_equal(raw, blocks.amplify(up, kind, 0.25, "test"))


@pytest.mark.parametrize("kind", types.BLOCKS, ids=lambda kind: kind.name)
def test_a_scale_that_does_not_fit_is_refused(kind: Any) -> None:
    """Overflow is an error that names tensor, type and the ways out; so is a factor that would round."""
    raw = encoded(kind).reshape(-1, BLOCK_SIZES[kind][1])

    def grow(times: Any) -> None:
        for _ in range(times):
            blocks.amplify(raw, kind, 256.0, "blk.0.ffn_down.weight")

    with pytest.raises(CorruptWeightError, match=rf"blk\.0.*{kind.name}.*--expert-scale"):
        grow(40)
    with pytest.raises(CorruptWeightError, match=r"blk\.0.*by 6 exactly"):
        blocks.amplify(raw, kind, 6.0, "blk.0.ffn_down.weight")


def test_bits_lost_below_the_smallest_number_are_noticed() -> None:
    """Dividing a scale into the subnormal range is refused where it drops a bit, and done where it does not."""
    kind = gguf.GGMLQuantizationType.Q4_0
    raw = np.zeros((2, 18), np.uint8)
    raw[:, :2] = np.array([[2.0**-14], [2.0**-23]], "<f2").view(np.uint8)

    assert blocks.amplify(raw.copy(), kind, 0.5, "t")[:, :2].view("<f2").tolist() == [[2.0**-15], [2.0**-24]]
    with pytest.raises(CorruptWeightError):
        blocks.amplify(raw, kind, 0.25, "t")


@pytest.mark.parametrize("kind", types.BLOCKS, ids=lambda kind: kind.name)
def test_zero_bytes_are_zero_weights(kind: Any) -> None:
    """What pads an expert: a block of zero bytes decodes to zeros in every type."""
    size = BLOCK_SIZES[kind][1]

    assert not decoded(np.zeros((1, 4 * size), np.uint8), kind).any()


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"])
def test_slices_are_columns_of_the_decoded_matrix(name: str) -> None:
    """Cut between blocks, reordered, padded and amplified: the same as doing it to the numbers."""
    kind = types.find_type(name)
    raw = encoded(kind)
    order = np.concatenate([np.arange(64, 128), np.arange(448, 480), np.full(32, -1)])[None]
    chosen = blocks.find_block_order(order, 32)

    (part,) = blocks.slice_blocks(raw, kind, chosen, [4.0], "t")  # type: ignore[arg-type]

    expected = np.where(order < 0, 0, decoded(raw, kind)[:, np.maximum(order[0], 0)]) * 4
    np.testing.assert_array_equal(expected, decoded(part, kind))
    np.testing.assert_array_equal(encoded(kind), raw)  # the source is left alone


@pytest.mark.parametrize(
    "neurons",
    [
        range(1, 33),  # starts inside a block
        [*range(31), 33],  # takes one from elsewhere
        [*range(31), -1],  # a zero neuron inside a block
        [-1, *range(1, 32)],
        range(31, -1, -1),  # turned around
        range(40),  # not whole blocks
    ],
)
def test_neurons_that_leave_their_block_are_noticed(neurons: Any) -> None:
    """Such an order has no block order: its weights have to be quantized again."""
    order = np.array([list(neurons)])

    assert blocks.find_block_order(order, 32) is None
    assert blocks.find_block_order(order, 1) is not None
