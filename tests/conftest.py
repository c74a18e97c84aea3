"""Settings for the whole test run: no network, quiet libraries, and the same hypothesis examples every time."""

import os
import signal

from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch's threads gain nothing on tiny matrices, and wait for each other in busy loops where another process has a core
os.environ.setdefault("OMP_NUM_THREADS", "1")

# llama.cpp's threads wait for each other in busy loops too: each of pytest-xdist's workers has a processor of its own
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processors[int(worker[2:]) % len(processors)]})

# a shell's background job starts with Ctrl-C ignored, and what it starts would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "gate",
    deadline=None,  # the machines that run the gate are shared and noisy
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))
