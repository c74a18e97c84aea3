"""moe2gguf.llama.library: what llama.cpp says is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe2gguf.errors import HarnessError
from moe2gguf.llama.library import import_llama
from moe2gguf.llama.model import read_facts


def test_what_llama_cpp_says_is_told_whoever_set_its_log(tmp_path: Path) -> None:
    """Another user of the library in the same process may have taken the log away."""
    lib = import_llama()
    silence = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silence, None)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF")

    with pytest.raises(HarnessError, match="cannot load it; it says"):
        read_facts(tmp_path / "cut.gguf")
