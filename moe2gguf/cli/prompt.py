"""A line that a person types, and signals that are seen while the program waits for it."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

AGAIN = 0.1
"""Seconds after which a signal that has had no effect is sent once more."""


def read_line(prompt: str) -> str:
    """Return the next line of standard input. Raises EOFError at its end, and what the handlers of signals raise."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - what input() then uses
    with _insist_on_signals():
        return input(prompt)


@contextlib.contextmanager
def _insist_on_signals() -> Iterator[None]:
    """Send SIGTERM and SIGINT to this thread again until the block ends.

    Python's handler runs when a wait is interrupted. A signal that comes between the prompt and the wait interrupts
    nothing, and would be seen with the next key only.
    """
    if not hasattr(signal, "pthread_kill"):  # Windows
        yield
        return
    news, wake = os.pipe()
    os.set_blocking(wake, False)
    waiting, ended = threading.get_ident(), threading.Event()

    def repeat() -> None:
        number = int.from_bytes(os.read(news, 1))
        while number in (signal.SIGTERM, signal.SIGINT) and not ended.wait(AGAIN):
            signal.pthread_kill(waiting, number)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(wake)  # ends the thread's wait
        thread.join()
        os.close(news)
