"""types: what every type that quantize offers costs in quality, in a dense file and in one with experts.

One model, dense and in 8 experts that all run (k = n), written in F16 and from there in every type: llama.cpp's mixes
by their names, the others for all matrices alike. `moe2gguf compare` holds each file against the dense F16 one: bits
per weight, size, perplexity, mean KL divergence, equal top tokens. All types take an importance matrix of the dense
file, by `moe2gguf imatrix` on the first 70 % of the text; windows of the rest are scored. Beside them stands the
divergence that llama.cpp publishes for the type: Llama 3 8B, WikiText-2, with an importance matrix where it lists one.

The default model is SmolLM2-135M, whose rows of 576 no type with blocks of 256 fits. It is widened to 768 with zeros,
which is the same model (scripts/experiments/widen.py), and gets noise of one step of the Q4_1 file that it comes from,
which would favor types with such a grid. A quarter of most rows is zero and flatters all block types a little.
What is made stays in --work, and a run that was stopped goes on there; quantized files are removed as soon as they are
measured. The full run takes hours on two cores, --quick minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from environment import ROOT, cache_folder, python_with
from measure import machine, table, write_json
from steps import cut_text, moe2gguf, same_settings, smollm2

NEEDED = ("moe2gguf", "llama_cpp")
PRINT_TYPES = "from moe2gguf.quant.rules import MIXES, PLAIN; print(*MIXES, *PLAIN)"
N_EXPERT, N_CONTEXT, D_MODEL, NOISE_SEED = 8, 512, 768, 0
BATCH = 5  # types on disk at a time
FILES = ("dense", "sliced")
PUBLISHED = {
    "q8_0": 0.001355, "q6_k": 0.005452, "q5_k_m": 0.010762, "q5_k_s": 0.016595, "q5_1": 0.018045, "q5_0": 0.022239,
    "q4_k_m": 0.028152, "q4_k_s": 0.031951, "iq4_nl": 0.035742, "iq4_xs": 0.036334, "q4_1": 0.071683, "q4_0": 0.071940,
    "q3_k_l": 0.073077, "q3_k_m": 0.084358, "iq3_m": 0.102534, "iq3_s": 0.111278, "iq3_xs": 0.138693,
    "iq3_xxs": 0.183625, "q3_k_s": 0.199821, "iq2_m": 0.325989, "q2_k": 0.332223, "q2_k_s": 0.403360,
    "iq2_s": 0.439197, "iq2_xs": 0.546290, "iq2_xxs": 0.812022, "iq1_m": 1.393084, "iq1_s": 2.254554,
}  # fmt: skip
"""Mean KL divergence of Llama 3 8B, with 10 million tokens' importance matrix where there is such a row:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/tools/perplexity/README.md?plain=1#L37"""


