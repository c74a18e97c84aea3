"""Whether the tests that need a GPU can run here, asked once."""

from __future__ import annotations

from functools import cache

from moe2gguf.errors import HarnessError
from moe2gguf.llama.devices import require_devices


@cache
def gpu_is_missing() -> str | None:
    """Why no GPU can be used, None if one can."""
    try:
        require_devices(["gpu"])
    except HarnessError as error:
        return str(error)
    return None
