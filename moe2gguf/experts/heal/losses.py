"""The terms of the loss, in nats per token: distillation, and the text itself (https://arxiv.org/abs/1503.02531)."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(student: Tensor, teacher: Tensor, top: int = 0) -> Tensor:
    """(...,): the KL divergence of `student` from `teacher` at every token, logits (..., n_vocab) each.

    With `top` N, the teacher's N likeliest tokens are compared one by one and all others as one event: never more than
    the full divergence, and N + 1 numbers per token.
    """
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    if 0 < top < p.shape[-1]:
        p, chosen = p.topk(top, -1)
        q = q.gather(-1, chosen)
        p, q = (torch.cat([x, _log_rest(x)], -1) for x in (p, q))
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _log_rest(log_p: Tensor) -> Tensor:
    """(..., 1): the log-probability of all other tokens, from those of some (..., N)."""
    left = 1 - log_p.exp().sum(-1, keepdim=True)
    return left.clamp_min(1e-7).log()


def next_ids(ids: Tensor) -> Tensor:
    """(..., n_context): the token after each of `ids`; -1 after the last of a window, which has none."""
    return torch.nn.functional.pad(ids[..., 1:], (0, 1), value=-1)


def next_token_loss(student: Tensor, following: Tensor) -> Tensor:
    """(n_token,): minus the log-probability of the token that follows, logits (n_token, n_vocab); 0 where it is -1."""
    return torch.nn.functional.cross_entropy(student.float(), following, ignore_index=-1, reduction="none")
