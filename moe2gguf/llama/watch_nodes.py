"""What llama.cpp computes in the nodes of its graph that have a name for each layer. Used in a child process only.

llama.cpp calls a function for every node of its graph if a context has one. `ffn_moe_topk-I` are the experts that
layer I chose, which is the front of every row of a full sort; `ffn_moe_probs-I` what the router found, and
`ffn_moe_weighted-I` what the chosen experts answer, each times its weight:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-graph.cpp#L2074-L2323 and
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/include/ggml-backend.h#L309 (the callback).
"""

from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import HarnessError
from moe2gguf.gguf.ggml import declare
from moe2gguf.llama.model import Llama

CHOSEN, PROBABILITIES, WEIGHTED = b"ffn_moe_topk", b"ffn_moe_probs", b"ffn_moe_weighted"


class NodeWatcher(ABC):
    """The callback, and what it saw of some kinds of nodes. It lives as long as the context that calls it."""

    def __init__(self, lib: ModuleType, *kinds: bytes) -> None:
        self.callback = lib.ggml_backend_sched_eval_callback(self._node)
        self.problem = ""
        self.seen = False
        self.words: NDArray[Any] = np.empty(0, np.int64)  # tokens of the batch to come, or numbers that stand for them
        self._kinds = kinds
        ggml = declare(lib._lib, "ggml_get_name", "ggml_nbytes", "ggml_backend_tensor_get")
        self._name, self._size, self._get = ggml.ggml_get_name, ggml.ggml_nbytes, ggml.ggml_backend_tensor_get

    @abstractmethod
    def take(self, kind: bytes, layer: int, data: NDArray[Any]) -> None:
        """The numbers of a node, int32 of `CHOSEN` and else float32, in the order in which they stand in memory."""

    def _node(self, tensor: int, ask: bool, _user_data: Any) -> bool:
        """Say which nodes are wanted, then take them; whatever goes wrong is kept, an exception would be lost."""
        kind, _, layer = (self._name(tensor) or b"").partition(b"-")
        if kind not in self._kinds or not layer.isdigit() or self.problem:
            return not ask
        if not ask:
            try:
                data = np.empty(self._size(tensor) // 4, np.int32 if kind == CHOSEN else np.float32)
                self._get(tensor, data.ctypes.data, 0, data.nbytes)
                self.take(kind, int(layer), data)
                self.seen = True
            except Exception as error:  # noqa: BLE001 - C code is above us: `watch_window` raises it
                self.problem = f"{kind.decode()}-{int(layer)}: {error}"
        return True


def cut_chosen(data: NDArray[np.int32], n_token: int, n_expert: int, k: int) -> NDArray[np.int32]:
    """The experts (n_token, k) in the numbers of a node `CHOSEN`. Raises ValueError if they are not as many."""
    if len(data) != (n_token - 1) * n_expert + k:  # the last row ends where its chosen ones do
        raise ValueError(f"{len(data)} numbers for {n_token} tokens, {k} of {n_expert} experts")
    return np.append(data, np.zeros(n_expert - k, np.int32)).reshape(n_token, n_expert)[:, :k]


def watch_window(
    model: Llama, window: NDArray[np.int32], words: NDArray[np.int64] | NDArray[np.int32], watcher: NodeWatcher
) -> None:
    """Compute a window (n_token,), whose tokens are `words` to the watcher.

    All positions ask for logits, or the last layer would run for the scored ones only.

    Raises HarnessError if the graph is not the one that the watcher knows.
    """
    model.clear()
    for start in range(0, len(window), model.setup.n_batch):
        part = slice(start, start + model.setup.n_batch)
        watcher.words = words[part]
        model.feed(window[part], np.ones(len(window[part]), np.bool_))
        if watcher.problem or not watcher.seen:
            problem = watcher.problem or "no node ffn_moe_topk in its graph"
            raise HarnessError(
                f"{model.facts.path}: cannot tell which experts run ({problem}): use llama.cpp 0c1e57098"
            )