def main(arguments: Sequence[str]) -> None:
    """Make the two F16 files and the matrix, measure every type, print the table."""
    options = parse(arguments)
    python = python_with(NEEDED, extra="run", name="types")
    bench = Bench(options, python)
    bench.prepare()
    result = {"model": bench.model.name, "machine": machine(), "settings": bench.settings, "rows": bench.rows()}
    if options.json:
        write_json(options.json, result)
    print(report(result))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of `scripts/bench types`."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench types", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a dense checkpoint (default: SmolLM2, widened)")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="text to collect and score on (default: moe2gguf's own)"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of the importance matrix (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 to score (default: %(default)s)")
    parser.add_argument("--only", nargs="*", metavar="TYPE", help="these types (default: all)")
    parser.add_argument("--files", nargs="*", choices=FILES, default=FILES, help="(default: dense sliced)")
    parser.add_argument("--threads", type=int, help="of llama.cpp (default: the number of cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--quick", action="store_true", help="3 types, 1 window: whether it runs, no result")
    parser.add_argument(
        "--work", type=Path, default=cache_folder() / "bench-types", metavar="DIR",
        help="where files are made (default: the user's cache folder)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.quick:
        options.tokens, options.windows, options.only = 1024, 1, options.only or ["q8_0", "q4_k_m", "iq1_s"]
    return options


class Bench:
    """The folder of one run: the model, its two F16 files, the texts, the importance matrix and the finished rows."""

    def __init__(self, options: argparse.Namespace, python: Path) -> None:
        self.options, self.python, self.work = options, python, options.work.resolve()
        self.model = options.model or self.work / f"SmolLM2-135M-Instruct-{D_MODEL}"
        self.settings = {"tokens": options.tokens, "windows": options.windows}
        self.text = [options.text.resolve()] if options.text else []
        same_settings(self.work, {**self.settings, "model": str(self.model), "text": [str(path) for path in self.text]})

    def prepare(self) -> None:
        """Everything that all types share, unless it is there."""
        cut_text(self.python, self.options.text, self.work / "calibration.txt", self.work / "held-out.txt")
        dense, sliced, matrix = (self.work / f"{name}.gguf" for name in (*FILES, "imatrix"))
        if not self.model.exists():
            widen = [
                self.python,
                ROOT / "scripts" / "experiments" / "widen.py",
                smollm2(self.python),
                self.model,
                str(D_MODEL),
            ]
            subprocess.run([*widen, "--noise", str(NOISE_SEED)], check=True)
        if not dense.exists():
            moe2gguf(self.python, "convert", self.model, dense, "--type", "f16", "--dense")
        if not sliced.exists():
            cut = ["--experts", N_EXPERT, "--align", 256]
            moe2gguf(self.python, "convert", self.model, sliced, "--type", "f16", *cut)
        if not matrix.exists():
            text = ["--text", self.work / "calibration.txt", "--tokens", self.options.tokens]
            moe2gguf(self.python, "imatrix", dense, matrix, *text, *self._threads())

    def _threads(self) -> list[object]:
        return ["--threads", self.options.threads] if self.options.threads else []

    def rows(self) -> list[dict[str, Any]]:
        """A row per file and type, a few types at a time: the files of all would fill the disk."""
        asked = self.options.only or subprocess.check_output([self.python, "-c", PRINT_TYPES], text=True).split()
        kinds = [kind for kind in asked if kind != "f16"]
        batches = [kinds[i : i + BATCH] for i in range(0, len(kinds), BATCH)]
        rows = [row for batch in batches for row in self._compare(batch)]
        return list({(row["file"], row["type"]): row for row in rows}.values())

    def _compare(self, kinds: Sequence[str]) -> list[dict[str, Any]]:
        print(f"  {', '.join(kinds)}", file=sys.stderr, flush=True)
        files = [self.work / f"{name}.gguf" for name in self.options.files]
        n_token = self.options.windows * (N_CONTEXT // 2 - 1)
        text = ["--text", self.work / "held-out.txt", "--tokens", n_token, "--context", N_CONTEXT]
        made = ["--types", ",".join(kinds), "--imatrix", self.work / "imatrix.gguf"]
        kept = ["--journal", self.work / "journal.jsonl", "--json", *self._threads()]
        found = moe2gguf(self.python, "compare", *files, "--reference", self.work / "dense.gguf", *made, *text, *kept)
        return [flat(row) for row in json.loads(found)["rows"]]


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """What the table needs of a row of `moe2gguf compare`; the type is in the file's name."""
    file, _, kind = Path(row["path"]).stem.partition("-")
    score = row["quality"]["summary"]
    return {
        "file": file,
        "type": kind.lower() or "f16",
        "bits_per_weight": row["bits_per_weight"],
        "bytes": row["file_size"],
        **{name: score[name] for name in ("perplexity", "kl_mean", "kl_error", "top1")},
    }


def report(result: dict[str, Any]) -> str:
    """The Markdown table, large to small, what was measured, and how it compares."""
    by_type: dict[str, dict[str, dict[str, Any]]] = {}
    for row in sorted(result["rows"], key=lambda row: -row["bits_per_weight"]):
        by_type.setdefault(row["type"], {})[row["file"]] = row
    lines = [
        [
            kind,
            *cells(rows.get("dense")),
            f"{PUBLISHED[kind]:.4f}" if kind in PUBLISHED else "",
            *cells(rows.get("sliced")),
        ]
        for kind, rows in by_type.items()
    ]
    columns = ["bits", "MB", "perplexity", "KL", "same top"]
    header = ["", *columns, "KL, Llama 3 8B", *(f"{N_EXPERT} experts: {columns[0]}", *columns[1:])]
    known = {
        kind: rows["dense"]["kl_mean"] / PUBLISHED[kind] for kind, rows in by_type.items() if comparable(kind, rows)
    }
    both = {
        kind: rows["sliced"]["kl_mean"] / rows["dense"]["kl_mean"]
        for kind, rows in by_type.items()
        if len(rows) == len(FILES) and rows["dense"]["bits_per_weight"] < 16
    }
    matrix, scored = result["settings"]["tokens"], result["settings"]["windows"] * (N_CONTEXT // 2 - 1)
    return "\n".join(
        [
            "",
            table(header, lines),
            "",
            f"{result['model']}, importance matrix of {matrix:,} tokens, {scored:,} scored tokens "
            f"of other text of the same kind; {result['machine']['processor']}. {len(result['rows'])} files, all load.",
            "",
            spread("divergence over that of Llama 3 8B", known),
            spread("divergence with experts over the dense file's", both),
        ]
    )


def comparable(kind: str, rows: dict[str, dict[str, Any]]) -> bool:
    """Whether the dense file of a type was measured, and llama.cpp publishes the type's divergence."""
    return kind in PUBLISHED and "dense" in rows


def spread(what: str, ratios: dict[str, float]) -> str:
    """One line: the least, median and largest ratio, with the types that have them."""
    if not ratios:
        return f"- {what}: not measured"
    low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    middle = statistics.median(ratios.values())
    return f"- {what}: {ratios[low]:.2f} ({low}) to {ratios[high]:.2f} ({high}), median {middle:.2f}"


def cells(row: dict[str, Any] | None) -> list[str]:
    """A file's five columns; empty where it was not measured."""
    if row is None:
        return [""] * 5
    kl = f"{row['kl_mean']:.4f}" if row["kl_mean"] >= 0.00005 else "0"
    size = [f"{row['bits_per_weight']:.2f}", f"{row['bytes'] / 1e6:.0f}"]
    return [*size, f"{row['perplexity']:.2f}", kl, f"{row['top1']:.1%}"]
