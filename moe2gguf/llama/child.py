"""Functions run in a process of their own: what crashes there is an error here.

llama.cpp ends the whole process when a file or a setting breaks one of its assertions, so nothing of it runs in
the process of the user. The child is a fresh interpreter, or on Linux a fork of one that has imported llama.cpp's
bindings and nothing of the user's (see `moe2gguf.llama.warm`); the user's `__main__` is not imported again. Requests
and answers are pickles over its own two pipes, never files; `moe2gguf.llama.serve` is the other end of them.
"""

import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from typing import IO, Any, TypeVar

from moe2gguf.errors import CrashError, HarnessError
from moe2gguf.llama.warm import start_warm

T = TypeVar("T")

# -I keeps the current folder and PYTHON* variables out until the parent's own search path is in place.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.stdin.buffer.readline())['path']; "
    "from moe2gguf.llama.serve import serve; serve()"
)
_KEPT_LINES = 200
_SHOWN_LINES = 6

_ADVICE_BY_LOG = {
    "GGML_ASSERT(obj_new)": "more experts per token than llama.cpp's graph budget holds: lower n_expert_used",
    "hash_size": "more experts per token than llama.cpp's graph budget holds: lower n_expert_used",
    "bad_alloc": "it ran out of memory: use a smaller file, context or batch, or a larger memory limit",
    "failed to allocate": "it ran out of memory: use a smaller file, context or batch, or a larger memory limit",
    "No module named 'moe2gguf'": "the child cannot import moe2gguf: install it with pip",
}
_ADVICE_BY_SIGNAL = {
    "SIGABRT": "llama.cpp refused the file or the settings: check the file with `moe2gguf verify`",
    "SIGSEGV": "a defect in llama.cpp or a damaged file: check the file with `moe2gguf verify`",
    "SIGBUS": "the file shrank while it was read, or the disk failed: check the file with `moe2gguf verify`",
    "SIGILL": "llama.cpp was built for another processor: build llama-cpp-python on this machine",
    "SIGKILL": "most often the system ran out of memory: use a smaller file, context or batch",
}


def run_in_child(
    function: Callable[..., T],
    *args: Any,
    what: str | None = None,
    timeout: float | None = None,
    memory_limit: int | None = None,
) -> T:
    """Call `function(*args)` in a fresh process and return its result.

    `function` is importable by module and name; arguments and result can be pickled. If it is a generator
    function, its items are dropped and its return value is the result.

    `what` names the work in messages; `timeout` is in seconds, for the whole call; `memory_limit` is in bytes and
    counts the private memory of the child (memory-mapped weights are not in it); Linux only.

    Raises the Moe2GgufError the function raised, HarnessError when the process died, took too long or ran out of
    memory, RuntimeError with the child's traceback for every other exception, which is a defect of ours.
    """
    stream = _converse(function, args, what, timeout, memory_limit, whole=True)
    while True:
        try:
            next(stream)
        except StopIteration as end:
            result: T = end.value
            return result


def stream_from_child(
    function: Callable[..., Iterator[T]],
    *args: Any,
    what: str | None = None,
    timeout: float | None = None,
    memory_limit: int | None = None,
) -> Generator[T, None, Any]:
    """Run the generator function `function(*args)` in a fresh process and yield its items as they come.

    The child runs at most a few items ahead. The generator's return value is this one's. Closing the iterator
    ends the child. `timeout` is the longest wait for one item, in seconds; all else as in `run_in_child`.
    """
    return (yield from _converse(function, args, what, timeout, memory_limit))


def converse_with_child(
    function: Callable[..., Generator[T, Any, Any]],
    *args: Any,
    what: str | None = None,
    timeout: float | None = None,
    memory_limit: int | None = None,
) -> Generator[T, Any, Any]:
    """Run the generator function `function(*args)` in a fresh process, in step with this generator.

    What is sent into this generator is what the child's `yield` returns there; until then the child waits. All else as
    in `stream_from_child`.
    """
    return (yield from _converse(function, args, what, timeout, memory_limit, in_step=True))


def _converse(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    what: str | None,
    timeout: float | None,
    memory_limit: int | None,
    *,
    whole: bool = False,
    in_step: bool = False,
) -> Generator[Any, Any, Any]:
    """Yield the items of a child; `timeout` is for each of them or the `whole`, `in_step` it waits for an answer."""
    if function.__module__ == "__main__":
        raise ValueError(f"{function.__qualname__} must live in an importable module to run in a child process")
    if memory_limit is not None and sys.platform != "linux":
        raise HarnessError(f"a memory limit needs Linux, this is {sys.platform}: run without it")
    began = time.monotonic()
    child = _Child(what or function.__qualname__, memory_limit)
    try:
        child.begin((function, args, memory_limit, in_step))
        while True:
            try:
                began = began if whole else time.monotonic()
                kind, value = child.receive(None if timeout is None else began + timeout)
            except queue.Empty:
                raise HarnessError(
                    f"{child.what}: no answer within {timeout:g} s, the process was stopped; "
                    "allow more time or give it less work"
                ) from None
            if kind == "result":
                return value
            if kind == "error":
                raise value
            if kind == "end":
                raise child.death()
            answer = yield value
            if in_step:
                child.send(answer)
    finally:
        child.end()


