"""What the benchmarks share: programs to measure side by side, run in turn. Standard library only."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from environment import cache_folder, fail
from measure import Run, run


@dataclass(frozen=True)
class Leg:
    """One program to measure: what it is called in the table, its command, and the leg it is compared with."""

    name: str
    command: list[str | Path]
    peer: str | None = None


def side_by_side(what: str, about: str | None, *, size_gb: float, peer: str) -> argparse.ArgumentParser:
    """The options of `scripts/bench WHAT`; `peer` is what --no-peer leaves out."""
    found = argparse.ArgumentParser(
        prog=f"scripts/bench {what}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "--size-gb", type=float, default=size_gb, help="bf16 weights in GB, at least (default: %(default)s)"
    )
    found.add_argument("--repeats", type=int, default=3, help="runs of every leg (default: 3)")
    found.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    found.add_argument("--no-peer", action="store_true", help=f"leave {peer} out (it needs an environment with torch)")
    found.add_argument(
        "--work", type=Path, default=cache_folder() / "bench", metavar="DIR",
        help="where the checkpoint is made, and kept for the next run (default: the user's cache folder)",
    )  # fmt: skip
    return found


def measure(legs: Sequence[Leg], inputs: Sequence[Path], output: Path, repeats: int) -> dict[str, list[Run]]:
    """Run every leg `repeats` times, interleaved; each repeat starts one leg later than the one before.

    Every leg writes `output`, a file or a folder. Before it the `inputs` are read once and free memory is touched;
    after it, outside its time, its output is removed and everything flushed.
    """
    runs: dict[str, list[Run]] = {leg.name: [] for leg in legs}
    log = output.with_suffix(".log")
    remove(output)
    for repeat in range(repeats):
        first = repeat % len(legs)
        for leg in [*legs[first:], *legs[:first]]:
            warm(inputs)
            touch(2 * sum(path.stat().st_size for path in inputs))
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


def touch(n_bytes: int) -> None:
    """Use so much memory for a moment, in a process of its own.

    A virtual machine gives free memory back to its host and pays for every page it takes again, up to several times
    what it costs to write the page; which leg pays would be chance.
    """
    code = f"import mmap\nm = mmap.mmap(-1, {max(n_bytes, 1)})\nfor i in range(0, len(m), 4096): m[i] = 1"
    subprocess.run([sys.executable, "-c", code], check=True)


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
