"""How far one model's logits are from another's: per token first, then in sums over tokens.

The definitions are those of llama.cpp's perplexity tool, so results can be read beside its own:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/tools/perplexity/perplexity.cpp#L191 (per token) and
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/tools/perplexity/perplexity.cpp#L1890 (sums). What differs:
sums and exponentials are float64 throughout, the base logits are not rounded to 16 bit, standard errors exist
from two tokens on, and top-5 overlap, largest logit difference and the count of bad numbers are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TAIL = -16.0
"""Natural logarithm of the base probability below which llama.cpp leaves an entry out of the KL divergence."""

PERCENTILES = (0.1, 1.0, 5.0, 10.0, 50.0, 90.0, 95.0, 99.0, 99.9)

CHUNK_ENTRIES = 2**17
"""Logits per step: the working arrays (float64) stay in the processor's cache."""


@dataclass(frozen=True)
class TokenScores:
    """What is kept of every scored token; each array has shape (n_token,).

    nll, nll_base   negative log-likelihood of the token that follows, nats
    kl              KL divergence of the next-token distributions, base -> other, nats
    p_change        probability of the token that follows, other minus base
    same_top        1 where both have the same most likely token, else 0
    top5_overlap    share of the base's five most likely tokens that the other has among its five
    max_difference  largest |logit difference| over the vocabulary
    kl_slack        how much larger than `kl` the KL divergence may be; above 0 only against a compact reference
    overlap         sum of min(p_base, p_other): how likely the other's sampled token is accepted as a draft
    overlap_slack   how much larger than `overlap` it may be; above 0 only against a compact reference
    n_bad           NaN or infinite logits of either model
    """

    nll: Floats
    nll_base: Floats
    kl: Floats
    p_change: Floats
    same_top: Floats
    top5_overlap: Floats
    max_difference: Floats
    kl_slack: Floats
    overlap: Floats
    overlap_slack: Floats
    n_bad: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.nll)


@dataclass(frozen=True)
class Summary:
    """The scores of n_token tokens in one line. Errors are standard errors of the mean, NaN below two tokens.

    Any NaN or infinite logit makes n_bad > 0 and the means it touches NaN: it is never averaged away.
    """

    n_token: int
    perplexity: float
    perplexity_error: float
    perplexity_base: float
    perplexity_base_error: float
    log_ratio: float  # ln(perplexity / perplexity_base)
    log_ratio_error: float
    correlation: float  # of both models' nll
    kl_mean: float
    kl_error: float
    kl_max: float
    kl_percentiles: dict[str, float]
    p_change_mean: float
    p_change_rms: float
    p_change_rms_error: float
    top1: float  # share of tokens with the same most likely next token
    top1_error: float
    top5: float
    max_difference: float
    kl_slack: float  # the mean KL divergence is in kl_mean ... kl_mean + kl_slack
    acceptance: float  # share of sampled drafts that the base accepts; of greedy ones it is top1
    acceptance_error: float
    acceptance_slack: float  # the acceptance is in acceptance ... acceptance + acceptance_slack
    n_bad: int

    @property
    def ratio(self) -> float:
        """The perplexity as a multiple of the base's."""
        return exp(self.log_ratio)

    @property
    def ratio_error(self) -> float:
        """The standard error of `ratio`: of both models on the same tokens, so what these are like cancels out."""
        return self.ratio * self.log_ratio_error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Summary:
        """Return what `as_json` was made of; None becomes NaN. Raises TypeError for missing or other fields."""
        return cls(**{key: _number(value) for key, value in values.items()})


def score_block(
    base: NDArray[np.float32], other: NDArray[np.float32], targets: NDArray[np.int32], tail: float = TAIL
) -> TokenScores:
    """Score a block of tokens; `base` and `other` are logits (n_token, n_vocab), `targets` (n_token,) token ids.

    KL sums p_base * (ln p_base - ln p_other) over the entries with ln p_base > `tail`; -inf takes them all.
    """

    def describe(part: slice) -> ReferenceChunk:
        chunk = LogitsChunk.of(base[part])
        return ReferenceChunk(chunk.nll(targets[part]), top_ids(base[part], 5), partial(_diverge, chunk, tail))

    return score_chunks(describe, other, targets)


