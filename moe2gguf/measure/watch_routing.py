"""Which experts run, seen in llama.cpp's own graph while it computes. Used in a child process only.

llama.cpp calls a function for every node of its graph if a context has one; two nodes of every layer are read:
`ffn_moe_probs-I`, the router's probabilities, and `ffn_moe_topk-I`, the experts chosen, which is the front of every row
of a full sort:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-graph.cpp#L2074-L2126 and
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/include/ggml-backend.h#L309 (the callback).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import HarnessError
from moe2gguf.gguf.ggml import declare
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.model import Llama, open_model
from moe2gguf.measure.logits import cut_windows, tokenize_text

_CHOSEN, _PROBABILITIES = b"ffn_moe_topk", b"ffn_moe_probs"


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


class RoutingWatcher:
    """The callback and its sums. It lives as long as the context that calls it."""

    def __init__(self, lib: ModuleType, n_expert: int, n_expert_used: int, n_word: int) -> None:
        self.callback = lib.ggml_backend_sched_eval_callback(self._node)
        self.layers: dict[int, LayerTally] = {}
        self.problem = ""
        self._words: NDArray[np.int64] = np.empty(0, np.int64)
        self._shape = (n_expert, n_expert_used, n_word)
        ggml = declare(lib._lib, "ggml_get_name", "ggml_nbytes", "ggml_backend_tensor_get")
        self._name, self._size, self._get = ggml.ggml_get_name, ggml.ggml_nbytes, ggml.ggml_backend_tensor_get

    def expect(self, words: NDArray[np.int64]) -> None:
        """Name the words (n_token,) of the batch to come, by their place in the tally."""
        self._words = words

    def _node(self, tensor: int, ask: bool, _user_data: Any) -> bool:
        """Say which nodes are wanted, then take them; whatever goes wrong is kept, an exception would be lost."""
        kind, _, layer = (self._name(tensor) or b"").partition(b"-")
        if kind not in (_CHOSEN, _PROBABILITIES) or not layer.isdigit() or self.problem:
            return not ask
        if not ask:
            try:
                self._take(tensor, kind, int(layer))
            except Exception as error:  # noqa: BLE001 - C code is above us: `tally_routing` raises it
                self.problem = f"{kind.decode()}-{int(layer)}: {error}"
        return True

    def _take(self, tensor: int, kind: bytes, layer: int) -> None:
        n_expert, k, n_word = self._shape
        n_token = len(self._words)
        data = np.empty(self._size(tensor) // 4, np.int32 if kind == _CHOSEN else np.float32)
        self._get(tensor, data.ctypes.data, 0, data.nbytes)
        if layer not in self.layers:
            square = np.zeros((n_expert, n_expert), np.int64)
            self.layers[layer] = LayerTally(square, np.zeros(n_expert), 0.0, np.zeros((n_word, n_expert), np.uint32))
        if kind == _PROBABILITIES:
            self._add_probabilities(self.layers[layer], data.reshape(n_token, n_expert))
            return
        if len(data) != (n_token - 1) * n_expert + k:  # the last row ends where its chosen ones do
            raise ValueError(f"{len(data)} numbers for {n_token} tokens, {k} of {n_expert} experts")
        rows = np.append(data, np.zeros(n_expert - k, np.int32)).reshape(n_token, n_expert)[:, :k]
        self._add_chosen(self.layers[layer], rows)

    def _add_probabilities(self, tally: LayerTally, rows: NDArray[Any]) -> None:
        p = rows.astype(np.float64)
        p /= p.sum(axis=1, keepdims=True)  # sigmoids do not sum to 1
        tally.probability += p.sum(axis=0)
        tally.entropy -= float(np.sum(p * np.log(np.where(p > 0, p, 1.0))))

    def _add_chosen(self, tally: LayerTally, rows: NDArray[np.int32]) -> None:
        ran = np.zeros((len(rows), self._shape[0]), np.int64)
        np.put_along_axis(ran, rows, 1, axis=1)
        tally.together += ran.T @ ran
        np.add.at(tally.words, self._words, ran.astype(np.uint32))


def tally_routing(path: Path, setup: Setup, text: str, n_token: int | None) -> Tally:
    """Run at least `n_token` tokens of `text` in the windows of `logits.cut_windows`; count which experts ran.

    None is the whole text. Every position counts, the first of each window too. Memory is n_word * n_layer * n_expert
    * 4 bytes and one batch of logits.

    Raises HarnessError if llama.cpp cannot run the file, the text is too short, or the graph is not the one we know.
    """
    with open_model(path, replace(setup, n_context=0)) as model:
        tokens = tokenize_text(model, text)
        n_window = max(1, len(tokens) // setup.n_context if n_token is None else -(-n_token // setup.n_context))
        n_scored = n_window * (setup.n_context - 1)
        windows = cut_windows(tokens, n_token=n_scored, n_context=setup.n_context, first=0, bos=model.bos()).tokens
        ids, places, counts = np.unique(windows, return_inverse=True, return_counts=True)
        n_shared = model.facts.n_shared
        n_routed, k = model.facts.n_expert - n_shared, model.n_expert_used - n_shared
        observer = RoutingWatcher(model.lib, n_routed, k, len(ids))
        model.start(setup.n_context, observer.callback)
        for window, words in zip(windows, places.reshape(windows.shape), strict=True):
            _run(model, window, words, observer)
        texts = [model.piece(int(i)).decode("utf-8", "replace") or f"<{i}>" for i in ids]
        return Tally(windows.size, k, texts, counts, observer.layers)


def _run(model: Llama, window: NDArray[np.int32], words: NDArray[np.int64], observer: RoutingWatcher) -> None:
    """Compute a window; all positions ask for logits, or the last layer would run for the scored ones only."""
    model.clear()
    for start in range(0, len(window), model.setup.n_batch):
        part = slice(start, start + model.setup.n_batch)
        observer.expect(words[part])
        model.feed(window[part], np.ones(len(window[part]), np.bool_))
        if observer.problem or not observer.layers:
            problem = observer.problem or "no node ffn_moe_topk in its graph"
            raise HarnessError(
                f"{model.facts.path}: cannot tell which experts run ({problem}): use llama.cpp 0c1e57098"
            )
