"""moe2gguf.gguf.kernels: ggml's quantizers without llama-cpp-python's Python, and installations without them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType

from moe2gguf.errors import CorruptWeightError, HarnessError
from moe2gguf.gguf import kernels, types
from moe2gguf.gguf.file import BLOCK_SIZES

RNG = np.random.default_rng(0)
NORMAL = RNG.standard_normal((32, 512)).astype(np.float32)
STRUCTURED = {
    "normal": NORMAL,
    "zeros": np.zeros((4, 512), np.float32),
    "ties": (RNG.integers(-8, 9, (32, 512)) / 8).astype(np.float32),
    "heavy tails": RNG.standard_t(2, (32, 512)).astype(np.float32),
    "many scales": (NORMAL * 10.0 ** RNG.integers(-8, 3, (32, 1))).astype(np.float32),
    "one per row": np.eye(16, 512, dtype=np.float32),
    "negative": -np.abs(NORMAL),
}
UNGUIDED = [kind for kind in types.BLOCKS if kind not in kernels.NEEDS_IMPORTANCE]
DECODABLE = [kind for kind in types.BLOCKS if kind in gguf.quants._type_traits]


@pytest.mark.parametrize("kind", sorted(types.NUMPY), ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", STRUCTURED.values(), ids=STRUCTURED)
def test_installations_with_and_without_llama_cpp_write_the_same_bytes(kind: Any, rows: Any) -> None:
    """The gguf package's quantizers stand in for ggml's, bit for bit."""
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(rows, kind).reshape(-1)

    assert np.array_equal(expected, kernels.quantize(rows, kind, "t"))


@pytest.mark.parametrize("kind", types.BLOCKS, ids=lambda kind: kind.name)
def test_every_type_decodes_to_about_the_same(kind: Any) -> None:
    """Each type's root mean square error of normal numbers is below what its bits allow; more bits, less error."""
    weight = np.ones(512, np.float32)

    blocks = kernels.quantize(NORMAL, kind, "t", weight)

    assert types.n_bytes(NORMAL.shape, kind) == blocks.size
    error = np.sqrt(np.mean((kernels.dequantize(blocks, kind).reshape(NORMAL.shape) - NORMAL) ** 2))
    bits = types.bits_per_weight(kind)
    assert error < 2.0 ** (1.4 - bits) + (0.25 if bits < 3 else 0)


@pytest.mark.parametrize("kind", DECODABLE, ids=lambda kind: kind.name)
def test_decoding_equals_the_gguf_packages(kind: Any) -> None:
    """Two implementations, one meaning of the bits."""
    blocks = kernels.quantize(NORMAL, kind, "t", np.ones(512, np.float32))

    expected = gguf.quants.dequantize(blocks.reshape(-1, BLOCK_SIZES[kind][1]), kind).reshape(-1)

    assert np.abs(expected - kernels.dequantize(blocks, kind)).max() < 1e-6


@pytest.mark.parametrize("kind", UNGUIDED, ids=lambda kind: kind.name)
def test_rows_do_not_depend_on_each_other(kind: Any) -> None:
    """So that threads may split a tensor anywhere; zero neurons and odd rows do not abort."""
    rows = np.concatenate([array[:3] for array in STRUCTURED.values()])

    whole = kernels.quantize(rows, kind, "t")

    assert whole.tobytes() == b"".join(kernels.quantize(row[None], kind, "t").tobytes() for row in rows)


def test_an_importance_changes_the_bytes_and_must_fit() -> None:
    """It reaches the kernel; one of another width is refused, as is a type that needs one without."""
    importance = np.linspace(0.1, 10, 512, dtype=np.float32) ** 2
    plain = kernels.quantize(NORMAL, GGMLType.Q4_K, "t")

    assert not np.array_equal(plain, kernels.quantize(NORMAL, GGMLType.Q4_K, "t", importance))
    with pytest.raises(HarnessError, match="do not fit"):
        kernels.quantize(NORMAL, GGMLType.Q4_K, "t", importance[:256])
    for kind in kernels.NEEDS_IMPORTANCE:
        with pytest.raises(HarnessError, match=rf"t: {kind.name} needs an importance"):
            kernels.quantize(NORMAL, kind, "t")


