"""Text of a model's own making, many texts side by side, out of a child process.

Each text starts with a token drawn evenly from the vocabulary, so that texts differ, and goes on with tokens drawn from
the model's own probabilities, as in data-free calibration (LLM-QAT, https://arxiv.org/abs/2305.17888, section 2.1).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import HarnessError
from moe2gguf.llama.child import stream_from_child
from moe2gguf.llama.devices import Setup, place_on_device
from moe2gguf.llama.model import Llama, Logits, open_model

MIN_CONTEXT = 8
"""Tokens that a text must be allowed, the model's BOS included."""


@dataclass(frozen=True)
class Draw:
    """What is drawn: `n_token` tokens in all, texts of at most `n_context`, `n_sequence` of them side by side."""

    n_token: int
    n_context: int = 512
    n_sequence: int = 16
    temperature: float = 1.0
    seed: int = 0


def sample_texts(
    path: Path, draw: Draw, *, device: str = "cpu", threads: int | None = None
) -> Generator[tuple[str, int], None, None]:
    """Yield (text, its tokens) as texts end: at the model's own end of text, or at `n_context`.

    The last ones are cut off where all tokens are drawn. The same file, draw and threads give the same texts on one
    machine.

    Raises:
        HarnessError: numbers out of range, llama.cpp cannot run the file, or its logits are not finite.
    """
    if (
        draw.n_token < 1
        or draw.n_context < MIN_CONTEXT
        or draw.n_sequence < 1
        or not draw.temperature > 0
        or draw.seed < 0
    ):
        needed = f"1 token and 1 text, a context of {MIN_CONTEXT}, a temperature above 0, a seed of 0"
        raise HarnessError(f"{draw}: needed are at least {needed}")
    setup = Setup(
        n_context=0,
        n_batch=draw.n_sequence,
        n_sequence=draw.n_sequence,
        n_threads=threads,
        kv_type="f16",
        repack=False,  # AMX kernels end the process on virtual machines that do not save the tiles
    )
    yield from stream_from_child(_sample, path, place_on_device(setup, device), draw, what=f"running {path}")


@dataclass
class _Text:
    """One text: its tokens, of which the first `n_fed` are in llama.cpp's memory."""

    tokens: list[int]
    n_fed: int = 0


def _sample(path: Path, setup: Setup, draw: Draw) -> Generator[tuple[str, int], None, None]:
    with open_model(path, setup) as model:
        n_context = min(draw.n_context, model.facts.n_context_train or draw.n_context)
        model.start(n_context)
        rng = np.random.default_rng(draw.seed)
        first, bos = list_first_tokens(model), model.bos()
        prefix = [] if bos is None else [bos]
        texts = [_begin(prefix, first, rng) for _ in range(draw.n_sequence)]
        n_left = draw.n_token - draw.n_sequence
        while n_left > 0:
            # One token of every text goes in; where it was the last, the next one is drawn.
            logits = model.step([text.tokens[text.n_fed] for text in texts], [text.n_fed for text in texts])
            drawn = draw_tokens(logits, draw.temperature, rng)
            for i, text in enumerate(texts):
                text.n_fed += 1
                if text.n_fed < len(text.tokens):
                    continue  # a BOS went in, the text's own first token is next
                ended = model.ends(int(drawn[i]))
                if not ended:
                    text.tokens.append(int(drawn[i]))
                    n_left -= 1
                if ended or len(text.tokens) >= n_context:
                    yield _spell(model, text.tokens[len(prefix) :])
                    model.forget(i)
                    texts[i] = _begin(prefix, first, rng)
                    n_left -= 1
        for text in texts:
            yield _spell(model, text.tokens[len(prefix) :])


def _begin(prefix: list[int], first: NDArray[np.int64], rng: np.random.Generator) -> _Text:
    return _Text([*prefix, int(rng.choice(first))])


def _spell(model: Llama, tokens: list[int]) -> tuple[str, int]:
    return b"".join(map(model.piece, tokens)).decode("utf-8", "ignore"), len(tokens)


def list_first_tokens(model: Llama) -> NDArray[np.int64]:
    """The tokens a text may start with: those that are text, not control tokens, single bytes or unused ones."""
    lib = model.lib
    attributes = [lib.llama_vocab_get_attr(model.vocab, token) for token in range(model.facts.n_vocab)]
    found = np.flatnonzero(np.array(attributes) & lib.LLAMA_TOKEN_ATTR_NORMAL)
    if not len(found):
        raise HarnessError(f"{model.facts.path}: its vocabulary has no token of plain text to start from")
    return found


def draw_tokens(logits: Logits, temperature: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """One token per row of logits (n_row, n_vocab), by their softmax at this temperature: (n_row,).

    Raises:
        HarnessError: a logit is not finite.
    """
    if not np.isfinite(logits).all():
        raise HarnessError("the logits are not finite: check the file with `moe2gguf verify`")
    weights = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature)
    sums = weights.cumsum(axis=1)
    marks = rng.random(len(logits)) * sums[:, -1]
    return np.array([row.searchsorted(mark) for row, mark in zip(sums, marks, strict=True)])
