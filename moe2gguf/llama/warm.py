"""Processes that start warm: one server has imported llama.cpp's bindings and us, and every child is a fork of it.

A fresh interpreter spends 0.3 to 0.5 seconds on imports before it does anything; a fork has them. The server itself
never loads a model, starts no threads and answers only its parent, over a socket that nobody else holds; it ends when
that socket closes. Linux only: elsewhere a library that was loaded before a fork may not work after it.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import IO, NoReturn

from moe2gguf.llama.serve import serve

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); import moe2gguf.api; "
    "from moe2gguf.llama.warm import serve_forks; serve_forks(int(sys.argv[1]))"
)
_READ_AT_LOADING = ("CUDA_", "GGML_", "HIP_", "KMP_", "LD_", "LLAMA_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON", "VK_")
"""Variables that native libraries read when they are loaded: with others, another server is needed."""

_N_PIPE = 4  # of a request: standard input, output and error of the child, and where its process number and end go


class WarmProcess:
    """A fork of the warm server, with the part of `subprocess.Popen` that is needed here.

    `pid`, the pipes `stdin`, `stdout`, `stderr`, and how it ended: `wait` gives the exit code, or the negative number
    of the signal.

    Raises OSError where the server is gone.
    """

    def __init__(self, control: socket.socket) -> None:
        ours, theirs = _pipes()
        try:
            socket.send_fds(control, [b"\0"], theirs)
        except OSError:
            for descriptor in ours:
                os.close(descriptor)
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        self.stdin: IO[bytes] = os.fdopen(ours[0], "wb")
        self.stdout: IO[bytes] = os.fdopen(ours[1], "rb")
        self.stderr: IO[bytes] = os.fdopen(ours[2], "rb")
        self._news: IO[bytes] = os.fdopen(ours[3], "rb", buffering=0)
        self._code: int | None = None
        pid = self._next_number()
        if pid is None:
            raise OSError("the server of warm processes is gone")
        self.pid = pid

    def kill(self) -> None:
        """End the process, unless it has ended."""
        if self._code is None and not select.select([self._news], [], [], 0)[0]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end; the exit code, or minus the signal."""
        if self._code is None:
            status = self._next_number()
            self._code = -signal.SIGKILL if status is None else os.waitstatus_to_exitcode(status)
            self._news.close()
        return self._code

    def _next_number(self) -> int | None:
        """What the server has to say: first the process number, then how it ended; None where the server is gone."""
        data = self._news.read(4) or b""
        return struct.unpack("i", data)[0] if len(data) == 4 else None


def _pipes() -> tuple[list[int], list[int]]:
    """Our ends and the child's ends of its standard streams and of the news about it."""
    pairs = [os.pipe() for _ in range(_N_PIPE)]
    ours = [pairs[0][1], *(pair[0] for pair in pairs[1:])]
    return ours, [pairs[0][0], *(pair[1] for pair in pairs[1:])]


class _Server:
    """The process that forks, for this process and for what `key` says."""

    def __init__(self, key: tuple[list[str], dict[str, str]], environment: Mapping[str, str]) -> None:
        self.key, self.owner = key, os.getpid()
        self.control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-I", "-c", _BOOT, str(theirs.fileno()), json.dumps(key[0])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C reaches the parent, which then ends the children
            )

    def close(self) -> None:
        """Let the server end; its children live on."""
        self.control.close()
        if self.owner == os.getpid():
            self.process.wait()


_server: _Server | None = None
_lock = threading.Lock()


@atexit.register
def _close_server() -> None:
    if _server is not None:
        _server.close()


def start_warm(environment: Mapping[str, str]) -> WarmProcess | None:
    """Start a fork of the server, which is started first where there is none; None where that does not work."""
    global _server  # noqa: PLW0603 - one server per process, started when it is first needed
    if sys.platform != "linux":
        return None
    loading = {name: value for name, value in environment.items() if name.startswith(_READ_AT_LOADING)}
    key = (list(sys.path), loading)
    with _lock:
        for _ in range(2):  # the second time with a new server
            if _server is None or _server.key != key or _server.owner != os.getpid():
                if _server is not None:
                    _server.close()
                _server = _Server(key, environment)
            with contextlib.suppress(OSError):
                return WarmProcess(_server.control)
            _server.close()
            _server = None
    return None


# --- the server's side ---


def serve_forks(descriptor: int) -> None:
    """Fork for every request on the socket `descriptor`, and report the end of every child; returns at its end."""
    with contextlib.suppress(ImportError):
        import llama_cpp  # noqa: F401 - what takes the time
    control, news = socket.socket(fileno=descriptor), dict[int, int]()
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    sources: list[socket.socket | int] = [control, ended]
    while True:
        ready, _, _ = select.select(sources, [], [])
        if ended in ready:
            os.read(ended, 512)
            _report_ends(news)
        if control in ready:
            message, pipes, _, _ = socket.recv_fds(control, 1, _N_PIPE)
            if not message:
                return
            pid = os.fork()
            if pid == 0:
                _become_child(pipes, [control.detach(), ended, wake, *news.values()])
            for pipe in pipes[:-1]:
                os.close(pipe)
            news[pid] = pipes[-1]
            _tell(pipes[-1], pid)


def _become_child(pipes: list[int], foreign: list[int]) -> NoReturn:
    """In the fork: its own session and streams, nothing of the server's; then do the work, and never return."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for number, pipe in enumerate(pipes[:-1]):
            os.dup2(pipe, number)
        for descriptor in [*pipes, *foreign]:
            os.close(descriptor)
        first = json.loads(sys.stdin.buffer.readline())
        sys.path[:] = first["path"]
        os.environ.clear()
        os.environ.update(first["environment"])
        if first["folder"] is not None:
            os.chdir(first["folder"])
        serve()
    finally:
        os._exit(1)


def _report_ends(news: dict[int, int]) -> None:
    while news:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        _tell(news[pid], status)
        os.close(news.pop(pid))


def _tell(pipe: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(pipe, struct.pack("i", number))
