"""front: sliced or a smaller quant? Dense quants against sliced files at every count, on two kinds of text, timed.

One model, a name of scripts/models or a path. Its dense quants stand beside sliced files of the target glm4moe, with
and without a refit, at all experts, three quarters, half and a quarter, in the types that suit experts. The files named
"wide" have a shared expert of half of the MLP, and no count below it. Beside them, with a refit for each count below
all: a file of the target mixtral ("mixtral"), and one in which all experts that run but one are the same for every
token ("static"), in the type the model has.

They are calibrated on the first 70 % of --text (prose), of --other (code: Python's standard library unless a file is
given), or of both in turn, and all files are scored on the rest of both, so every figure has one of its own kind of
text and one of another kind. Speeds are measured interleaved.

The reference is the model as it comes: a GGUF file of scripts/models is quantized already, and what it lost is not
counted. Its other types are made from its quantized weights. What is made stays in --work, and a run that was stopped
goes on there. The largest model takes hours on two cores, --quick minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from environment import cache_folder, python_with
from measure import machine, table, write_json
from model_files import MODELS, fetch_model
from steps import cut_text, moe2gguf, same_settings

NEEDED = ("moe2gguf", "llama_cpp", "torch", "transformers")
DENSE_TYPES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m", "q2_k")
EXPERT_TYPES = ("q4_k", "q5_k", "iq4_xs")
ROUTED = r"blk\..*_exps\.weight"
SHARES = (1.0, 0.75, 0.5, 0.25)
SCORED = 255  # tokens of a window of 512 that compare scores
TEXT_BYTES = 3_000_000
PIECE = 4000  # characters


@dataclass(frozen=True)
class Slicing:
    """A calibration: what it is called in file names, the text it sees, and the options of `convert`.

    With {k} in the options there is a file for each count of experts; {n} is the number of all, {half} of half of them
    and {fixed} is k - 1.
    """

    name: str
    text: str
    options: tuple[str, ...]

    @property
    def per_count(self) -> bool:
        """Whether a file serves one count of experts."""
        return "{k}" in self.options

    @property
    def is_wide(self) -> bool:
        """Whether half of all experts are the shared one."""
        return "{half}" in self.options


EVERY_COUNT = ("--target", "glm4moe")
WIDE = (*EVERY_COUNT, "--shared", "{half}")
ONE_COUNT = ("--target", "mixtral", "--experts", "{n}", "--used", "{k}")
SLICINGS = (
    *(
        Slicing(f"{name}-{text}", text, (*EVERY_COUNT, *words))
        for text in ("prose", "code", "both")
        for name, words in (("plain", ()), ("refit", ("--refit",)))
    ),
    Slicing("wide-plain-both", "both", WIDE),
    Slicing("wide-refit-both", "both", (*WIDE, "--refit")),
    Slicing("mixtral-prose", "prose", ONE_COUNT),
    Slicing("static-prose", "prose", (*ONE_COUNT, "--shared", "{fixed}")),
)


def main(arguments: Sequence[str]) -> None:
    """Make the files, measure them on both texts, print the tables."""
    options = parse(arguments)
    front = Front(options, python_with(NEEDED, extra="run", name="front"))
    front.cut_texts()
    groups = front.make_groups()
    rows = {text: [row for group in groups for row in front.measure(text, group)] for text in ("prose", "code")}
    about = {"model": front.model.name, "machine": machine(), "settings": front.settings, "windows": options.windows}
    result = about | {"rows": rows}
    if options.json:
        write_json(options.json, result)
    print(report(result))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of `scripts/bench front`."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench front", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help=f"a GGUF file, a folder, or one of {', '.join(MODELS)}")
    parser.add_argument("--text", type=Path, metavar="FILE", help="prose (default: moe2gguf's own texts)")
    parser.add_argument("--other", type=Path, metavar="FILE", help="code (default: Python's standard library)")
    parser.add_argument("--calibration-tokens", type=int, default=16384, help="(default: %(default)s)")
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens, scored of each text (default: 16)")
    parser.add_argument("--types", nargs="*", default=list(DENSE_TYPES), help="of dense files (default: seven)")
    parser.add_argument("--expert-types", nargs="*", default=list(EXPERT_TYPES), help="(default: %(default)s)")
    parser.add_argument("--slicings", nargs="*", choices=[one.name for one in SLICINGS], help="(default: all)")
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp and torch (default: %(default)s)")
    parser.add_argument("--no-speed", action="store_true", help="measure quality only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--quick", action="store_true", help="few files and tokens: whether it runs, no result")
    parser.add_argument(
        "--work", type=Path, default=cache_folder() / "bench-front", metavar="DIR",
        help="where files are made (default: the user's cache folder)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.quick:
        options.calibration_tokens, options.windows, options.slicings = 2048, 1, ["plain-prose", "wide-plain-both"]
        options.types, options.expert_types = ["q8_0"], ["q8_0"]
    return options


@dataclass(frozen=True)
class Group:
    """Files that are compared in one run, at the same counts of experts; at their own where there are none."""

    name: str
    files: Sequence[Path]
    counts: Sequence[int] = ()


class Front:
    """The folder of one run: the model, both texts in two parts, the files, and the finished rows."""

    def __init__(self, options: argparse.Namespace, python: Path) -> None:
        self.options, self.python = options, python
        self.model = fetch_model(options.model) if options.model in MODELS else Path(options.model).resolve()
        self.work = options.work.resolve() / self.model.stem
        self.settings = {
            "model": str(self.model),
            "tokens": options.calibration_tokens,
            "text": str(options.text),
            "other": str(options.other),
        }
        same_settings(self.work, self.settings)
        self.threads = ["--threads", options.threads]

    def cut_texts(self) -> None:
        """Write the first 70 % of both texts and the rest, unless they are there."""
        code = self.options.other or self.work / "code.txt"
        if not code.exists():
            code.write_text(read_library(), encoding="utf-8")
        for name, text in (("prose", self.options.text), ("code", code)):
            cut_text(self.python, text, self.work / f"{name}-first.txt", self.work / f"{name}-rest.txt")
        both = self.work / "both-first.txt"
        if not both.exists():  # a conversion that was stopped knows its text by the time of its change
            firsts = ((self.work / f"{name}-first.txt").read_text(encoding="utf-8") for name in ("prose", "code"))
            both.write_text("".join(interleave(*firsts)), encoding="utf-8")

    @property
    def reference(self) -> Path:
        """The dense model as it comes."""
        return self.model if self.model.is_file() else self.work / "dense-f16.gguf"

    def make_dense(self) -> Iterator[Path]:
        """The reference, and a dense file of every type."""
        if not self.reference.exists():
            moe2gguf(self.python, "convert", self.model, self.reference, "--dense", "--type", "f16", *self.threads)
        yield self.reference
        for kind in self.options.types:
            if kind not in self.reference.name.lower():
                yield self._quantize(self.reference, self.work / f"dense-{kind}.gguf", kind)

    def make_groups(self) -> list[Group]:
        """All files."""
        dense, sliced = list(self.make_dense()), list(self.make_sliced(wide=False))
        return [
            Group("all", [*dense, *sliced], self.list_counts(self.n_expert // 4 + 1) if sliced else ()),
            Group("wide", list(self.make_sliced(wide=True)), self.list_counts(self.n_expert // 2 + 1)),
            Group("fitted", list(self.make_fitted())),
        ]

    def make_sliced(self, *, wide: bool) -> Iterator[Path]:
        """A sliced file of every calibration that serves all counts, or all from half on, in every type."""
        for one in self._chosen(per_count=False):
            if one.is_wide == wide:
                path = self._convert(self.work / f"{one.name}.gguf", one)
                if self.model.is_file():  # its blocks are copied
                    yield path
                for kind in self.options.expert_types:
                    yield self._quantize_experts(path, self.work / f"{one.name}-{kind}.gguf", kind)

    def make_fitted(self) -> Iterator[Path]:
        """The files that serve one count each, of those below all that the other files are measured at."""
        for one in self._chosen(per_count=True):
            for k in self.list_counts(self.n_expert // 4 + 1)[1:]:
                yield self._convert(self.work / f"{one.name}-{k}.gguf", one, k)

    def _chosen(self, *, per_count: bool) -> Iterator[Slicing]:
        names = self.options.slicings or [one.name for one in SLICINGS]
        return (one for one in SLICINGS if one.name in names and one.per_count == per_count)

    @cached_property
    def n_expert(self) -> int:
        """The number of experts that fits the model."""
        planned = moe2gguf(self.python, "convert", self.model, "--plan", "--json", *EVERY_COUNT)
        return int(json.loads(planned)["expert_count"])

    def list_counts(self, least: int) -> list[int]:
        """All experts, three quarters, half and a quarter of them, but at least so many."""
        return sorted({max(least, round(self.n_expert * share)) for share in SHARES}, reverse=True)

    def _convert(self, path: Path, one: Slicing, k: int = 0) -> Path:
        """Convert the model, unless that is done; in F16, or with the blocks of a quantized source."""
        if not path.exists():
            print(f"  {path.stem}", file=sys.stderr, flush=True)
            n = self.n_expert
            words = [word.format(n=n, half=n // 2, k=k, fixed=k - 1) for word in one.options]
            text = ["--calibration", self.work / f"{one.text}-first.txt"]
            text += ["--calibration-tokens", self.options.calibration_tokens]
            as_is = [] if self.model.is_file() else ["--type", "f16"]
            moe2gguf(self.python, "convert", self.model, path, *words, *text, *as_is, *self.threads)
        return path

    def _quantize(self, source: Path, path: Path, kind: str) -> Path:
        """Quantize a file, unless that is done; the tensors of the type that they have already are copied."""
        if not path.exists():
            allowed = ["--allow-fallback", "--allow-requantize"]
            moe2gguf(self.python, "quantize", source, path, kind, *allowed, *self.threads)
        return path

    def _quantize_experts(self, source: Path, path: Path, kind: str) -> Path:
        """Quantize what the router chooses from, unless that is done; of a model in floats all other matrices too."""
        if not self.model.is_file():
            return self._quantize(source, path, {"q4_k": "q4_k_m", "q5_k": "q5_k_m"}.get(kind, kind))
        if not path.exists():
            rule = ["--tensor-type", f"{ROUTED}={kind}", "--allow-requantize"]
            moe2gguf(self.python, "quantize", source, path, "auto", *rule, *self.threads)
        return path

    def measure(self, text: str, group: Group) -> list[dict[str, Any]]:
        """A row per dense file, and per sliced file and count, scored on the rest of a text."""
        if not group.files:
            return []
        print(f"  {text}, {group.name}", file=sys.stderr, flush=True)
        used = ["--used", ",".join(map(str, group.counts))] if group.counts else []
        scored = ["--text", self.work / f"{text}-rest.txt", "--tokens", self.options.windows * SCORED]
        speed = [] if self.options.no_speed or text != "prose" else ["--speed"]
        kept = ["--journal", self.work / f"{text}-{group.name}.jsonl", "--json", *self.threads]
        command = ["compare", *group.files, "--reference", self.reference, *used, *scored, *speed, *kept]
        measured = json.loads(moe2gguf(self.python, *command))
        return [flat(row, measured["reference_speed"]) for row in measured["rows"]]


def read_library() -> str:
    """Modules of Python's standard library, in the order of their names, spread over all of them."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)[:TEXT_BYTES]


