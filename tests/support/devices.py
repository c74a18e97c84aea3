"""What this build of llama.cpp can do."""

from __future__ import annotations

from moe2gguf.llama.library import import_llama


def has_rpc() -> bool:
    return bool(import_llama().llama_supports_rpc())
