"""Held-out text at every count of interest: divergence from the dense model, and how many experts tokens need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe2gguf.experts.heal import losses
from moe2gguf.experts.heal.plan import HealSettings, Windows
from moe2gguf.experts.heal.student import routers, use
from moe2gguf.experts.heal.teacher import Teacher


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def evaluate(student: Any, teacher: Teacher, held_out: Windows, settings: HealSettings) -> dict[str, Any]:
    """`kl` and `nll` (nats per token) by count, the dense model's `nll_dense`, the mean `kl_mean` that decides, and

    `needed`: the average number of experts at which a router that stops at `settings.threshold` of the probability
    would stop, for all tokens, for the half that the dense model predicts best, and for the other half.
    """
    student.eval()
    device = next(student.parameters()).device
    kl: dict[str, float] = dict.fromkeys(map(str, settings.evaluate_at), 0.0)
    nll, dense = dict(kl), 0.0
    counts, losses_of = [], []
    for window in held_out:
        ids = torch.from_numpy(window[None]).to(device)
        base = teacher.logits(window[None])[:, :-1]
        token_nll = _nll(base, ids)
        dense += float(token_nll.mean()) / len(held_out)
        for k in settings.evaluate_at:
            use(student, k)
            logits = student(ids).logits[:, :-1]
            kl[str(k)] += float(losses.kl(logits, base)) / len(held_out)
            nll[str(k)] += float(_nll(logits, ids).mean()) / len(held_out)
        counts.append(_needed(student, settings.threshold)[:-1])
        losses_of.append(token_nll.flatten())
    count, hardness = torch.cat(counts).float(), torch.cat(losses_of)
    easy = hardness <= hardness.median()
    needed = {"all": float(count.mean()), "easy": float(count[easy].mean()), "hard": float(count[~easy].mean())}
    return {"kl": kl, "nll": nll, "nll_dense": dense, "kl_mean": sum(kl.values()) / len(kl), "needed": needed}


def _nll(logits: Tensor, ids: Tensor) -> Tensor:
    """(1, n_token - 1): minus the log-probability of each next token."""
    return -logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def _needed(student: Any, threshold: float) -> Tensor:
    """(n_token,): mean over layers, from the last forward pass."""
    return torch.stack([losses.needed(r.logits, threshold).float() for r in routers(student)]).mean(0)
