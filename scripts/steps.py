"""What the benchmarks share that are made of commands of moe2gguf, one after the other. Standard library only."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

from environment import ROOT, fail

MOE2GGUF = ["-c", "from moe2gguf.cli import main; main()"]


def moe2gguf(python: Path, *arguments: object) -> str:
    """Run a command of moe2gguf by this Python; returns what it printed, or stops the benchmark."""
    done = subprocess.run([python, *MOE2GGUF, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        fail(f"moe2gguf {arguments[0]} failed")
    return done.stdout


def same_settings(work: Path, settings: Mapping[str, object]) -> None:
    """Make the folder, or go on in it; stops the benchmark where it holds a run with other settings."""
    work.mkdir(parents=True, exist_ok=True)
    note = work / "settings.json"
    if note.exists() and json.loads(note.read_text()) != settings:
        fail(f"{work} holds a run with other settings; remove it or choose another --work")
    note.write_text(json.dumps(settings))


def smollm2(python: Path) -> Path:
    """The folder that scripts/smollm2 makes."""
    done = subprocess.run([python, ROOT / "scripts" / "smollm2"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        fail("scripts/smollm2 could not make the model; name one with --model")
    return Path(done.stdout.strip())
