"""quality: ours and the rivals at 75 % and 50 % of the MLP, same model, same tokens, same run.

Contiguous slices with a zero router, random groups with least squares, EMoE, ExpertWeaver's rule, FLAP (uniform and
standard), a static choice of neurons with and without our refit, ours with and without it, and CMoE: 16 experts each.
The first 70 % of the text calibrate, windows of the rest are scored: in llama.cpp, but for CMoE's router, which only
PyTorch can run. Sources and what differs: rivals.py. The full run takes hours on two cores, --quick minutes.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Sequence
from pathlib import Path

from environment import ROOT, cache_folder, python_with
from steps import smollm2

NEEDED = ("moe2gguf", "torch", "transformers", "llama_cpp")
QUICK = ["--tokens", "2048", "--windows", "2"]


def main(arguments: Sequence[str]) -> None:
    """Find a Python with all packages and the model, then start quality.py."""
    options, rest = parse(arguments)
    python = python_with(NEEDED, extra="calibrate", name="quality")
    model = options.model or smollm2(python)
    command = [python, ROOT / "scripts" / "experiments" / "quality.py", "--model", model, "--work", options.work]
    if options.text:
        rest += ["--text", str(options.text)]
    quick = QUICK if options.quick else []
    raise SystemExit(subprocess.run([*command, *quick, *rest], check=False).returncode)


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of `scripts/bench quality`; those of quality.py are handed on."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a dense checkpoint (default: SmolLM2-135M)")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="text to calibrate and score on (default: the program's own)"
    )
    parser.add_argument("--quick", action="store_true", help="2048 tokens and 2 windows: whether it runs, no result")
    parser.add_argument(
        "--work", type=Path, default=cache_folder() / "bench-quality", metavar="DIR",
        help="where files are made, one at a time (default: the user's cache folder)",
    )  # fmt: skip
    handed_on = {
        "--tokens": "calibration tokens (default: 16384)",
        "--windows": "windows of 512 tokens to score (default: 16)",
        "--used": "counts of 16 experts (default: 12,8)",
        "--shared": "rows of ours with other numbers of always-on experts, such as 6,10",
        "--only": "only methods whose name this regular expression finds",
        "--threads": "threads (default: 2)",
        "--json": "write all figures to this file",
    }
    for name, text in handed_on.items():
        parser.add_argument(name, help=text)
    options = parser.parse_args(arguments)
    given = [(name, getattr(options, name.removeprefix("--").replace("-", "_"))) for name in handed_on]
    return options, [part for name, value in given if value is not None for part in (name, value)]
