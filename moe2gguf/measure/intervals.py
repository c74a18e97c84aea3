"""How sure a difference is: confidence intervals of means over windows, by Student's t.

Windows are computed independently of each other, so their means are the independent samples that a t interval
assumes; tokens of one window are not. Two files are compared on the same windows (paired), which takes the difficulty
of the text out of the difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

LEVEL = 0.95
"""The probability that an interval holds the true mean."""


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval at `LEVEL`; infinite below two samples."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def mean_interval(samples: Sequence[float]) -> Interval:
    """Return the t interval of the mean of `samples`. Raises ValueError without any."""
    n = len(samples)
    if n == 0:
        raise ValueError("no samples for an interval")
    mean = math.fsum(samples) / n
    if n == 1:
        return Interval(mean, -math.inf, math.inf)
    variance = math.fsum((x - mean) ** 2 for x in samples) / (n - 1)
    half = t_quantile(0.5 + LEVEL / 2, n - 1) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half)


def paired_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Return the interval of the mean of `first - second`, window by window. Raises ValueError for unequal lengths."""
    return mean_interval([a - b for a, b in zip(first, second, strict=True)])


def share_interval(n_right: int, n: int) -> Interval:
    """Return the share n_right / n of independent trials with Wilson's score interval; all of 0 ... 1 without trials.

    It stays within 0 ... 1 and has a width at both ends. Wilson, Probable inference, the law of succession, and
    statistical inference, JASA 22 (1927): https://doi.org/10.1080/01621459.1927.10502953
    """
    if n == 0:
        return Interval(math.nan, 0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    share, weight = n_right / n, z * z / n
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / n + weight / n / 4)
    return Interval(share, middle - half if n_right else 0.0, middle + half if n_right < n else 1.0)


def t_quantile(probability: float, n_free: int) -> float:
    """Return x with P(T <= x) = probability >= 1/2 for Student's t with `n_free` >= 1 degrees of freedom."""
    low, high = 0.0, 1.0
    while t_probability(high, n_free) < probability:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        if t_probability(middle, n_free) < probability:
            low = middle
        else:
            high = middle
    return high


def t_probability(x: float, n_free: int) -> float:
    """Return P(T <= x), x >= 0, from the finite series for whole degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(x / math.sqrt(n_free))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = n_free % 2 == 1
    term = cosine if odd else 1.0
    total = term if n_free > 1 else 0.0
    for i in range(3 if odd else 2, n_free - 1, 2):
        term *= cosine**2 * (i - 1) / i
        total += term
    share = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + share / 2
