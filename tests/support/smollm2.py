"""The real model of the tests marked `real`: SmolLM2-135M-Instruct as a Hugging Face folder."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "smollm2"


@functools.cache
def _made() -> tuple[Path | None, str]:
    """The folder, or None and the reason why there is none."""
    if given := os.environ.get("MOE2GGUF_SMOLLM2"):
        folder = Path(given)
        return (
            (folder, "")
            if (folder / "config.json").is_file()
            else (None, f"MOE2GGUF_SMOLLM2={given} has no config.json")
        )
    return _printed()


@functools.cache
def _printed(*arguments: str) -> tuple[Path | None, str]:
    """The path that the script prints, or None and the reason why it does not."""
    made = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return None, (made.stderr.strip() or "scripts/smollm2 failed").splitlines()[-1]
    return Path(made.stdout.strip()), ""


def smollm2_gguf() -> Path:
    """The Q4_1 GGUF file that the folder is made of; skips the test, with the reason, where it cannot be had."""
    path, reason = _printed("--gguf")
    if path is None:
        pytest.skip(f"no SmolLM2 file: {reason}")
    return path


def smollm2_folder() -> Path:
    """The folder, f32 weights; made once per machine, or the one that MOE2GGUF_SMOLLM2 names.

    Skips the test, with the reason, where the package cannot be had.
    """
    folder, reason = _made()
    if folder is None:
        pytest.skip(f"no SmolLM2 weights: {reason}")
    return folder
