"""What to do where llama.cpp dies of weights that it rearranged for the processor when it loaded them.

Its kernels for rearranged weights (AMX tiles above all) have ended processes that run the same file without them, so a
run that is ended by one of these signals is tried once more with the weights as they are in the file.
"""

import signal
from dataclasses import replace

from moe2gguf.errors import CrashError
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.machine import name_processor

_SIGNALS = (signal.SIGSEGV, signal.SIGILL)


def leave_weights_alone(setup: Setup, crash: CrashError) -> Setup | None:
    """The settings to try again with, or None where the weights were not rearranged or something else happened."""
    return replace(setup, repack=False) if setup.repack and crash.signal in _SIGNALS else None


def explain_retry(crash: CrashError) -> str:
    """A sentence for the user of a run that was tried again."""
    name = signal.Signals(crash.signal).name
    return (
        f"llama.cpp was ended by {name} with weights rearranged for this processor ({name_processor()}); "
        "they run as they are in the file, which is slower"
    )