@pytest.mark.parametrize("kind", types.BLOCKS)
def test_which_types_ignore_an_importance(kind: Any) -> None:
    """The bytes differ for all but those that are listed."""
    rng = np.random.default_rng(0)
    rows, importance = rng.standard_normal((8, 256)).astype(np.float32), rng.integers(1, 1000, 256).astype(np.float32)

    weighed, alike = (bytes(types.encode(rows, kind, "x", one)) for one in (importance, np.ones(256, np.float32)))

    assert (weighed == alike) == (kind.name in kernels.IGNORES_IMPORTANCE)


def test_what_would_abort_the_process_is_an_error() -> None:
    """Rows of another width than whole blocks; an empty array is no rows."""
    with pytest.raises(HarnessError, match="rows of 100 do not fit Q4_K's blocks of 256"):
        kernels.quantize(np.zeros((2, 100), np.float32), GGMLType.Q4_K, "t")
    assert 0 == kernels.quantize(np.zeros((0, 256), np.float32), GGMLType.Q4_K, "t").size


class Renamed(int):
    """The number of a type that the library calls differently, or cuts differently."""

    name = "Q9_9"


@pytest.mark.parametrize("number", [GGMLType.Q8_0, GGMLType.Q8_1])
def test_a_library_that_means_another_type_is_noticed(number: Any) -> None:
    """Other llama.cpp builds may lack a type or use its number otherwise."""
    kernels.require([GGMLType.Q8_0])

    with pytest.raises(HarnessError, match=r"Q9_9: unknown to the installed llama\.cpp; update it"):
        kernels.require([Renamed(number)])


def test_a_library_with_other_blocks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gguf package and llama.cpp must agree on a block's bytes, or the file would be shifted."""
    monkeypatch.setitem(BLOCK_SIZES, GGMLType.Q8_0, (32, 36))

    with pytest.raises(HarnessError, match="Q8_0: unknown to the installed"):
        kernels.quantize(NORMAL, GGMLType.Q8_0, "t")


def test_a_value_beyond_a_scale_is_named() -> None:
    """1e8 / 127 does not fit Q8_0's half-precision scale: an error, never an infinity in the file."""
    rows = NORMAL.copy()
    rows[3, 5] = 1e8

    with pytest.raises(CorruptWeightError, match=r"blk\.0\.x: 1e\+08 is too large for the scales of Q8_0"):
        kernels.quantize(rows, GGMLType.Q8_0, "blk.0.x")


WITHOUT = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "llama_cpp" else found(name, *rest)
import numpy as np
from gguf import GGMLQuantizationType as T
from moe2gguf.errors import HarnessError
from moe2gguf.gguf import types
rows = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
types.require_kernels([T.F16, T.Q8_0, T.Q4_0])
sys.stdout.write(bytes(types.encode(rows, T.Q4_0, "t")).hex() + "\\n")
for call in (lambda: types.require_kernels([T.F16, T.Q4_K, T.Q8_0]), lambda: types.encode(rows, T.Q4_K, "t")):
    try:
        call()
    except HarnessError as error:
        print(error)
assert "llama_cpp" not in sys.modules
"""


def test_without_llama_cpp_the_common_types_work_and_the_others_say_what_to_install() -> None:
    """In an interpreter that cannot find the package."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    data, *errors = done.stdout.splitlines()

    rows = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    assert kernels.quantize(rows, GGMLType.Q4_0, "t").tobytes().hex() == data
    message = (
        "Q4_K: quantized by llama.cpp's kernels, but llama-cpp-python is not installed: pip install -U llama-cpp-python"
    )
    assert [message] * 2 == errors


def test_a_folder_without_the_library_is_named(tmp_path: Path) -> None:
    """LLAMA_CPP_LIB_PATH is obeyed as llama-cpp-python obeys it; the Python package is not imported for a kernel."""
    code = "from moe2gguf.gguf import kernels; kernels.library(); import sys; assert 'llama_cpp' not in sys.modules"
    assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode

    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LLAMA_CPP_LIB_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert f"HarnessError: {tmp_path} has no libggml-base" in done.stderr
