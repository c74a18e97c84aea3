"""Where a file runs: the devices a user can name, as settings of llama.cpp."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from moe2gguf.errors import HarnessError
from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.library import import_llama
from moe2gguf.llama.model import Setup
from moe2gguf.llama.offload import offload_devices

DEVICES: dict[str, dict[str, Any]] = {
    "cpu": {"n_gpu_layers": 0},
    "gpu": {"n_gpu_layers": -1},
    "gpu:experts-on-cpu": {"n_gpu_layers": -1, "experts_on_cpu": True},
}
"""Fields of `Setup` by name; `gpu` is whatever backend the installed llama.cpp has (CUDA, Metal, Vulkan).

There is one more kind of name, `rpc:HOST:PORT+HOST:PORT`: see `rpc_device`.
"""

_RPC = "rpc:"


def rpc_device(servers: Sequence[str]) -> str:
    """Return the name of the device that llama.cpp's RPC servers, each `host:port`, make up together."""
    return _RPC + "+".join(servers)


def reference_device(devices: Sequence[str]) -> str:
    """Return where the reference runs: the CPU, unless all that is asked for are RPC servers, which it may need too."""
    return devices[0] if devices and all(name.startswith(_RPC) for name in devices) else "cpu"


def placed(setup: Setup, device: str) -> Setup:
    """Return `setup` on a device of DEVICES or of `rpc_device`."""
    if device.startswith(_RPC):
        return replace(setup, n_gpu_layers=-1, rpc_servers=tuple(device.removeprefix(_RPC).split("+")))
    return replace(setup, **DEVICES[device])


def require_devices(devices: Iterable[str]) -> None:
    """Raise HarnessError for a name that is not in DEVICES, or for a device that llama.cpp does not have here."""
    wanted = list(devices)
    unknown = [name for name in wanted if name not in DEVICES and not name.startswith(_RPC)]
    if unknown:
        raise HarnessError(f"no such device: {', '.join(unknown)}; choose from {', '.join(DEVICES)}")
    setups = [setup for name in wanted if (setup := placed(Setup(), name)).n_gpu_layers]
    if setups:
        run_in_child(_require, setups, what="looking for the devices")


def _require(setups: Iterable[Setup]) -> None:
    lib = import_llama()
    for setup in setups:
        offload_devices(lib, setup.n_gpu_layers, setup.rpc_servers)
