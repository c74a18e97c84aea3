"""The reference's logits in little room: of every token the most likely entries, and sums over all others.

The KL divergence then splits into the kept entries, which is exact, and the rest, which is bounded from both sides.
With p the reference, q the other model, and over the entries that are not kept P = sum p, Q = sum q:

    P ln(P / Q)  <=  sum p ln(p / q)  <=  sum p ln p - P min ln q

The left side is the log-sum inequality (Cover and Thomas, Elements of Information Theory, theorem 2.7.1), met where q
is p in other proportions; it is what `kl` uses, and the gap to the right side is `kl_slack`. Entries below `tail` are
left out of P and of the sums, as in llama.cpp's own definition, so where all entries above it are kept nothing is lost.

The overlap sum min(p, q) splits likewise: exact over the kept entries, and between 0 and min(1 - sum p, Q) over the
rest, with p over the kept entries here. `overlap` is the sum over the kept ones, `overlap_slack` the room above it.
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from moe2gguf.errors import HarnessError
from moe2gguf.measure import metrics
from moe2gguf.measure.metrics import CHUNK_ENTRIES, Divergence, Floats, LogitsChunk, ReferenceChunk, TokenScores

Rows = NDArray[np.void]
"""Structured array (n_token,) of `row_type`."""

MIN_KEPT = 64
"""Fewer entries than this leave the bounds of the divergence too far apart."""


def row_type(n_kept: int) -> np.dtype[np.void]:
    """Return the layout of one token's record, 40 + 8 * n_kept bytes.

    lse         ln sum exp of all logits
    nll         negative log-likelihood of the token that follows, nats
    rest, rest_plogp   sum p and sum p ln p over the entries above the tail that are not kept
    n_bad       NaN or infinite logits
    ids, logits the n_kept most likely entries, most likely first, of equals the lowest id first
    """
    return np.dtype(
        [
            ("lse", "f8"),
            ("nll", "f8"),
            ("rest", "f8"),
            ("rest_plogp", "f8"),
            ("n_bad", "i8"),
            ("ids", "i4", (n_kept,)),
            ("logits", "f4", (n_kept,)),
        ]
    )


def count_entries_to_keep(n_token: int, n_vocab: int, n_byte: int) -> int | None:
    """Return how many entries of each token fit in `n_byte` bytes, or None if all of them fit as plain float32.

    Raises HarnessError if the room is for fewer than MIN_KEPT.
    """
    if n_token * n_vocab * 4 <= n_byte:
        return None
    n_kept = (n_byte // n_token - row_type(0).itemsize) // 8
    if n_kept < min(MIN_KEPT, n_vocab):
        raise HarnessError(
            f"the logits of {n_token} tokens do not fit in {n_byte / 2**20:.0f} MiB, not even the {MIN_KEPT} largest "
            "of each: score fewer tokens, allow more room, or set TMPDIR to a larger disk"
        )
    return min(n_kept, n_vocab)


def keep_top(logits: NDArray[np.float32], targets: NDArray[np.int32], n_kept: int, tail: float = metrics.TAIL) -> Rows:
    """Return the records of a block of tokens; `logits` (n_token, n_vocab), `targets` (n_token,) token ids."""
    rows = np.zeros(len(logits), row_type(n_kept))
    step = max(1, CHUNK_ENTRIES // logits.shape[1])
    with np.errstate(all="ignore"):
        for i in range(0, len(logits), step):
            _keep_chunk(logits[i : i + step], targets[i : i + step], tail, rows[i : i + step])
    return rows


def score_block(
    rows: Rows, other: NDArray[np.float32], targets: NDArray[np.int32], tail: float = metrics.TAIL
) -> TokenScores:
    """Score a block of tokens like `metrics.score_block`, with the reference's records in place of its logits.

    The largest logit difference is over the kept entries only. `tail` is the one the rows were made with.
    """

    def describe(part: slice) -> ReferenceChunk:
        chunk = rows[part]
        return ReferenceChunk(np.array(chunk["nll"]), chunk["ids"][:, :5], partial(_diverge, chunk, tail))

    return metrics.score_chunks(describe, other, targets)


def _keep_chunk(logits: NDArray[np.float32], targets: NDArray[np.int32], tail: float, rows: Rows) -> None:
    n_kept = rows.dtype["ids"].shape[0]
    # Likelihoods and the count of bad numbers, over the whole vocabulary.
    wide = logits.astype(np.float64)
    lse, p, total = metrics.log_sum_exp(wide.copy())
    p /= total[:, None]
    rows["lse"] = lse
    rows["nll"] = lse - wide[np.arange(len(wide)), targets]
    rows["n_bad"] = np.sum(~np.isfinite(logits), axis=1)
    # The most likely entries, sorted by logit, of equals the lowest id first.
    ids = np.argpartition(-logits, n_kept - 1, axis=1)[:, :n_kept]
    kept = np.take_along_axis(logits, ids, axis=1)
    order = np.lexsort((ids, -kept))
    rows["ids"] = np.take_along_axis(ids, order, axis=1)
    rows["logits"] = np.take_along_axis(kept, order, axis=1)
    # Sums over the rest, without what is below the tail.
    log_p = wide - lse[:, None]
    p *= log_p > tail
    np.put_along_axis(p, ids, 0.0, axis=1)
    rows["rest"] = p.sum(axis=1)
    rows["rest_plogp"] = np.einsum("ij,ij->i", p, np.where(p > 0, log_p, 0.0))


def _diverge(base: Rows, tail: float, other: LogitsChunk) -> Divergence:
    """Return the KL divergence's lower bound and the slack to its upper one; differences of kept entries only."""
    ids = base["ids"]
    # Q, the other model's mass of what is not kept; not 1 - sum of the kept, which has no digits where Q is small.
    np.put_along_axis(other.weights, ids, 0.0, axis=1)
    other_rest = other.weights.sum(axis=1) / other.total
    # The kept entries, exactly.
    q = np.take_along_axis(other.logits, ids, axis=1).astype(np.float64)
    b = base["logits"].astype(np.float64)
    log_p, log_q = b - base["lse"][:, None], q - other.lse[:, None]
    kl = np.sum(np.exp(log_p) * (log_p - log_q) * (log_p > tail), axis=1)
    overlap = np.exp(np.minimum(log_p, log_q)).sum(axis=1)
    overlap_slack = np.minimum(np.maximum(0.0, 1 - np.exp(log_p).sum(axis=1)), other_rest)
    # The rest, between its bounds.
    low, high = _bound_rest(base, other_rest, other.logits.min(axis=1) - other.lse)
    n_bad = base["n_bad"] + np.sum(~np.isfinite(other.logits), axis=1)
    return Divergence(kl + low, high - low, overlap, overlap_slack, np.abs(b - q).max(axis=1), n_bad)


def _bound_rest(rows: Rows, other_rest: Floats, log_q_min: Floats) -> tuple[Floats, Floats]:
    """Return the lower and upper bound of the KL divergence over the entries that are not kept, (n_token,) each."""
    mass = rows["rest"]
    none = mass <= 0
    low = np.where(none, 0.0, mass * np.log(mass / other_rest))
    high = np.where(none, 0.0, rows["rest_plogp"] - mass * log_q_min)
    return low, np.maximum(low, high)
