"""Routers for experts that were whole models: which of them knows a token, from the states of tokens that each does."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
RouterKind = Literal["regression", "hidden", "random"]

RIDGE = 0.01
"""Of the regression, in variances of each input."""

SHARPNESS = 2.0 ** np.arange(-2, 9)
"""What the regression's answers may be multiplied by, so that their softmax is a share of belief."""


def draw_router(n_expert: int, d_model: int, seed: int, layer: int) -> Floats:
    """Random rows (n_expert, d_model) of length 1, which are another draw in each layer."""
    return _normalize(np.random.default_rng([seed, layer]).standard_normal((n_expert, d_model)))


def average_states(own: Sequence[Floats], others: Sequence[Floats]) -> Floats:
    """Rows (n_expert, d_model) of length 1: the mean state of each expert's prompts less that of its negative ones.

    `own` and `others` hold (n_token, d_model) for each expert, `others` perhaps no token.
    """
    means = [
        one.mean(0, np.float64) - (no.mean(0, np.float64) if len(no) else 0)
        for one, no in zip(own, others, strict=True)
    ]
    return _normalize(np.stack(means))


def fit_router(own: Sequence[Floats], others: Sequence[Floats], held_out: Sequence[Floats]) -> Floats:
    """Rows (n_expert, d_model) that answer whose prompt a token is from, by least squares, each expert's alike.

    A token of a negative prompt is anyone's but that expert's. The answers are made as sharp as the `held_out` tokens
    allow, so that their softmax is the likelihood of each expert; that changes none's rank.
    """
    n = len(own)
    wanted = np.concatenate([np.eye(n), (1 - np.eye(n)) / (n - 1)]) - 1 / n
    gram, answers = np.zeros((own[0].shape[1],) * 2), np.zeros((own[0].shape[1], n))
    for rows, target in zip([*own, *others], wanted, strict=True):
        if len(rows):
            x = rows.astype(np.float64)
            gram += x.T @ x / len(x)
            answers += np.outer(x.mean(0), target)
    gram[np.diag_indices_from(gram)] *= 1 + RIDGE
    gram[np.diag_indices_from(gram)] += 1e-9 * max(np.trace(gram) / len(gram), 1e-30)
    router = np.linalg.solve(gram, answers).T.astype(np.float32)
    return router * np.float32(_sharpen(router, held_out))


def _sharpen(router: Floats, held_out: Sequence[Floats]) -> float:
    """The factor with the least cross entropy on tokens of each expert; 1 where there are none."""
    logits = [rows @ router.T for rows in held_out]
    if not any(map(len, logits)):
        return 1.0
    losses = [
        sum(
            float(np.mean(np.logaddexp.reduce(s * one, axis=1) - s * one[:, i]))
            for i, one in enumerate(logits)
            if len(one)
        )
        for s in SHARPNESS
    ]
    return float(SHARPNESS[int(np.argmin(losses))])


def _normalize(rows: NDArray[np.float64]) -> Floats:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)
