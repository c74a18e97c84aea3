"""ggml's own quantization kernels, called in the library that llama-cpp-python installs.

Only `libggml-base` is opened, without importing the Python package: it knows the number formats and nothing of models.
The kernels are thread-safe and ctypes releases the interpreter while one runs, so rows quantize on all cores:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml.c#L8067

Some of its checks end the process instead of failing; everything they test is tested here first.
"""

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from numpy.typing import NDArray

from moe2gguf.errors import CorruptWeightError, HarnessError
from moe2gguf.gguf.file import BLOCK_SIZES, TensorType
from moe2gguf.gguf.ggml import declare

INSTALL = "pip install -U llama-cpp-python"

NEEDS_IMPORTANCE: tuple[TensorType, ...] = (GGMLType.IQ2_XXS, GGMLType.IQ2_XS, GGMLType.IQ1_S)
"""Without an importance matrix the kernel aborts the process:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml.c#L8059"""

IGNORES_IMPORTANCE = ("Q8_0", "NVFP4", "MXFP4", "Q2_0", "TQ2_0", "TQ1_0", "Q1_0")
"""Types to which the kernel gives the same bytes with and without one."""


def are_installed() -> bool:
    """Return whether the kernels can be called."""
    try:
        library()
    except HarnessError:
        return False
    return True


def build() -> str:
    """Return what tells this build of the library from others, which may round otherwise; "none" without one."""
    return f"{Path(library()._name).stat().st_size:,} bytes" if are_installed() else "none"


def require(kinds: Iterable[TensorType]) -> None:
    """Raise HarnessError unless the installed llama.cpp has a kernel for each of the block types `kinds`."""
    wanted = sorted(set(kinds))
    if not wanted:
        return
    names = ", ".join(kind.name for kind in wanted)
    try:
        lib = library()
    except HarnessError as error:
        raise HarnessError(f"{names}: quantized by llama.cpp's kernels, but {error}") from error
    missing = [kind.name for kind in wanted if not _knows(lib, kind)]
    if missing:
        raise HarnessError(f"{', '.join(missing)}: unknown to the installed llama.cpp; update it: {INSTALL}")


def quantize(
    rows: NDArray[np.float32], kind: TensorType, name: str, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Quantize finite `rows` (..., width) to blocks (bytes, one-dimensional); they may share an `importance` (width,).

    Rows of several experts need one call per expert when they have an importance: it belongs to one matrix. `name` is
    for the messages.

    Raises:
        HarnessError: no llama.cpp, or one without this kernel, or this kernel without the importance it needs.
        CorruptWeightError: a value is too large for the type's scales.
    """
    require([kind])
    if kind in NEEDS_IMPORTANCE and importance is None:
        raise HarnessError(f"{name}: {kind.name} needs an importance matrix")
    width = rows.shape[-1]
    n, n_bytes = BLOCK_SIZES[kind]
    if width % n or (importance is not None and importance.shape != (width,)):
        raise HarnessError(f"{name}: rows of {width} do not fit {kind.name}'s blocks of {n}, or their importance")
    rows = np.ascontiguousarray(rows, np.float32)
    blocks = np.empty(rows.size // n * n_bytes, np.uint8)
    if not rows.size:
        return blocks
    weight = None if importance is None else np.ascontiguousarray(importance, np.float32)
    lib = library()
    address = None if weight is None else weight.ctypes.data
    lib.ggml_quantize_chunk(kind, rows.ctypes.data, blocks.ctypes.data, 0, rows.size // width, width, address)
    if not lib.ggml_validate_row_data(kind, blocks.ctypes.data, blocks.nbytes):
        largest = float(np.abs(rows).max())
        raise CorruptWeightError(f"{name}: {largest:.6g} is too large for the scales of {kind.name}; use bf16 or f32")
    return blocks


def dequantize(blocks: NDArray[np.uint8], kind: TensorType) -> NDArray[np.float32]:
    """Decode the numbers (one-dimensional) that whole `blocks` of a block type stand for.

    Raises:
        HarnessError: no llama.cpp, or one that does not know the type.
    """
    require([kind])
    n, n_bytes = BLOCK_SIZES[kind]
    blocks = np.ascontiguousarray(blocks).reshape(-1)
    values = np.empty(blocks.size // n_bytes * n, np.float32)
    if values.size:
        library().ggml_get_type_traits(kind).contents.to_float(blocks.ctypes.data, values.ctypes.data, values.size)
    return values


@functools.cache
def library() -> ctypes.CDLL:
    """libggml-base, opened once. Raises HarnessError where there is none or it cannot be opened."""
    folder = _folder()
    path = next((folder / name for name in _list_file_names() if (folder / name).is_file()), None)
    if path is None:
        raise HarnessError(f"{folder} has no libggml-base: {INSTALL}")
    try:
        if sys.platform == "win32":
            os.add_dll_directory(str(folder))
        lib: ctypes.CDLL = declare(
            ctypes.CDLL(str(path)),
            "ggml_quantize_chunk",
            "ggml_validate_row_data",
            "ggml_type_name",
            "ggml_get_type_traits",
        )
    except (OSError, AttributeError) as error:
        raise HarnessError(f"{path} cannot be used ({error}): {INSTALL}") from error
    return lib


def _folder() -> Path:
    """Return where llama-cpp-python would look for its libraries, LLAMA_CPP_LIB_PATH included."""
    if override := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(override)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise HarnessError(f"llama-cpp-python is not installed: {INSTALL}")
    return Path(spec.origin).parent / "lib"


def _list_file_names() -> tuple[str, ...]:
    """Return the names that the library may have. The first is the one by which llama.cpp's own libraries load it.

    Wheels hold copies in the place of links, and a second copy would make its tables of numbers a second time.
    """
    if sys.platform == "win32":
        return ("ggml-base.dll", "libggml-base.dll")
    return ("libggml-base.so.0", "libggml-base.so", "libggml-base.0.dylib", "libggml-base.dylib")


def _knows(lib: ctypes.CDLL, kind: TensorType) -> bool:
    """Return whether the library means by this number the block type that we mean: same block, same name.

    A library older than the type has no entry for it and reads behind its table. So the sizes are compared first, and
    the name's address is followed only where they are right.
    """
    traits = lib.ggml_get_type_traits(kind).contents
    if (traits.blck_size, traits.type_size) != BLOCK_SIZES[kind]:
        return False
    return bool(traits.is_quantized) and bool(lib.ggml_type_name(kind).lower() == kind.name.lower().encode())
