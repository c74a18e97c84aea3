"""Every reader of foreign files, against files that hypothesis makes wrong: read or refused, never more.

In the gate for 12 seconds, with the same seeds every time. For longer, with new ones: scripts/fuzz --minutes N (or
MOE2GGUF_FUZZ_MINUTES=N).
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import fuzzing
import pytest
from fuzzing import TARGETS

MINUTES = os.environ.get("MOE2GGUF_FUZZ_MINUTES")
SECONDS = float(MINUTES or 0.2) * 60 / len(TARGETS)
SEED = int(os.environ.get("MOE2GGUF_FUZZ_SEED", secrets.randbelow(2**31) if MINUTES else 0))

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's RLIMIT_AS and /proc"),
    pytest.mark.timeout(SECONDS + 300),
]


@pytest.mark.parametrize("target", TARGETS)
def test_no_file_does_harm(target: Any, tmp_path: Path) -> None:
    """No crash, hang, large allocation or path outside the folder, and no exception but our errors."""
    command = [sys.executable, fuzzing.__file__, target, str(SECONDS), str(SEED)]

    done = subprocess.run(
        [*command, tmp_path / "model"], capture_output=True, text=True, check=False, timeout=SECONDS + 240
    )

    what = f"seed {SEED}, exit code {done.returncode}; the files are in {tmp_path / 'model'}\n"
    assert done.returncode == 0, what + done.stdout[-2000:] + done.stderr[-8000:]
    print(done.stdout)
