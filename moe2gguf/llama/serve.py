"""The child's side of `moe2gguf.llama.child`: one request on standard input, its answers on standard output."""

import os
import pickle
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from typing import Any

from moe2gguf.errors import HarnessError, Moe2GgufError


def serve() -> None:
    """Answer the one request on standard input; the entry point of the child process."""
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints goes to the log, not between the messages
    function, args, memory_limit, in_step = pickle.load(sys.stdin.buffer)  # noqa: S301 - written by our parent
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(answers,), daemon=True).start()
    if memory_limit is not None:
        _limit_memory(memory_limit)

    def send(kind: str, value: Any) -> None:
        channel.write(pickle.dumps((kind, value), protocol=5))  # whole or not at all
        channel.flush()

    try:
        answer = function(*args)
        if isinstance(answer, Generator):
            answer = _send_items(answer, send, answers.get if in_step else lambda: None)
        send("result", answer)
    except Moe2GgufError as error:
        send("error", (type(error), error.args, error.__dict__))
    except MemoryError:
        limit = "" if memory_limit is None else f" (limit {memory_limit / 2**20:.0f} MiB)"
        send("error", (HarnessError, (f"{function.__qualname__} ran out of memory{limit}: give it less work",), {}))
    except Exception:  # noqa: BLE001 - a defect: the parent raises it with this traceback
        send("error", (RuntimeError, (f"in the child process:\n{traceback.format_exc()}",), {}))
    sys.stderr.flush()
    os._exit(0)  # the answer is out: skip the destructors of native libraries


def _send_items(
    items: Generator[Any, Any, Any], send: Callable[[str, Any], None], wait_for_answer: Callable[[], Any]
) -> Any:
    answer = None
    while True:
        try:
            item = items.send(answer)
        except StopIteration as end:
            return end.value
        send("item", item)
        answer = wait_for_answer()


def _listen(answers: queue.SimpleQueue[Any]) -> None:
    """Keep the parent's answers; leave as soon as it is gone, however it went: standard input closes then."""
    try:
        while True:
            answers.put(pickle.load(sys.stdin.buffer))  # noqa: S301 - written by our parent
    finally:
        os._exit(1)


def _limit_memory(n_byte: int) -> None:
    if sys.platform == "linux":  # the parent refused elsewhere
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (n_byte, n_byte))
