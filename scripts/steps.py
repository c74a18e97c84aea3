"""What the benchmarks share that are made of commands of moe2gguf, one after the other. Standard library only."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

from environment import ROOT, fail

CUT_TEXT = """
import sys
from pathlib import Path
from moe2gguf.experts.text import read_text
first, rest, *given = map(Path, sys.argv[1:])
text = read_text(given[0] if given else None).text
n = int(0.7 * len(text))
first.write_text(text[:n], encoding="utf-8")
rest.write_text(text[n:], encoding="utf-8")
"""
MOE2GGUF = ["-c", "from moe2gguf.cli import main; main()"]


def moe2gguf(python: Path, *arguments: object) -> str:
    """Run a command of moe2gguf by this Python; returns what it printed, or stops the benchmark."""
    done = subprocess.run([python, *MOE2GGUF, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        fail(f"moe2gguf {arguments[0]} failed")
    return done.stdout


def cut_text(python: Path, text: Path | None, first: Path, rest: Path) -> None:
    """Write the first 70 % of a text and the rest of it, unless they are there; None is moe2gguf's own text."""
    if not rest.exists():
        given = [] if text is None else [text]
        subprocess.run([python, "-c", CUT_TEXT, first, rest, *given], check=True)


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
