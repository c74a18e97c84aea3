"""What speculative decoding gives: a fast file drafts g tokens, the target checks them in one batch and keeps a start.

A round takes g draft tokens and one batch of g + 1 tokens of the target, and yields (1 - a^(g+1)) / (1 - a) tokens on
average, where a is the acceptance: Leviathan, Kalman and Matias, Fast Inference from Transformers via Speculative
Decoding, equation 1 and theorem 3.8, https://arxiv.org/abs/2211.17192. There a batch costs what a token costs; here it
costs what was measured. As there, every token is taken to be accepted with the same probability.

llama.cpp drafts the most likely token, and keeps it where the target's own sampler takes the same one. With greedy
answers that is what the theory says. With sampled ones the theory keeps a token drawn from the draft with probability
min(1, p / q), which llama.cpp's server does not do:
https://github.com/ggml-org/llama.cpp/blob/001d906a6d86e2490e394361e7cc6f478b100088/common/speculative.cpp
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class DraftGain:
    """The best that a draft gives its target: tokens drafted each round, and speed over the target's own.

    `speed_up` at most 1 means that drafting cannot pay; `n_draft` is then the least bad of those that were timed.
    """

    n_draft: int
    speed_up: float


@dataclass(frozen=True)
class DraftGains:
    """The best gain of a file as a draft of the reference: with greedy answers, and by speculative sampling."""

    greedy: DraftGain
    sampled: DraftGain

    @property
    def best(self) -> float:
        """The larger speed-up of both."""
        return max(self.greedy.speed_up, self.sampled.speed_up)


def expect_tokens(acceptance: float, n_draft: int) -> float:
    """Return the mean number of tokens of a round with `n_draft` drafted ones: 1 to n_draft + 1."""
    return sum(acceptance**i for i in range(n_draft + 1))


def find_best_draft(
    acceptance: float, draft_time: float, target_time: float, verification: Mapping[int, float]
) -> DraftGain:
    """Return the draft length with the highest speed-up.

    Args:
        acceptance: probability that a drafted token is kept.
        draft_time: seconds of the draft for a token.
        target_time: seconds of the target for a token without a draft.
        verification: by draft length g, seconds of the target for g + 1 tokens in one batch.

    Raises ValueError without a draft length.
    """
    return max(
        (
            DraftGain(g, target_time * expect_tokens(acceptance, g) / (g * draft_time + seconds))
            for g, seconds in verification.items()
        ),
        key=lambda gain: gain.speed_up,
    )
