"""Logits from llama.cpp itself, in a child process: the oracle that our files must satisfy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe2gguf.llama.child import run_in_child
from moe2gguf.llama.devices import Setup
from moe2gguf.llama.model import open_model


def _all_logits(path: Path, tokens: list[int], counts: Sequence[int | None]) -> list[np.ndarray]:
    return [_logits(path, tokens, k) for k in counts]


def _logits(path: Path, tokens: list[int], n_expert_used: int | None) -> np.ndarray:
    setup = Setup(n_expert_used=n_expert_used, n_context=len(tokens), n_threads=1)
    with open_model(path, setup) as model:
        return np.array(model.logits(np.array(tokens, np.int32)), np.float64)


def llama_logits(path: Path, tokens: list[int], n_expert_used: int | None = None) -> np.ndarray:
    """Logits (n_token, n_vocab) of every position, F32 key/value cache, no flash attention."""
    return run_in_child(_logits, path, tokens, n_expert_used)


def llama_logits_at(path: Path, tokens: list[int], counts: Sequence[int | None]) -> list[np.ndarray]:
    """The same at several expert-used counts, in one child process."""
    return run_in_child(_all_logits, path, tokens, counts)


def _logits_of(paths: list[Path], tokens: list[int]) -> list[np.ndarray]:
    return [_logits(path, tokens, None) for path in paths]


def llama_logits_of(paths: list[Path], tokens: list[int]) -> list[np.ndarray]:
    """The logits of several files, in one child process."""
    return run_in_child(_logits_of, paths, tokens)


def mean_kl(base: np.ndarray, other: np.ndarray) -> float:
    """Mean KL divergence in nats from rows of logits `base` to `other`, in float64."""
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (base, other))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())
