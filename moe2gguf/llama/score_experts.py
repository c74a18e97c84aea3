"""What each expert adds to the answer of its layer, summed over a text. Used in a child process only."""

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import HarnessError
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.model import open_model
from moe2gguf.llama.watch_nodes import CHOSEN, WEIGHTED, NodeWatcher, cut_chosen, watch_window
from moe2gguf.llama.windows import cut_text

Floats = NDArray[np.float64]

_WEIGHTED_BEFORE = {"llama4": b"ffn_moe_down"}
"""Graphs that weigh what goes into the experts, so that their answers are weighted already."""


@dataclass
class LayerSums:
    """Sums over the tokens of one layer, by expert (n_expert,): tokens that ran it, and the lengths of its answers.

    The answer to a token is the expert's output times its weight, (d_model,); its length is the Euclidean norm.
    """

    counts: NDArray[np.int64]
    lengths: Floats


class ScoreWatcher(NodeWatcher):
    """Sums up by layer."""

    def __init__(self, lib: ModuleType, architecture: str, n_expert: int, n_expert_used: int) -> None:
        super().__init__(lib, CHOSEN, _WEIGHTED_BEFORE.get(architecture, WEIGHTED))
        self.layers: dict[int, LayerSums] = {}
        self._shape = (n_expert, n_expert_used)
        self._chosen: dict[int, NDArray[np.int32]] = {}

    def take(self, kind: bytes, layer: int, data: NDArray[Any]) -> None:
        """As `NodeWatcher`."""
        (n_expert, k), n_token = self._shape, len(self.words)
        if kind == CHOSEN:
            self._chosen[layer] = cut_chosen(data, n_token, n_expert, k).ravel()
            return
        chosen = self._chosen.pop(layer)
        lengths = np.linalg.norm(data.reshape(n_token * k, -1).astype(np.float64), axis=1)
        if not np.isfinite(lengths).all():
            raise ValueError("an expert's output is not finite; check the file with `moe2gguf verify`")
        sums = self.layers.setdefault(layer, LayerSums(np.zeros(n_expert, np.int64), np.zeros(n_expert)))
        sums.counts += np.bincount(chosen, minlength=n_expert)
        sums.lengths += np.bincount(chosen, lengths, minlength=n_expert)


def sum_answers(
    path: Path, setup: Setup, text: str, n_token: int | None
) -> Generator[tuple[int, int], None, dict[int, LayerSums]]:
    """Run at least `n_token` tokens of `text` (None: all) through a file; returns the sums of each layer that ran.

    Yields, before each window, how many are done and how many there are. Shared experts are not counted.

    Raises HarnessError if llama.cpp cannot run the file, the text is too short, or the graph is not the one we know.
    """
    with open_model(path, replace(setup, n_context=0)) as model:
        facts, windows = model.facts, cut_text(model, text, setup.n_context, n_token)
        k = model.n_expert_used - facts.n_shared
        watcher = ScoreWatcher(model.lib, facts.architecture, facts.n_expert - facts.n_shared, k)
        model.start(setup.n_context, watcher.callback)
        for i, window in enumerate(windows):
            yield i, len(windows)
            watch_window(model, window, window, watcher)
        if not watcher.layers:
            raise HarnessError(f"{path}: its graph does not show what its experts answer: use llama.cpp 0c1e57098")
        return watcher.layers
