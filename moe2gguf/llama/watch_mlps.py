"""What goes into every MLP of a file, or which experts it runs, token by token. Used in a child process."""

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import HarnessError
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.model import open_model, open_vocabulary
from moe2gguf.llama.watch_nodes import CHOSEN, NodeWatcher, cut_chosen, watch_window

_INPUT = b"ffn_norm"
"""The node of what goes into an MLP: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/models/llama.cpp"""

Piece = list[int]
"""Tokens that are computed together: a prompt, or a part of a long one."""


class MLPWatcher(NodeWatcher):
    """Keeps by layer the inputs of the MLPs (n_token, d_model), or the experts that run (n_token, k)."""

    def __init__(self, lib: ModuleType, n_expert: int, k: int) -> None:
        super().__init__(lib, CHOSEN if n_expert else _INPUT)
        self.layers: dict[int, list[NDArray[Any]]] = {}
        self._shape = (n_expert, k)

    def take(self, kind: bytes, layer: int, data: NDArray[Any]) -> None:
        """As `NodeWatcher`."""
        n_token = len(self.words)
        rows = cut_chosen(data, n_token, *self._shape) if kind == CHOSEN else data.reshape(n_token, -1)
        if not np.isfinite(rows).all():
            raise ValueError("what goes into the MLP is not finite; check the file with `moe2gguf verify`")
        self.layers.setdefault(layer, []).append(rows)


def watch_mlps(path: Path, setup: Setup, pieces: Sequence[Piece]) -> Generator[NDArray[Any], None, None]:
    """Run every piece by itself; yields for each what goes into all MLPs, (n_layer, n_token, d_model).

    Of a file with experts it is which of them run, (n_layer, n_token, k), the one of the largest weight first.

    Raises HarnessError if llama.cpp cannot run the file, or the graph is not the one we know.
    """
    with open_model(path, replace(setup, n_context=0)) as model:
        watcher = MLPWatcher(model.lib, model.facts.n_expert, model.n_expert_used)
        model.start(setup.n_context, watcher.callback)
        for piece in pieces:
            watcher.layers.clear()
            tokens = np.array(piece, np.int32)
            watch_window(model, tokens, tokens, watcher)
            if [*watcher.layers] != [*range(len(watcher.layers))]:
                raise HarnessError(f"{path}: its graph does not show every MLP: use llama.cpp 0c1e57098")
            yield np.stack([np.concatenate(seen) for seen in watcher.layers.values()])


def cut_prompts(path: Path, prompts: Sequence[Sequence[str]], n_context: int) -> list[list[Piece]]:
    """For each list of prompts their tokens, in pieces of at most `n_context`; each starts with BOS if `path` wants it.

    Raises HarnessError if llama.cpp cannot read the vocabulary of the file.
    """
    with open_vocabulary(path) as vocabulary:
        bos = [] if (token := vocabulary.bos()) is None else [token]
        step, found = n_context - len(bos), list[list[Piece]]()
        for texts in prompts:
            ids = [vocabulary.tokenize_prompt(text)[len(bos) :] for text in texts]
            found.append([bos + one[i : i + step] for one in ids for i in range(0, len(one), step)])
        return found