class _Child:
    """One child process and the two threads that listen to it."""

    def __init__(self, what: str, memory_limit: int | None) -> None:
        self.what = what
        self.memory_limit = memory_limit
        self.environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        warm = start_warm(self.environment) if memory_limit is None else None  # a fork has memory of its server's
        self.process = warm or _start_fresh(self.environment)
        self.inbox: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=4)
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.threads = [
            threading.Thread(target=_listen, args=(self.process.stdout, self.inbox), daemon=True),
            threading.Thread(target=_keep_lines, args=(self.process.stderr, self.lines), daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def begin(self, request: Any) -> None:
        """Hand over what a fork does not inherit, then the request; the pipe stays open as our sign of life."""
        first = {"path": sys.path, "environment": self.environment, "folder": _current_folder()}
        self._write(json.dumps(first).encode() + b"\n" + pickle.dumps(request))

    def send(self, answer: Any) -> None:
        """Answer the item that was received last."""
        self._write(pickle.dumps(answer))

    def _write(self, data: bytes) -> None:
        stdin = self.process.stdin
        if stdin is not None:
            with suppress(BrokenPipeError):  # it died already: the next receive says so
                stdin.write(data)
                stdin.flush()

    def receive(self, deadline: float | None) -> tuple[str, Any]:
        """Return the next message; raises queue.Empty at the deadline."""
        if deadline is None:
            return self.inbox.get()
        return self.inbox.get(timeout=max(0.0, deadline - time.monotonic()))

    def death(self) -> CrashError:
        """Return the error that says how the process ended and what it said last."""
        code = self.process.wait()
        self.threads[1].join()
        log = [line for line in self.lines if line.strip()]
        how, advice = _exit_words(code, log)
        if self.memory_limit is not None:
            advice += f" (its memory limit was {self.memory_limit / 2**20:.0f} MiB)"
        said = [f"  | {line}" for line in log[-_SHOWN_LINES:]] or ["  | (nothing)"]
        message = "\n".join([f"{self.what}: the process {how}; it said last:", *said, advice])
        return CrashError(message, signal=max(0, -code))

    def end(self) -> None:
        """End the process, whatever it does, and the threads with it."""
        self.process.kill()
        while self.threads[0].is_alive():  # it may wait for room in the inbox
            with suppress(queue.Empty):
                self.inbox.get(timeout=0.01)
        self.process.wait()
        self.threads[1].join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


def _current_folder() -> str | None:
    """Where relative paths start; None where that folder has been removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _start_fresh(environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a new interpreter, with a session of its own: Ctrl-C reaches the parent, which then ends the child."""
    return subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-I", "-c", _BOOT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )


def _exit_words(code: int, log: list[str]) -> tuple[str, str]:
    """Return how a process ended, in words, and what to do about it."""
    name = signal.Signals(-code).name if code < 0 else ""
    how = f"was ended by {name}" if name else f"ended with exit code {code:#x}" if code > 255 else f"ended with {code}"
    for pattern, advice in _ADVICE_BY_LOG.items():
        if any(pattern in line for line in log):
            return how, advice
    return how, _ADVICE_BY_SIGNAL.get(name, "check the file with `moe2gguf verify`")


def _listen(pipe: IO[bytes], inbox: queue.Queue[tuple[str, Any]]) -> None:
    try:
        while True:
            kind, value = pickle.load(pipe)  # noqa: S301 - the pipe of a process that we started
            inbox.put((kind, _rebuild_error(*value) if kind == "error" else value))
    except (EOFError, pickle.UnpicklingError, OSError, ValueError):
        inbox.put(("end", None))
    except Exception as error:  # noqa: BLE001 - a defect: an answer that cannot be rebuilt here
        inbox.put(("error", RuntimeError(f"an answer of the child process cannot be read: {error!r}")))


def _rebuild_error(kind: type[Exception], args: tuple[Any, ...], fields: dict[str, Any]) -> Exception:
    """Rebuild an error without its __init__, which may take other arguments than the message."""
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(fields)
    return error


def _keep_lines(pipe: IO[bytes], lines: deque[str]) -> None:
    for line in pipe:
        lines.append(line.decode("utf-8", "replace").rstrip())
