"""Files of graphs with a shared expert, from tiny checkpoints: what their tests have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from flat_options import flat_options

from moe2gguf import convert
from moe2gguf.recipes.convert import Conversion

TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 300, 48)]
TEXT = "The quick brown fox jumps over the lazy dog; 12 x 12 = 144. " * 400
TARGETS = ["glm4moe", "deepseek", "step35"]

N, SHARED = 6, 2
"""Of six experts two are shared, so that four are routed: a power of two, by which `deepseek` amplifies exactly."""


def convert_calibrated(target: str, folder: Path, out: Path, **options: Any) -> Conversion:
    """A file whose router chooses: calibrated on the text of this module, which is written beside it."""
    text = out.with_suffix(".txt")
    text.write_text(TEXT)
    chosen = flat_options(N, target=target, n_shared=SHARED, text=text, n_token=1024, **options)
    return convert(folder, out, chosen, force=True)


def read_tensors(path: Path) -> dict[str, Any]:
    """Name -> array, by gguf's own reader."""
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def assert_same_tensors(first: Path, second: Path) -> None:
    """Both files have the same tensors, byte for byte."""
    ours, theirs = read_tensors(first), read_tensors(second)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
