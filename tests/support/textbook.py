"""The metrics as a textbook writes them: one token and one vocabulary entry at a time, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe2gguf.measure import metrics


def textbook_token(base: NDArray[Any], other: NDArray[Any], target: int, tail: float) -> dict[str, float]:
    """The scores of one token, straight from their definitions."""

    def log_softmax(x: NDArray[Any]) -> list[float]:
        highest = max(float(v) for v in x)
        log_sum = highest + math.log(math.fsum(math.exp(float(v) - highest) for v in x))
        return [float(v) - log_sum for v in x]

    def best(x: NDArray[Any], n: int) -> list[int]:
        return sorted(range(len(x)), key=lambda i: (-float(x[i]), i))[:n]

    lp, lq = log_softmax(base), log_softmax(other)
    return {
        "nll": -lq[target],
        "nll_base": -lp[target],
        "kl": math.fsum(math.exp(p) * (p - q) for p, q in zip(lp, lq, strict=True) if p > tail),
        "p_change": math.exp(lq[target]) - math.exp(lp[target]),
        "same_top": float(best(base, 1) == best(other, 1)),
        "top5_overlap": len(set(best(base, 5)) & set(best(other, 5))) / min(5, len(base)),
        "max_difference": max(abs(float(p) - float(q)) for p, q in zip(base, other, strict=True)),
        "kl_slack": 0.0,
        "overlap": math.fsum(min(math.exp(p), math.exp(q)) for p, q in zip(lp, lq, strict=True)),
        "overlap_slack": 0.0,
        "n_bad": 0,
    }


def textbook_summary(tokens: list[dict[str, float]]) -> dict[str, float]:
    n = len(tokens)

    def mean(values: list[float]) -> tuple[float, float]:
        average = math.fsum(values) / n
        return average, math.sqrt(math.fsum((v - average) ** 2 for v in values) / n / (n - 1))

    def column(name: str) -> list[float]:
        return [token[name] for token in tokens]

    def percentile(values: list[float], percent: float) -> float:
        values, place = sorted(values), percent / 100 * (n - 1)
        low = int(place)
        return values[low] + (place - low) * (values[min(low + 1, n - 1)] - values[low])

    nll, nll_error = mean(column("nll"))
    base, base_error = mean(column("nll_base"))
    products = [(a - nll) * (b - base) for a, b in zip(column("nll"), column("nll_base"), strict=True)]
    covariance = math.fsum(products) / n / (n - 1)
    square, square_error = mean([v**2 for v in column("p_change")])
    top1 = math.fsum(column("same_top")) / n
    kl, kl_error = mean(column("kl"))
    acceptance, acceptance_error = mean(column("overlap"))
    return {
        "n_token": n,
        "perplexity": math.exp(nll),
        "perplexity_error": math.exp(nll) * nll_error,
        "perplexity_base": math.exp(base),
        "perplexity_base_error": math.exp(base) * base_error,
        "log_ratio": nll - base,
        "log_ratio_error": math.sqrt(nll_error**2 + base_error**2 - 2 * covariance),
        "correlation": covariance / (nll_error * base_error),
        "kl_mean": kl,
        "kl_error": kl_error,
        "kl_max": max(column("kl")),
        **{f"kl_percentiles.{p:g}": percentile(column("kl"), p) for p in metrics.PERCENTILES},
        "p_change_mean": math.fsum(column("p_change")) / n,
        "p_change_rms": math.sqrt(square),
        "p_change_rms_error": 0.5 / math.sqrt(square) * square_error,
        "top1": top1,
        "top1_error": math.sqrt(top1 * (1 - top1) / (n - 1)),
        "top5": math.fsum(column("top5_overlap")) / n,
        "max_difference": max(column("max_difference")),
        "kl_slack": 0.0,
        "acceptance": acceptance,
        "acceptance_error": acceptance_error,
        "acceptance_slack": 0.0,
        "n_bad": 0,
    }


def logits(n_token: int, n_vocab: int, noise: float, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(seed)
    base = (5 * rng.standard_normal((n_token, n_vocab)) + 20).astype(np.float32)
    other = (base + noise * rng.standard_normal(base.shape)).astype(np.float32)
    return base, other, rng.integers(0, n_vocab, n_token, dtype=np.int32)
