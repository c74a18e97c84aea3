"""Where a file runs: the devices a user can name, as settings of llama.cpp, and how llama.cpp is given them.

llama-cpp-python has no functions for GPUs, RPC servers and the place of single tensors; they are called in ggml, which
it links, in a child process only.
"""

import ctypes
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

from moe2gguf.errors import HarnessError
from moe2gguf.gguf.ggml import declare
from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.library import import_llama


@dataclass(frozen=True)
class Setup:
    """How a file is run. The defaults are the ones for measuring: exact and repeatable before fast.

    n_expert_used  experts per token (k); None: the file's own count; "all": every expert (k = n)
    n_context      tokens of a window: positions in the key/value cache
    n_batch        tokens computed at once; logits of at most so many positions are in memory
    n_threads      None: all processors this process may use
    n_gpu_layers   0: CPU only; negative: all layers
    rpc_servers    addresses (host:port) of llama.cpp RPC servers that take the place of this machine's GPUs
    on_cpu         weights that stay in the processor's memory, whatever `n_gpu_layers` is; see `PLACEMENTS`
    kv_type        element type of the key/value cache
    flash_attention, repack   llama.cpp's faster attention, and weights rearranged at load for the processor
    """

    n_expert_used: int | Literal["all"] | None = None
    n_context: int = 512
    n_batch: int = 128
    n_threads: int | None = None
    n_gpu_layers: int = 0
    rpc_servers: tuple[str, ...] = ()
    on_cpu: Literal["experts", "ffn"] | None = None
    kv_type: Literal["f32", "f16"] = "f32"
    flash_attention: bool = False
    repack: bool = False


DEVICES: dict[str, dict[str, Any]] = {
    "cpu": {"n_gpu_layers": 0},
    "gpu": {"n_gpu_layers": -1},
    "gpu:experts-on-cpu": {"n_gpu_layers": -1, "on_cpu": "experts"},
    "gpu:ffn-on-cpu": {"n_gpu_layers": -1, "on_cpu": "ffn"},
}
"""Fields of `Setup` by name; `gpu` is whatever backend the installed llama.cpp has (CUDA, Metal, Vulkan).

There is one more kind of name, `rpc:HOST:PORT+HOST:PORT`: see `name_rpc_device`.
"""

_RPC = "rpc:"


def name_rpc_device(servers: Sequence[str]) -> str:
    """Return the name of the device that llama.cpp's RPC servers, each `host:port`, make up together."""
    return _RPC + "+".join(servers)


def choose_reference_device(devices: Sequence[str]) -> str:
    """Return where the reference runs: the CPU, unless all that is asked for are RPC servers, which it may need too."""
    return devices[0] if devices and all(name.startswith(_RPC) for name in devices) else "cpu"


def place_on_device(setup: Setup, device: str) -> Setup:
    """Return `setup` on a device of DEVICES or of `name_rpc_device`."""
    if device.startswith(_RPC):
        return replace(setup, n_gpu_layers=-1, rpc_servers=tuple(device.removeprefix(_RPC).split("+")))
    return replace(setup, **DEVICES[device])


def require_devices(devices: Iterable[str]) -> None:
    """Raise HarnessError for a name that is not in DEVICES, or for a device that llama.cpp does not have here."""
    wanted = list(devices)
    unknown = [name for name in wanted if name not in DEVICES and not name.startswith(_RPC)]
    if unknown:
        raise HarnessError(f"no such device: {', '.join(unknown)}; choose from {', '.join(DEVICES)}")
    setups = [setup for name in wanted if (setup := place_on_device(Setup(), name)).n_gpu_layers]
    if setups:
        run_in_child(_require_offload, setups, what="looking for the devices")


def _require_offload(setups: Iterable[Setup]) -> None:
    lib = import_llama()
    for setup in setups:
        list_offload_devices(lib, setup.n_gpu_layers, setup.rpc_servers)


_GPU_TYPES = (
    1,
    2,
)  # ggml_backend_dev_type: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/include/ggml-backend.h#L134
_CONNECT_SECONDS = 5.0


