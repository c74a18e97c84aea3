"""heal: one sliced model before and after healing, way by way, at every count; the dense model trained as well.

Cuts a dense model into 16 experts (`--amplify any`, no refit), heals it in several ways on the same text, and scores
every file at 16, 12, 8 and 4 experts in llama.cpp on other text of the same kind: the first 70 % of the text calibrate
and train, windows of the rest are scored. `short` ways take --steps steps each, so they may be compared, long ones
--long. One of these also learns to predict the text itself, which fits a model to its domain; beside it stands the
dense model, trained alike on the same windows: how much of that gain is no healing. What is made stays in --work, and a
run that was stopped goes on there. --quick says whether it runs, in minutes; the full run takes hours on two cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import ROOT, cache_folder, python_with
from measure import machine, run, table, write_json
from steps import MOE2GGUF, moe2gguf, same_settings, smollm2

NEEDED = ("moe2gguf", "torch", "transformers", "accelerate", "peft", "llama_cpp")
COUNTS = (16, 12, 8, 4)
SPLIT = 0.7
N_CONTEXT = 512
TEXT_WEIGHT = 0.5
START, LAYERS, LONG, DENSE = (
    "not healed",
    "layer by layer",
    "then with attention, long",
    "dense, trained on the text, long",
)


@dataclass(frozen=True)
class Way:
    """How to heal: its name in the table, the way it starts from, and the options of `moe2gguf heal`."""

    name: str
    start: str
    options: Callable[[argparse.Namespace], list[object]]


def end_to_end(
    used: str = "4..16", train: Sequence[str] = (), text: float = 0.0, long: bool = False
) -> Callable[[argparse.Namespace], list[object]]:
    """Steps of the whole model, without the layer-wise stage."""
    chosen = [part for name in train for part in ("--train", name)]
    loss = ["--next-token", text] if text else []
    return lambda o: ["--used-range", used, *chosen, *loss, "--layerwise", 0, "--steps", o.long if long else o.steps]


EVERYTHING = ("router", "experts", "attention")
WAYS = (
    Way(LAYERS, START, lambda _: ["--used-range", "4..16", "--layerwise", 1, "--steps", 0]),
    Way("end to end, short", START, end_to_end()),
    Way("layer by layer, then end to end, short", LAYERS, end_to_end()),
    Way("the same with attention, short", LAYERS, end_to_end(train=EVERYTHING)),
    *(Way(f"the same for {k} of 16 alone, short", LAYERS, end_to_end(str(k))) for k in (12, 8, 4)),
    Way("router only, short", LAYERS, end_to_end(train=("router",))),
    Way("LoRA and router, short", LAYERS, end_to_end(train=("lora", "router"))),
    Way(LONG, LAYERS, end_to_end(train=EVERYTHING, long=True)),
    Way("with the text itself, long", LAYERS, end_to_end(train=EVERYTHING, text=TEXT_WEIGHT, long=True)),
)


def main(arguments: Sequence[str]) -> None:
    """Make every file, score all in one run, print the table."""
    options = parse(arguments)
    bench = Bench(options, python_with(NEEDED, extra="heal", name="heal"))
    bench.make(DENSE, bench.train_dense)
    bench.make(START, bench.slice)
    for way in WAYS:
        bench.make(way.name, functools.partial(bench.heal, way))
    rows = bench.scores()
    result = {"model": bench.model.name, "machine": machine(), "settings": bench.settings, "rows": rows}
    if options.json:
        write_json(options.json, result)
    print(report(result))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of `scripts/bench heal`."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench heal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a dense checkpoint (default: SmolLM2-135M)")
    parser.add_argument("--text", type=Path, metavar="FILE", required=True, help="text to train and score on")
    parser.add_argument("--tokens", type=int, default=184320, help="to train on (default: %(default)s)")
    parser.add_argument(
        "--layer-tokens", type=int, default=32768, help="of the layer-wise stage (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=30, help="steps of 1,024 tokens, short (default: %(default)s)")
    parser.add_argument("--long", type=int, default=240, help="and long (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 to score (default: %(default)s)")
    parser.add_argument("--only", nargs="*", metavar="WAY", help="ways whose name has one of these words")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--quick", action="store_true", help="few tokens and steps: whether it runs, no result")
    parser.add_argument(
        "--work", type=Path, default=cache_folder() / "bench-heal", metavar="DIR",
        help="where files are made, and kept (default: the user's cache folder)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.quick:
        options.tokens = options.layer_tokens = 2048
        options.steps, options.long, options.windows = 1, 2, 2
    return options


class Bench:
    """The folder of one benchmark: texts, folders and files by name, and the seconds that each took."""

    def __init__(self, options: argparse.Namespace, python: Path) -> None:
        self.options, self.python, self.work = options, python, options.work
        self.model = options.model or smollm2(python)
        self.settings = {
            name: getattr(options, name) for name in ("tokens", "layer_tokens", "steps", "long", "windows")
        }
        same_settings(self.work, {**self.settings, "model": self.model.name})
        whole = options.text.read_text(encoding="utf-8")
        self.train, self.held_out = self.work / "train.txt", self.work / "held-out.txt"
        self.train.write_text(whole[: int(SPLIT * len(whole))], encoding="utf-8")
        self.held_out.write_text(whole[int(SPLIT * len(whole)) :], encoding="utf-8")

    def folder(self, name: str) -> Path:
        """Where the checkpoint of that name stands; the GGUF file and the log stand beside it."""
        place: Path = self.work / name.replace(",", "").replace(" ", "-")
        return place

    def make(self, name: str, work: Callable[[Path], list[object]]) -> None:
        """Make a folder and its GGUF file, unless they are there; `work` gives the arguments for Python."""
        if not self._wanted(name):
            return
        folder = self.folder(name)
        if not folder.with_suffix(".gguf").exists():
            print(f"  {name}", file=sys.stderr, flush=True)
            if not folder.exists():
                done = run([str(part) for part in (self.python, *work(folder))], folder.with_suffix(".log"))
                cost = {"seconds": done.seconds, "processor_seconds": done.processor_seconds, "peak": done.peak_bytes}
                write_json(folder.with_suffix(".json"), cost)
            kind = ["--dense", "--type", "f32"] if name == DENSE else []
            moe2gguf(self.python, "convert", folder, folder.with_suffix(".gguf"), *kind)

    def _wanted(self, name: str) -> bool:
        only = self.options.only
        return not only or name in (START, LAYERS) or any(word in name for word in only)

    def slice(self, out: Path) -> list[object]:
        """The model that all ways start from."""
        chosen = ["--amplify", "any", "--no-refit", "--calibration", self.train, "--calibration-tokens"]
        kept = [*chosen, self.options.layer_tokens, "--format", "hf"]
        return [*MOE2GGUF, "convert", self.model, out, "--experts", 16, "--used", 8, *kept]

    def heal(self, way: Way, out: Path) -> list[object]:
        """One way."""
        n_token = self.options.layer_tokens if way.name == LAYERS else self.options.tokens
        every = max(self.options.long // 4, 1)
        return [
            *MOE2GGUF, "heal", self.folder(way.start), out, "--teacher", self.model, "--text", self.train,
            *way.options(self.options), "--tokens", n_token, "--held-out-tokens", min(n_token // 8, 2048), "--batch", 2,
            "--evaluate-at", "4,8,12,16", "--evaluate-every", every, "--save-every", every,
        ]  # fmt: skip

    def train_dense(self, out: Path) -> list[object]:
        """The dense model, with the steps of the long way."""
        o = self.options
        script = ROOT / "scripts" / "experiments" / "train_dense.py"
        return [script, self.model, out, "--text", self.train, "--tokens", o.tokens, "--steps", o.long]

    def scores(self) -> list[dict[str, Any]]:
        """Every file at every count, from one run of `moe2gguf compare`."""
        dense = self.work / "dense.gguf"
        if not dense.exists():
            moe2gguf(self.python, "convert", self.model, dense, "--dense", "--type", "f32")
        names = [name for name in (START, *(way.name for way in WAYS)) if self._wanted(name)]
        rows = self._compare(dense, names, ["--used", ",".join(map(str, COUNTS))])
        return rows + (self._compare(dense, [DENSE], []) if self._wanted(DENSE) else [])

    def _compare(self, dense: Path, names: Sequence[str], options: Sequence[str]) -> list[dict[str, Any]]:
        files = {self.folder(name).with_suffix(".gguf"): name for name in names}
        n_token = self.options.windows * (N_CONTEXT // 2 - 1)
        text = ["--text", self.held_out, "--tokens", n_token, "--context", N_CONTEXT, "--json"]
        found = json.loads(moe2gguf(self.python, "compare", *files, "--reference", dense, *options, *text))
        rows = []
        for row in found["rows"]:
            name, score = files[Path(row["path"])], row["quality"]["summary"]
            rows.append(
                {
                    "name": name,
                    "n_expert_used": row["n_expert_used"],
                    "perplexity": score["perplexity"],
                    "perplexity_dense": score["perplexity_base"],
                    "kl": score["kl_mean"],
                    **json.loads(self.folder(name).with_suffix(".json").read_text()),
                }
            )
        return rows


def report(result: dict[str, Any]) -> str:
    """The Markdown table: perplexity over the dense model's, per count."""
    cells: dict[str, dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        cells.setdefault(row["name"], {})[row["n_expert_used"] or COUNTS[0]] = row
    lines = []
    for name, by_count in cells.items():
        ratios = [
            f"{by_count[k]['perplexity'] / by_count[k]['perplexity_dense']:.2f}" if k in by_count else ""
            for k in COUNTS
        ]
        cost = next(iter(by_count.values()))
        lines.append([name, *ratios, f"{cost['processor_seconds'] / 60:.0f}", f"{cost['peak'] / 1e9:.1f}"])
    header = ["perplexity over dense, at", *(f"{k} of 16" for k in COUNTS), "processor minutes", "peak GB"]
    settings = ", ".join(f"{name} {value:,}" for name, value in result["settings"].items())
    dense = result["rows"][0]["perplexity_dense"]
    return f"{table(header, lines)}\n\n{result['model']}, {settings}; dense perplexity {dense:.2f}."