def interleave(*texts: str) -> Iterator[str]:
    """Pieces of the texts in turn, as many of each, spread over all of it."""
    n = min(map(len, texts)) // PIECE
    for i in range(n):
        for text in texts:
            start = i * len(text) // n
            yield text[start : start + PIECE] + "\n"


def flat(row: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
    """What the tables need of a row of `moe2gguf compare`; its speeds are times the reference's, `base`."""
    score, speed = row["quality"]["summary"], row["speed"]
    found = {
        "file": Path(row["path"]).stem,
        "used": row["n_expert_used"],
        "experts": row["n_expert"],
        "bytes": row["file_size"],
        "times_dense": score["perplexity"] / score["perplexity_base"],
        **{name: score[name] for name in ("perplexity", "kl_mean", "kl_error", "top1")},
    }
    if speed and base:
        found |= {kind: speed[kind]["median"] / base[kind]["median"] for kind in ("prompt", "generation")}
    return found


def report(result: dict[str, Any]) -> str:
    """The Markdown tables, best by divergence on prose first, and what was measured."""
    prose, code = ({(row["file"], row["used"]): row for row in result["rows"][text]} for text in ("prose", "code"))
    keys = sorted(prose, key=lambda key: prose[key]["kl_mean"])
    header = ["", "MB", "prose: P", "KL", "same top", "code: P", "KL", "same top", "prompt", "generation"]
    lines = [
        [name(prose[key]), f"{prose[key]['bytes'] / 1e6:.0f}", *score(prose[key]), *score(code[key]), *pace(prose[key])]
        for key in keys
    ]
    settings, windows = result["settings"], result["windows"]
    return "\n".join(
        [
            "",
            table(header, lines),
            "",
            f"{result['model']}: P is perplexity over that of the model as it comes, speeds over its own. "
            f"Calibrated on {settings['tokens']:,} tokens, scored on {windows * SCORED:,} tokens of each text; "
            f"{result['machine']['processor']}, {result['machine']['cores']} cores.",
        ]
    )


def name(row: dict[str, Any]) -> str:
    """A file, with the experts that run."""
    return f"{row['file']} {row['used']}/{row['experts']}" if row["experts"] else str(row["file"])


def score(row: dict[str, Any]) -> list[str]:
    """The three columns of quality on one text."""
    return [f"{row['times_dense']:.3f}", f"{row['kl_mean']:.4f}", f"{row['top1']:.1%}"]


def pace(row: dict[str, Any]) -> list[str]:
    """Prompt and generation, times the reference's; empty where they were not timed."""
    return [f"{row[kind]:.2f}" if kind in row else "" for kind in ("prompt", "generation")]
