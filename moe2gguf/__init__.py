"""moe2gguf: a dense LLaMA-family model becomes a sparse Mixtral-architecture GGUF file.

Every command is a function here, and takes paths as strings too; each is documented where it is defined. They are
imported when the first one is asked for, and neither torch nor llama.cpp before a function needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe2gguf.api import *  # noqa: F403 - what `api` lists


def __getattr__(name: str) -> Any:
    """Return what `api` exports under this name, or its list of names."""
    api = import_module("moe2gguf.api")
    if name != "__all__" and name not in api.__all__:
        raise AttributeError(f"module 'moe2gguf' has no attribute {name!r}")
    return getattr(api, name)
