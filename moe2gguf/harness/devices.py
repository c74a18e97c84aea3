"""Where a file runs: the devices a user can name, as settings of llama.cpp."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from moe2gguf.errors import HarnessError
from moe2gguf.harness.child import run_in_child
from moe2gguf.harness.library import import_llama, require_gpu
from moe2gguf.harness.llama import Setup

DEVICES = {
    "cpu": {"n_gpu_layers": 0},
    "gpu": {"n_gpu_layers": -1},
    "gpu:experts-on-cpu": {"n_gpu_layers": -1, "experts_on_cpu": True},
}
"""Fields of `Setup` by name; `gpu` is whatever backend the installed llama.cpp has (CUDA, Metal, Vulkan)."""


def placed(setup: Setup, device: str) -> Setup:
    """Return `setup` on a device of DEVICES."""
    return replace(setup, **DEVICES[device])  # type: ignore[arg-type]


def require_devices(devices: Iterable[str]) -> None:
    """Raise HarnessError for a name that is not in DEVICES, or for a GPU that llama.cpp does not have here."""
    wanted = list(devices)
    unknown = [name for name in wanted if name not in DEVICES]
    if unknown:
        raise HarnessError(f"no such device: {', '.join(unknown)}; choose from {', '.join(DEVICES)}")
    if any(DEVICES[name]["n_gpu_layers"] for name in wanted):
        run_in_child(_require_gpu, what="looking for a GPU")


def _require_gpu() -> None:
    require_gpu(import_llama())
