"""The terms of the loss, in nats per token: distillation, and the text itself (https://arxiv.org/abs/1503.02531).

They are summed over pieces of the tokens, for the logits of a whole step would be gigabytes. Where the loss is a sum
over tokens, its gradient is known as soon as a piece of it is: it is computed at once, piece by piece, and only the
gradient of the hidden states is kept (as fused linear cross-entropy kernels do, https://arxiv.org/abs/2410.10989,
section 3.2, but for any loss).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe2gguf.experts.hidden_states import chunks

TOKENS = 128
"""Tokens of a piece: enough for fast products, few enough that memory is reused instead of allocated."""

Terms = Callable[[Tensor, slice], Tensor]
"""(hidden states of some tokens, which tokens they are) -> their part of every term (n_term,), a sum over tokens."""


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


def sum_terms(hidden: Tensor, terms: Terms) -> Tensor:
    """The terms (n_term,) of all tokens, hidden (n_token, d_model). Only the sum of the terms has a gradient."""
    if torch.is_grad_enabled() and hidden.requires_grad:
        result: Tensor = _SumTerms.apply(hidden, terms)
        return result
    return torch.stack([terms(hidden[part], part) for part in chunks(len(hidden), TOKENS)]).sum(0)


class _SumTerms(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, terms: Terms) -> Tensor:
        """The terms; the gradient of their sum is computed here and kept."""
        gradient, found = torch.empty_like(hidden), []
        for part in chunks(len(hidden), TOKENS):
            with torch.enable_grad():
                piece = hidden[part].detach().requires_grad_()
                values = terms(piece, part)
                (gradient[part],) = torch.autograd.grad(values.sum(), piece)
            found.append(values.detach())
        ctx.save_for_backward(gradient)
        return torch.stack(found).sum(0)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        """The kept gradient times `outer` (n_term,), which has the same number for each term of a sum."""
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None
