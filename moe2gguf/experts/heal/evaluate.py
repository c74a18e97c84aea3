"""Scores on held-out text at every count of interest: divergence from the dense model, and loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe2gguf.experts.heal import losses
from moe2gguf.experts.heal.settings import HealSettings, Windows
from moe2gguf.experts.heal.student import use
from moe2gguf.experts.heal.sum_terms import TOKENS, summed
from moe2gguf.experts.heal.teacher import Teacher
from moe2gguf.experts.hidden_states import chunks


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def evaluate(student: Any, teacher: Teacher, held_out: Windows, settings: HealSettings) -> dict[str, Any]:
    """`kl` and `nll` (nats per token) by count, the dense model's `nll_dense`, and the mean `kl_mean` that decides."""
    student.eval()
    device, head = next(student.parameters()).device, student.get_output_embeddings()
    kl: dict[str, float] = dict.fromkeys(map(str, settings.evaluate_at), 0.0)
    nll = dict(kl)
    dense_nll = []
    for window in held_out:
        ids = torch.from_numpy(window[None]).to(device)
        base, following = teacher.last(window[None])[0, :-1], ids[0, 1:]
        parts = chunks(len(base), TOKENS)
        dense_nll.append(torch.cat([losses.next_token(teacher.head(base[p]), following[p]) for p in parts]))

        def measure(hidden: Tensor, part: slice, base: Tensor = base, following: Tensor = following) -> Tensor:
            logits = head(hidden)
            terms = losses.kl(logits, teacher.head(base[part])), losses.next_token(logits, following[part])
            return torch.stack([term.sum() for term in terms])

        for k in settings.evaluate_at:
            use(student, k)
            last = student(ids, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
            scores = summed(last[0, :-1], measure) / (len(base) * len(held_out))
            kl[str(k)] += float(scores[0])
            nll[str(k)] += float(scores[1])
    means = {"nll_dense": float(torch.cat(dense_nll).mean()), "kl_mean": sum(kl.values()) / len(kl)}
    return {"kl": kl, "nll": nll, **means}
