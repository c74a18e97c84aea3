"""Which experts run, seen in llama.cpp's own graph while it computes. Used in a child process only."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe2gguf.llama.devices import Setup
from moe2gguf.llama.model import open_model
from moe2gguf.llama.watch_nodes import CHOSEN, PROBABILITIES, NodeWatcher, cut_chosen, watch_window
from moe2gguf.llama.windows import cut_text


@dataclass
class LayerTally:
    """Sums over the tokens seen by one layer.

    together      (n_expert, n_expert): tokens that ran both; the diagonal: tokens that ran the expert
    probability   (n_expert,): of the router's softmax
    entropy       of that softmax, nats
    words         (n_word, n_expert): how often each word, a distinct token of the text, ran each expert
    """

    together: NDArray[np.int64]
    probability: NDArray[np.float64]
    entropy: float
    words: NDArray[np.uint32]


@dataclass
class Tally:
    """What `tally_routing` returns: layers by number, and the words' texts (n_word,) and counts (n_word,).

    All counts of experts are those that the router chooses from: a shared expert of the graph's own is not among them.
    """

    n_token: int
    n_expert_used: int
    texts: list[str]
    counts: NDArray[np.int64]
    layers: dict[int, LayerTally] = field(default_factory=dict)


class RoutingWatcher(NodeWatcher):
    """Sums up choices and probabilities, for words by their place in the tally."""

    def __init__(self, lib: ModuleType, n_expert: int, n_expert_used: int, n_word: int) -> None:
        super().__init__(lib, CHOSEN, PROBABILITIES)
        self.layers: dict[int, LayerTally] = {}
        self._shape = (n_expert, n_expert_used, n_word)

    def take(self, kind: bytes, layer: int, data: NDArray[Any]) -> None:
        """As `NodeWatcher`."""
        n_expert, k, n_word = self._shape
        n_token = len(self.words)
        if layer not in self.layers:
            square = np.zeros((n_expert, n_expert), np.int64)
            self.layers[layer] = LayerTally(square, np.zeros(n_expert), 0.0, np.zeros((n_word, n_expert), np.uint32))
        if kind == PROBABILITIES:
            self._add_probabilities(self.layers[layer], data.reshape(n_token, n_expert))
        else:
            self._add_chosen(self.layers[layer], cut_chosen(data, n_token, n_expert, k))

    def _add_probabilities(self, tally: LayerTally, rows: NDArray[Any]) -> None:
        p = rows.astype(np.float64)
        if p.min() < 0:  # gpt-oss takes the softmax of the chosen ones only, and calls the logits probabilities
            p = np.exp(p - p.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)  # sigmoids do not sum to 1
        tally.probability += p.sum(axis=0)
        tally.entropy -= float(np.sum(p * np.log(np.where(p > 0, p, 1.0))))

    def _add_chosen(self, tally: LayerTally, rows: NDArray[np.int32]) -> None:
        ran = np.zeros((len(rows), self._shape[0]), np.int64)
        np.put_along_axis(ran, rows, 1, axis=1)
        tally.together += ran.T @ ran
        np.add.at(tally.words, self.words, ran.astype(np.uint32))


def tally_routing(path: Path, setup: Setup, text: str, n_token: int | None) -> Tally:
    """Run at least `n_token` tokens of `text` in the windows of `cut_text`; count which experts ran.

    None is the whole text. Every position counts, the first of each window too. Memory is n_word * n_layer * n_expert
    * 4 bytes and one batch of logits.

    Raises HarnessError if llama.cpp cannot run the file, the text is too short, or the graph is not the one we know.
    """
    with open_model(path, replace(setup, n_context=0)) as model:
        windows = cut_text(model, text, setup.n_context, n_token)
        ids, places, counts = np.unique(windows, return_inverse=True, return_counts=True)
        n_shared = model.facts.n_shared
        n_routed, k = model.facts.n_expert - n_shared, model.n_expert_used - n_shared
        observer = RoutingWatcher(model.lib, n_routed, k, len(ids))
        model.start(setup.n_context, observer.callback)
        for window, words in zip(windows, places.reshape(windows.shape), strict=True):
            watch_window(model, window, words, observer)
        texts = [model.piece(int(i)).decode("utf-8", "replace") or f"<{i}>" for i in ids]
        return Tally(windows.size, k, texts, counts, observer.layers)
