"""Where llama.cpp may compute besides the processor: GPUs, RPC servers, which tensors stay. In a child process only.

llama-cpp-python has no functions for these; they are called in ggml, which it links.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from moe2gguf.errors import HarnessError

_GPU_TYPES = (
    1,
    2,
)  # ggml_backend_dev_type: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/include/ggml-backend.h#L134
_CONNECT_SECONDS = 5.0


def offload_devices(lib: ModuleType, n_gpu_layers: int, rpc_servers: Sequence[str]) -> Any:
    """Return the C list of devices that compute besides the processor, to outlive the load; None: all GPUs found here.

    The list of no layers is empty: without it a build with a GPU computes large batches there all the same.

    Raises HarnessError if what is asked for is not there.
    """
    if n_gpu_layers == 0:
        return (ctypes.c_void_p * 1)(None)
    if rpc_servers:
        return _rpc_devices(lib, rpc_servers)
    _require_gpu(lib)
    return None


class _Placement(ctypes.Structure):
    """One rule of llama_model_tensor_buft_override: tensors whose name matches a regular expression, and their memory.

    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/include/llama.h#L314
    """

    _fields_ = (("pattern", ctypes.c_char_p), ("memory", ctypes.c_void_p))


def cpu_experts(lib: ModuleType) -> Any:
    """Return a C array of placement rules: expert tensors in the processor's memory, as llama.cpp's --cpu-moe does."""
    cpu_memory = _function(lib, "ggml_backend_cpu_buffer_type")
    return (_Placement * 2)(
        _Placement(rb"\.ffn_(up|down|gate|gate_up)_(ch|)exps", cpu_memory()), _Placement(None, None)
    )


def _require_gpu(lib: ModuleType) -> None:
    """Raise HarnessError unless the installed llama.cpp can compute on a GPU of this machine.

    llama_supports_gpu_offload loads the backends, but says yes to any build with RPC, so the devices are asked:
    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama.cpp#L99-L109
    """
    lib.llama_supports_gpu_offload()
    by_type = _function(lib, "ggml_backend_dev_by_type", ctypes.c_int)
    if not any(by_type(kind) for kind in _GPU_TYPES):
        raise HarnessError(
            "the installed llama.cpp has no GPU support, or sees no GPU: run vendor/install cuda|vulkan|metal "
            "(see vendor/README.md), or leave the device gpu out"
        )


def _rpc_devices(lib: ModuleType, servers: Sequence[str]) -> Any:
    """Return a C list of all devices that RPC servers (host:port) offer, closed by a null pointer.

    llama-cpp-python has no parameter for it; the steps are those of llama.cpp's own programs:
    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/common/arg.cpp#L1166-L1185
    """
    if not lib.llama_supports_rpc():
        raise HarnessError(
            "the installed llama.cpp has no RPC: run vendor/install rpc (see vendor/README.md), or leave --rpc out"
        )
    backend = _function(lib, "ggml_backend_reg_by_name", ctypes.c_char_p)(b"RPC")
    find = _function(lib, "ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_char_p)
    add = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(find(backend, b"ggml_backend_rpc_add_server"))
    count = _function(lib, "ggml_backend_reg_dev_count", ctypes.c_void_p, result=ctypes.c_size_t)
    device = _function(lib, "ggml_backend_reg_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    found = []
    for server in servers:
        _require_answer(server)
        group = add(server.encode())
        if not group:
            raise HarnessError(f"the RPC server {server} offers no device: start it with one")
        found += [device(group, i) for i in range(count(group))]
    return (ctypes.c_void_p * (len(found) + 1))(*found, None)


def _require_answer(server: str) -> None:
    """Raise HarnessError unless something listens at host:port; llama.cpp would end the process."""
    host, _, port = server.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise HarnessError(f"no RPC server answers at {server!r} ({error}): give host:port of a running one") from error


def _function(lib: ModuleType, name: str, *arguments: Any, result: Any = ctypes.c_void_p) -> Any:
    """Return a function of ggml with its types, which ctypes cannot know."""
    function = getattr(lib._lib, name)
    function.argtypes, function.restype = arguments, result
    return function
