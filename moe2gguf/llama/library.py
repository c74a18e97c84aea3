"""llama.cpp as a library: imported when first needed, its log kept, its files opened. Used in a child process only."""

import errno
import os
import sys
from collections import deque
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from moe2gguf.errors import HarnessError

_WARN = 3  # ggml_log_level: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/include/ggml.h#L652
_CONT = 5
_INSTALL = "pip install -U llama-cpp-python"
_MISSING = f"llama-cpp-python is not installed: {_INSTALL}"
_log: deque[str] = deque(maxlen=20)
_callbacks: list[Any] = []  # llama.cpp keeps a bare pointer to the function: it must outlive every call


def require_llama() -> None:
    """Raise HarnessError if the binding is missing; nothing is imported."""
    if find_spec("llama_cpp") is None:
        raise HarnessError(_MISSING)


def import_llama() -> ModuleType:
    """Import the low-level binding and silence its log. Raises HarnessError if it is missing or broken."""
    try:
        from llama_cpp import llama_cpp
    except ModuleNotFoundError as error:
        broken = f"llama-cpp-python is broken ({error}): {_INSTALL}"
        raise HarnessError(_MISSING if error.name == "llama_cpp" else broken) from error
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise MemoryError from error
        raise HarnessError(f"llama-cpp-python is broken ({error}): {_INSTALL}") from error
    if not _callbacks:
        _callbacks.append(llama_cpp.llama_log_callback(_keep_line))
        llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_callbacks[0], None)  # each time: another user of the library may have set its own
    module: ModuleType = llama_cpp
    return module


def load_model(lib: ModuleType, path: Path, params: Any) -> int:
    """Load a file with llama_model_params; the caller frees it. Raises HarnessError if llama.cpp refuses it."""
    if not path.is_file():
        raise HarnessError(f"{path} is not a file: name a GGUF file")
    _log.clear()
    model: int | None = lib.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise HarnessError(f"{path}: llama.cpp cannot load it{quote_last_lines()}")
    return model


def make_int_overrides(lib: ModuleType, values: dict[str, int]) -> Any:
    """Return a C array of integer overrides, closed by an entry with an empty key."""
    array = (lib.llama_model_kv_override * (len(values) + 1))()
    for entry, (key, value) in zip(array, values.items(), strict=False):
        entry.tag = lib.LLAMA_KV_OVERRIDE_TYPE_INT
        entry.key = key.encode()
        entry.value.val_i64 = value
    return array


def _keep_line(level: int, text: bytes, _user_data: Any) -> None:
    """Keep warnings and errors, and pass them on to standard error, where they survive a crash."""
    if _WARN <= level < _CONT:  # a continued line is a progress bar or a part of something we did not keep
        line = text.decode("utf-8", "replace").rstrip("\n")
        _log.append(line)
        print(line, file=sys.stderr, flush=True)


def quote_last_lines() -> str:
    """Return the last warnings and errors as the end of a message, or nothing."""
    lines = [line for line in _log if line.strip()][-5:]
    return "".join(["; it says:", *(f"\n  | {line}" for line in lines)]) if lines else ""
