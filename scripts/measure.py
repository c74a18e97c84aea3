"""Run a program and measure it from outside: wall time and peak memory. Standard library only."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import fail

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere


@dataclass(frozen=True)
class Run:
    """One run of one program: seconds from its start to its exit, its peak resident memory, and what it wrote.

    `processor_seconds` are its own and those of the children that it waited for, user and system.

    The peak is the kernel's own high-water mark (`ru_maxrss` from wait4) of the program or of its largest child
    that it waited for. It counts memory-mapped file pages while they are mapped. It can't be lower than the memory
    of the process that started the program, which is why the benchmarks use the standard library only.
    """

    seconds: float
    peak_bytes: int
    written_bytes: int = 0
    processor_seconds: float = 0.0


def run(command: Sequence[str | Path], log: Path) -> Run:
    """Run a program to its end with all its output in `log`; stops the benchmark when the program fails."""
    with log.open("wb") as output:
        begin = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begin
    process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it again
    if process.returncode != 0:
        print(log.read_text(errors="replace")[-2000:], file=sys.stderr)
        fail(f"{' '.join(map(str, command))} failed with status {process.returncode}")
    return Run(seconds, usage.ru_maxrss * RSS_UNIT, processor_seconds=usage.ru_utime + usage.ru_stime)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def write_json(path: Path, value: Any) -> None:
    """Write a result file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
