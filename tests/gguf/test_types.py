"""moe2gguf.gguf.types: bytes of every type, against the gguf package, and numbers that must be refused."""

from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType

from moe2gguf.errors import CorruptWeightError
from moe2gguf.gguf import types
from moe2gguf.gguf.writer import OutputTensor, check_blocks

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((3, 256)).astype(np.float32)


DECODABLE = {name: kind for name, kind in types.NAMES.items() if kind in types.FLOATS or kind in types.NUMPY}


@pytest.mark.parametrize("kind", DECODABLE.values(), ids=DECODABLE)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_type_has_the_planned_size_and_decodes_to_about_the_same(kind: Any, dtype: Any) -> None:
    """The gguf package, which did not encode floats, decodes what we encoded."""
    array = WEIGHT.astype(dtype)

    data = np.frombuffer(types.encode(array, kind, "t"), np.uint8)

    assert types.n_bytes(array.shape, kind) == data.size
    typed = data.view(np.float32 if kind is GGMLType.F32 else np.float16) if kind in (0, 1) else data
    decoded = gguf.quants.dequantize(typed.reshape(3, -1), kind).astype(np.float32)
    error = np.abs(decoded - array.astype(np.float32)).mean()
    assert error < (0.75 if "TQ" in kind.name else 0.12 if "4" in kind.name else 0.06)  # of a standard normal


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_float_kept_as_it_is_keeps_its_bits(dtype: Any) -> None:
    """Same type in and out: the very bytes, negative zero and subnormals included."""
    array = np.array([-0.0, 1e-7, 3.1, -65504.0], dtype)

    assert array.tobytes() == bytes(types.encode(array, types.find_float(array.dtype), "t"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", [GGMLType.F32, GGMLType.Q8_0], ids=["f32", "q8_0"])
def test_nan_and_infinity_are_refused_with_their_place(bad: Any, dtype: Any, kind: Any) -> None:
    """The error names the tensor and the first bad element, also where a block type would hide it."""
    array = WEIGHT.astype(dtype)
    array[1, 7] = bad

    tensor = OutputTensor("blk.3.ffn_up", array.shape, kind, blocks=lambda: iter([array[:1], array[1:]]))

    with pytest.raises(CorruptWeightError, match=r"blk\.3\.ffn_up: .*\[1, 7\]"):
        list(check_blocks(tensor))


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65519.0, True), (65520.0, False), (1e5, False)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_f16_overflow_is_an_error_that_offers_bf16(value: float, fits: bool, dtype: Any) -> None:
    """65504 is the largest f16; 65519 still rounds to it, 65520 to infinity."""
    array = np.array([[value]], dtype).astype(np.float32)
    if fits:
        types.encode(array, GGMLType.F16, "t")
    else:
        with pytest.raises(CorruptWeightError, match=r"t: .*65504.*bf16"):
            types.encode(array, GGMLType.F16, "t")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_is_finite_agrees_with_numpy_on_every_kind_of_number(dtype: Any) -> None:
    """Largest and smallest numbers are finite, empty arrays too."""
    info = ml_dtypes.finfo(dtype)
    good = np.array([0, -0.0, info.max, info.min, info.tiny, info.smallest_subnormal], dtype)

    assert types.is_finite(good)
    assert types.is_finite(good[:0])
    for bad in (np.nan, np.inf, -np.inf):
        assert not types.is_finite(np.append(good, np.array(bad, dtype)))


def test_blocks_that_are_ready_are_kept() -> None:
    """Bytes in, the same bytes out: what `quantize` copies is not touched."""
    blocks = RNG.integers(0, 256, (2, 34), np.uint8)

    assert blocks.tobytes() == bytes(types.encode(blocks, GGMLType.Q8_0, "t"))


def test_sizes_equal_the_gguf_packages() -> None:
    """Block sizes and bytes come from one table, the gguf package's."""
    assert 3 * 256 // 32 * 34 == types.n_bytes((3, 256), GGMLType.Q8_0)
    assert 32 == types.block_size(GGMLType.Q4_0)
    assert 4.5 == types.bits_per_weight(GGMLType.Q4_0)
    assert set(types.NAMES.values()) == set(types.FILE_TYPES)


def test_every_finite_half_is_widened_as_numpy_does() -> None:
    """All 63,488 of them, bit for bit, subnormals and both zeros included; other types pass through."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(2, -1)  # type: ignore[assignment]

    assert halves.astype(np.float32).tobytes() == types.widen(halves).tobytes()
    assert halves[:, ::3].astype(np.float32).tobytes() == types.widen(halves[:, ::3]).tobytes()
    for dtype in (np.float32, ml_dtypes.bfloat16):
        assert np.array_equal(np.ones(3, np.float32), types.widen(np.ones(3, dtype)))


@pytest.mark.parametrize(
    ("number", "name"),
    [(0, "F32"), (1, "F16"), (15, "Q4_K_M"), (41, "Q2_0"), (1024, None), (9999, None), ([15], None), (None, None)],
)
def test_file_types_are_named_as_users_know_them(number: object, name: str | None) -> None:
    """As llama.cpp numbers them; what is no file type has no name."""
    assert name == types.name_file_type(number)
