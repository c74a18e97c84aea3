"""What the benchmarks share: programs to measure side by side, run in turn. Standard library only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from environment import fail
from measure import Run, run


@dataclass(frozen=True)
class Leg:
    """One program to measure: what it is called in the table, its command, and the leg it is compared with."""

    name: str
    command: list[str | Path]
    peer: str | None = None


def measure(legs: Sequence[Leg], inputs: Sequence[Path], output: Path, repeats: int) -> dict[str, list[Run]]:
    """Run every leg `repeats` times, interleaved; each repeat starts one leg later than the one before.

    Every leg writes `output`, a file or a folder. Before it the `inputs` are read once; after it, outside its time, its
    output is removed and everything flushed.
    """
    runs: dict[str, list[Run]] = {leg.name: [] for leg in legs}
    log = output.with_suffix(".log")
    remove(output)
    for repeat in range(repeats):
        first = repeat % len(legs)
        for leg in [*legs[first:], *legs[:first]]:
            warm(inputs)
            done = run(leg.command, log)
            if not output.exists():
                fail(f"{leg.name} wrote nothing; its output is in {log}")
            done = replace(done, written_bytes=size(output))
            remove(output)
            os.sync()
            runs[leg.name].append(done)
            print(
                f"  {repeat + 1}/{repeats} {leg.name}: {done.seconds:.2f} s, {done.peak_bytes / 1e6:.0f} MB", flush=True
            )
    return runs


def warm(paths: Sequence[Path]) -> None:
    """Read every file once."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


def remove(output: Path) -> None:
    """Remove a leg's file or folder."""
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)


def size(output: Path) -> int:
    """Bytes of a leg's file, or of all files in its folder."""
    return sum(path.stat().st_size for path in ([output] if output.is_file() else output.iterdir()))


def goal(text: str, shares: Sequence[float]) -> str:
    """One line on a goal: the worst leg's share of what is allowed."""
    if not shares:
        return f"- {text}: not measured"
    return f"- {text}: {'reached' if max(shares) <= 1 else 'MISSED'} (worst leg at {max(shares):.0%} of the limit)"
