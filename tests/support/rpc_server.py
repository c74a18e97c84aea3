"""A llama.cpp RPC server on this machine's processor, from the installed library: `python rpc_server.py HOST:PORT`.

What llama.cpp's own program does, which llama-cpp-python does not contain:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/tools/rpc/rpc-server.cpp
"""

from __future__ import annotations

import ctypes
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

CPU = 0  # ggml_backend_dev_type


def serve(endpoint: str) -> None:
    """Serve until the process is ended."""
    from llama_cpp import llama_cpp

    llama_cpp.llama_supports_gpu_offload()  # loads the backends
    ggml = llama_cpp._lib
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    devices = (ctypes.c_void_p * 1)(ggml.ggml_backend_dev_by_type(CPU))
    arguments = (ctypes.c_char_p(endpoint.encode()), None, ctypes.c_size_t(1), ctypes.c_size_t(1), devices)
    ggml.ggml_backend_rpc_start_server(*arguments)


@contextmanager
def servers(n: int) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Run n servers on free ports of 127.0.0.1; yields address -> process once all of them listen."""
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(n)]
    running = {address: subprocess.Popen([sys.executable, __file__, address]) for address in addresses}
    try:
        for address, process in running.items():
            wait_for(address, process)
        yield running
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def wait_for(address: str, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Return when the server listens; raises TimeoutError, or RuntimeError where it ended."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the RPC server ended with {process.returncode}")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError(address)


if __name__ == "__main__":
    serve(sys.argv[1])