def score_chunks(
    describe: Callable[[slice], ReferenceChunk], other: NDArray[np.float32], targets: NDArray[np.int32]
) -> TokenScores:
    """Score a block of tokens, as many at a time as the processor's cache holds.

    `other` are logits (n_token, n_vocab), `targets` (n_token,) token ids; `describe` gives the reference of a part.
    """
    step = max(1, CHUNK_ENTRIES // other.shape[1])
    chunks = [slice(i, i + step) for i in range(0, len(other), step)]
    with np.errstate(all="ignore"):  # bad numbers are counted, not warned about
        return join_scores(_score_chunk(describe(chunk), other[chunk], targets[chunk]) for chunk in chunks)


def join_scores(parts: Iterable[TokenScores]) -> TokenScores:
    """Concatenate the scores of consecutive tokens, at least one part."""
    columns = zip(*([getattr(part, f.name) for f in fields(TokenScores)] for part in parts), strict=True)
    return TokenScores(*(np.concatenate(column) for column in columns))


def summarize(scores: TokenScores) -> Summary:
    """Return the sums over all tokens. Raises ValueError without any token."""
    if len(scores) == 0:
        raise ValueError("no scored token to summarize")
    with np.errstate(all="ignore"):  # bad numbers are counted, not warned about
        return _summarize(scores, len(scores))


def _summarize(scores: TokenScores, n: int) -> Summary:
    nll, nll_error = _mean(scores.nll)
    nll_base, nll_base_error = _mean(scores.nll_base)
    covariance = float(np.mean(scores.nll * scores.nll_base) - nll * nll_base) / (n - 1) if n > 1 else math.nan
    kl, kl_error = _mean(scores.kl)
    mean_square, mean_square_error = _mean(scores.p_change**2)
    rms = math.sqrt(mean_square)
    top1 = float(np.mean(scores.same_top))
    acceptance, acceptance_error = _mean(scores.overlap)
    return Summary(
        n_token=n,
        perplexity=exp(nll),
        perplexity_error=exp(nll) * nll_error,
        perplexity_base=exp(nll_base),
        perplexity_base_error=exp(nll_base) * nll_base_error,
        log_ratio=nll - nll_base,
        log_ratio_error=_root(nll_error**2 + nll_base_error**2 - 2 * covariance),
        correlation=_ratio(covariance, nll_error * nll_base_error),
        kl_mean=kl,
        kl_error=kl_error,
        kl_max=float(np.max(scores.kl)),
        kl_percentiles={f"{p:g}": float(np.percentile(scores.kl, p)) for p in PERCENTILES},
        p_change_mean=float(np.mean(scores.p_change)),
        p_change_rms=rms,
        p_change_rms_error=_ratio(0.5 * mean_square_error, rms) if rms else 0.0,
        top1=top1,
        top1_error=_root(top1 * (1 - top1) / (n - 1)) if n > 1 else math.nan,
        top5=float(np.mean(scores.top5_overlap)),
        max_difference=float(np.max(scores.max_difference)),
        kl_slack=float(np.mean(scores.kl_slack)),
        acceptance=acceptance,
        acceptance_error=acceptance_error,
        acceptance_slack=float(np.mean(scores.overlap_slack)),
        n_bad=int(np.sum(scores.n_bad)),
    )


@dataclass(frozen=True)
class LogitsChunk:
    """A model's logits of a chunk of tokens, and their softmax before it is divided by its sum.

    logits   (n_token, n_vocab) float32
    lse      (n_token,): ln sum exp of them
    weights  (n_token, n_vocab): exp(logit - largest logit); whoever reads it may overwrite it
    total    (n_token,): the sum of the weights
    """

    logits: NDArray[np.float32]
    lse: Floats
    weights: Floats
    total: Floats

    @classmethod
    def of(cls, logits: NDArray[np.float32]) -> LogitsChunk:
        """Return the chunk with these logits."""
        return cls(logits, *log_sum_exp(logits.astype(np.float64)))

    def nll(self, targets: NDArray[np.int32]) -> Floats:
        """Return the negative log-likelihood of `targets` (n_token,), the tokens that follow: nats, (n_token,)."""
        chosen: NDArray[np.float32] = self.logits[np.arange(len(targets)), targets]
        return self.lse - chosen.astype(np.float64)


class Divergence(NamedTuple):
    """How far a chunk is from its reference: the fields of `TokenScores` that need more than likelihoods and ranks."""

    kl: Floats
    kl_slack: Floats
    overlap: Floats
    overlap_slack: Floats
    max_difference: Floats
    n_bad: NDArray[np.int64]


class ReferenceChunk(NamedTuple):
    """The reference of a chunk of tokens, whether all of its logits are known or some.

    nll       negative log-likelihood of the token that follows, nats, (n_token,)
    top_ids   ids of the five most likely tokens, (n_token, at most 5), most likely first
    diverge   how far another model is: exactly, or within bounds
    """

    nll: Floats
    top_ids: NDArray[Any]
    diverge: Callable[[LogitsChunk], Divergence]


def _score_chunk(reference: ReferenceChunk, logits: NDArray[np.float32], targets: NDArray[np.int32]) -> TokenScores:
    # Likelihoods, and the divergence of the distributions.
    other = LogitsChunk.of(logits)
    nll, nll_base = other.nll(targets), reference.nll
    found = reference.diverge(other)

    # Ranks: the order among NaN and infinite logits means nothing, so such tokens get NaN.
    top, top_base = top_ids(logits, 5), reference.top_ids
    same_top = (top_base[:, 0] == top[:, 0]).astype(np.float64)
    top5_overlap = (top_base[:, :, None] == top[:, None, :]).any(axis=2).mean(axis=1)
    same_top[found.n_bad > 0] = np.nan
    top5_overlap[found.n_bad > 0] = np.nan
    return TokenScores(
        nll=nll,
        nll_base=nll_base,
        p_change=np.exp(-nll) - np.exp(-nll_base),
        same_top=same_top,
        top5_overlap=top5_overlap,
        **found._asdict(),
    )


def _diverge(base: LogitsChunk, tail: float, other: LogitsChunk) -> Divergence:
    """Return the exact KL divergence, with p the reference and q the other model, over the entries above the tail.

    sum p (ln p - ln q) = sum p (b - o) - (lse_b - lse_o) sum p, where b and o are the logits.
    """
    difference = np.subtract(base.logits, other.logits, dtype=np.float64)
    overlap = _overlap(base, other)
    # Entries below the tail are left out of both sums, as llama.cpp does.
    p = base.weights
    if tail > -np.inf:
        p *= base.logits > (base.lse + tail)[:, None]
    kl = (np.einsum("ij,ij->i", p, difference) - (base.lse - other.lse) * p.sum(axis=1)) / base.total
    # A NaN or infinity anywhere in either model makes the largest difference one: only such rows are counted.
    np.abs(difference, out=difference)
    max_difference = difference.max(axis=1)
    n_bad = _count_bad(base.logits, other.logits, max_difference)
    return Divergence(kl, np.zeros(len(kl)), overlap, np.zeros(len(kl)), max_difference, n_bad)


def _overlap(base: LogitsChunk, other: LogitsChunk) -> Floats:
    """Return sum min(p, q) over the whole vocabulary, (n_token,); overwrites the other's weights.

    It is how likely speculative sampling accepts a token drawn from q: Leviathan, Kalman and Matias, theorem 3.5 and
    corollary 3.6, https://arxiv.org/abs/2211.17192
    """
    q = other.weights
    q *= (base.total / other.total)[:, None]
    np.minimum(base.weights, q, out=q)
    overlap: Floats = q.sum(axis=1) / base.total
    return overlap


def log_sum_exp(x: Floats) -> tuple[Floats, Floats, Floats]:
    """Return ln sum exp(x) (n,), exp(x - max) (n, n_vocab) and its sum (n,); overwrites `x` with the second."""
    highest = x.max(axis=1)
    x -= highest[:, None]
    np.exp(x, out=x)
    total = x.sum(axis=1)
    return highest + np.log(total), x, total


def top_ids(logits: NDArray[np.float32], n: int) -> NDArray[np.intp]:
    """Return the ids of the n highest logits of each row, (n_token, min(n, n_vocab)); of equals the lowest id first."""
    left = logits.copy()
    row = np.arange(len(left))
    best = np.empty((len(left), min(n, left.shape[1])), np.intp)
    for rank in range(best.shape[1]):
        best[:, rank] = left.argmax(axis=1)
        left[row, best[:, rank]] = -np.inf
    return best


def _count_bad(base: NDArray[np.float32], other: NDArray[np.float32], max_difference: Floats) -> NDArray[np.int64]:
    """Count NaN and infinite logits per row, (n_token,); only rows with a bad difference are looked at."""
    n_bad = np.zeros(len(base), np.int64)
    for i in np.flatnonzero(~np.isfinite(max_difference)):
        n_bad[i] = np.sum(~np.isfinite(base[i])) + np.sum(~np.isfinite(other[i]))
    return n_bad


def _mean(x: Floats) -> tuple[float, float]:
    """Return the mean and its standard error, sqrt(population variance / (n - 1))."""
    return float(np.mean(x)), float(np.std(x)) / math.sqrt(len(x) - 1) if len(x) > 1 else math.nan


def exp(x: float) -> float:
    """Return e to the x, infinity where that is too large."""
    return math.exp(x) if x < 700 else math.inf


def _root(x: float) -> float:
    return math.sqrt(max(0.0, x)) if math.isfinite(x) else math.nan


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _number(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    return math.nan if value is None else value


def as_json(value: Any) -> Any:
    """Return a value in JSON types: of a record its fields, of a path its text, of a number that is not finite None."""
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