def list_offload_devices(lib: ModuleType, n_gpu_layers: int, rpc_servers: Sequence[str]) -> Any:
    """Return the C list of devices that compute besides the processor, to outlive the load; None: all GPUs found here.

    The list of no layers is empty: without it a build with a GPU computes large batches there all the same.

    Raises HarnessError if what is asked for is not there.
    """
    if n_gpu_layers == 0:
        return (ctypes.c_void_p * 1)(None)
    if rpc_servers:
        return _list_rpc_devices(lib, rpc_servers)
    _require_gpu(lib)
    return None


class _Placement(ctypes.Structure):
    """One rule of llama_model_tensor_buft_override: tensors whose name matches a regular expression, and their memory.

    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/include/llama.h#L314
    """

    _fields_ = (("pattern", ctypes.c_char_p), ("memory", ctypes.c_void_p))


PLACEMENTS = {
    None: [],
    "experts": [rb"\.ffn_(up|down|gate|gate_up)_(ch|)exps"],
    "ffn": [rb"\.ffn_(up|down|gate|gate_up)(_exps|_chexps|_shexp)?\.(weight|bias)"],
}
"""Names of tensors that stay in the processor's memory: the experts, as llama.cpp's --cpu-moe has it, or all MLPs."""


def list_placements(lib: ModuleType, on_cpu: str | None) -> Any:
    """Return a C array of placement rules for `Setup.on_cpu`, to outlive the load."""
    cpu_memory = declare(lib._lib, "ggml_backend_cpu_buffer_type").ggml_backend_cpu_buffer_type()
    rules = [_Placement(pattern, cpu_memory) for pattern in PLACEMENTS[on_cpu]]
    return (_Placement * (len(rules) + 1))(*rules, _Placement(None, None))


def _require_gpu(lib: ModuleType) -> None:
    """Raise HarnessError unless the installed llama.cpp can compute on a GPU of this machine.

    llama_supports_gpu_offload loads the backends, but returns true for any build with RPC, so the devices are listed:
    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama.cpp#L99-L109
    """
    lib.llama_supports_gpu_offload()
    ggml = declare(lib._lib, "ggml_backend_dev_by_type")
    if not any(ggml.ggml_backend_dev_by_type(kind) for kind in _GPU_TYPES):
        raise HarnessError(
            "the installed llama.cpp has no GPU support, or sees no GPU: run vendor/install cuda|vulkan|metal "
            "(see vendor/README.md), or leave the device gpu out"
        )


def _list_rpc_devices(lib: ModuleType, servers: Sequence[str]) -> Any:
    """Return a C list of all devices that RPC servers (host:port) offer, closed by a null pointer.

    llama-cpp-python has no parameter for it; the steps are those of llama.cpp's own programs:
    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/common/arg.cpp#L1166-L1185
    """
    if not lib.llama_supports_rpc():
        raise HarnessError(
            "the installed llama.cpp has no RPC: run vendor/install rpc (see vendor/README.md), or leave --rpc out"
        )
    names = ("reg_by_name", "reg_get_proc_address", "reg_dev_count", "reg_dev_get")
    ggml = declare(lib._lib, *(f"ggml_backend_{name}" for name in names))
    backend = ggml.ggml_backend_reg_by_name(b"RPC")
    address = ggml.ggml_backend_reg_get_proc_address(backend, b"ggml_backend_rpc_add_server")
    add = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)
    found = []
    for server in servers:
        _require_answer(server)
        group = add(server.encode())
        if not group:
            raise HarnessError(f"the RPC server {server} offers no device: start it with one")
        found += [ggml.ggml_backend_reg_dev_get(group, i) for i in range(ggml.ggml_backend_reg_dev_count(group))]
    return (ctypes.c_void_p * (len(found) + 1))(*found, None)


def _require_answer(server: str) -> None:
    """Raise HarnessError unless something listens at host:port; llama.cpp would end the process."""
    host, _, port = server.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise HarnessError(f"no RPC server answers at {server!r} ({error}): give host:port of a running one") from error
