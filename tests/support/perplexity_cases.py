"""What llama-perplexity and we both measure: pairs of files and a text that every machine makes alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tiny_gguf
from flat_options import flat_options

from moe2gguf import convert

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).resolve().parents[1] / "recorded"
WORDS = (
    "the",
    "man",
    "and",
    "an",
    "inner",
    "theme",
    "of",
    "it",
    "is",
    "to",
    "mend",
    "thin",
    "rather",
    "tan",
    "heat",
    "tie",
)


@dataclass(frozen=True)
class Case:
    """A reference, another file, experts used of it (None: dense), a text, tokens of a window, how many windows."""

    name: str
    base: Path
    other: Path
    n_expert_used: int | None
    text: str
    n_context: int
    n_window: int

    @property
    def record(self) -> Path:
        """What llama-perplexity printed."""
        return RECORDED / f"llama-perplexity-{self.name}.txt"

    @property
    def n_token(self) -> int:
        """Scored positions: the second half of every window."""
        return self.n_window * (self.n_context - 1 - self.n_context // 2)


def tiny(folder: Path) -> Case:
    """A tiny model and its four slices, two of them used by a router with drawn weights."""
    dense = tiny_gguf.dense_weights()
    sliced = tiny_gguf.sliced_weights(dense, 4, router_seed=1)
    base = tiny_gguf.write_gguf(folder / "tiny-dense.gguf", dense)
    other = tiny_gguf.write_gguf(folder / "tiny-sliced.gguf", sliced, n_expert_used=2)
    return Case("tiny", base, other, 2, drawn_text(900), 64, 12)


def smollm2(folder: Path, model: Path) -> Case:
    """SmolLM2-135M-Instruct in F16 and in Q4_0, on the text of this project's license."""
    convert(model, folder / "smollm2-f16.gguf", flat_options(dense=True, type="f16"))
    convert(model, folder / "smollm2-q4_0.gguf", flat_options(dense=True, type="q4_0", allow_fallback=True))
    text = (ROOT / "LICENSE").read_text("ascii")
    return Case("smollm2", folder / "smollm2-f16.gguf", folder / "smollm2-q4_0.gguf", None, text, 256, 4)


def drawn_text(n: int) -> str:
    """`n` words, drawn by a linear congruential generator (Numerical Recipes' constants), the same everywhere."""
    state, out = 1, []
    for _ in range(n):
        state = (1664525 * state + 1013904223) % 2**32
        out.append(WORDS[state * len(WORDS) >> 32])
    return " ".join(out)
