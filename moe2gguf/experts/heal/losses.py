"""The terms of the loss; sources: `moe2gguf.experts.methods.LOSSES`. Everything is in nats per token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kl(student: Tensor, teacher: Tensor, top: int = 0) -> Tensor:
    """(...,): the KL divergence of `student` from `teacher` at every token, logits (..., n_vocab) each.

    With `top` N, the teacher's N likeliest tokens are compared one by one and all others as one event: never more than
    the full divergence, and N + 1 numbers per token.
    """
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    if 0 < top < p.shape[-1]:
        p, chosen = p.topk(top, -1)
        q = q.gather(-1, chosen)
        p, q = (torch.cat([x, _rest(x)], -1) for x in (p, q))
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _rest(log_p: Tensor) -> Tensor:
    """(..., 1): the log-probability of all other tokens, from those of some (..., N)."""
    left = 1 - log_p.exp().sum(-1, keepdim=True)
    return left.clamp_min(1e-7).log()


def following(ids: Tensor) -> Tensor:
    """(..., n_context): the token after each of `ids`; -1 after the last of a window, which has none."""
    return torch.nn.functional.pad(ids[..., 1:], (0, 1), value=-1)


def next_token(student: Tensor, following: Tensor) -> Tensor:
    """(n_token,): minus the log-probability of the token that follows, logits (n_token, n_vocab); 0 where it is -1."""
    return torch.nn.functional.cross_entropy(student.float(), following, ignore_index=-1, reduction="none")


def hidden(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over layers of |student - teacher|^2 / |teacher|^2, (..., d_model) each, token by token."""
    terms = [
        ((s - t).square().sum(-1) / t.square().sum(-1).clamp_min(1e-12)).mean()
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).mean()


def balance(logits: Tensor, chosen: Tensor) -> Tensor:
    """n * sum_e f_e P_e of logits (n_token, n_expert) and chosen (n_token, k): 1 where even, n where all is one expert.

    f_e is the share of choices that fall on expert e, P_e its mean probability; the gradient flows through P.
    """
    n = logits.shape[-1]
    share = torch.nn.functional.one_hot(chosen, n).float().mean((0, 1))
    return n * (share * logits.softmax(-1).mean(0)).sum()


def z(logits: Tensor) -> Tensor:
    """Mean squared log-sum-exp of logits (n_token, n_expert)."""
    return logits.logsumexp(-1).square().mean()


def few(logits: Tensor) -> Tensor:
    """Mean entropy of softmax(logits), (n_token, n_expert): 0 for one sure expert, ln n for no preference."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def needed(logits: Tensor, threshold: float) -> Tensor:
    """(n_token,): how many experts a router would run that stops at `threshold` of the probability."""
    p = logits.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    return (p < threshold).sum(-1).add(1).clamp_max(p.shape[-1])
