"""Scores of the whole model on held-out text, at every count of experts used that matters."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe2gguf.experts.heal.log import ScoreLine
from moe2gguf.experts.heal.losses import TOKENS, kl_divergence, next_token_loss, sum_terms
from moe2gguf.experts.heal.settings import Windows
from moe2gguf.experts.heal.student import set_used
from moe2gguf.experts.heal.teacher import Teacher
from moe2gguf.experts.hidden_states import chunks


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def score_model(student: Any, teacher: Teacher, held_out: Windows, used: Sequence[int], step: int) -> ScoreLine:
    """The scores after `step` steps, not called the best yet."""
    student.eval()
    device, head = next(student.parameters()).device, student.get_output_embeddings()
    kl: dict[str, float] = dict.fromkeys(map(str, used), 0.0)
    nll = dict(kl)
    nll_dense = []
    for window in held_out:
        ids = torch.from_numpy(window[None]).to(device)
        base, following = teacher.last_states(window[None])[0, :-1], ids[0, 1:]
        parts = chunks(len(base), TOKENS)
        nll_dense.append(torch.cat([next_token_loss(teacher.logits(base[p]), following[p]) for p in parts]))

        def measure(hidden: Tensor, part: slice, base: Tensor = base, following: Tensor = following) -> Tensor:
            logits = head(hidden)
            terms = kl_divergence(logits, teacher.logits(base[part])), next_token_loss(logits, following[part])
            return torch.stack([term.sum() for term in terms])

        for k in used:
            set_used(student, k)
            last = student(ids, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
            scores = sum_terms(last[0, :-1], measure) / (len(base) * len(held_out))
            kl[str(k)] += float(scores[0])
            nll[str(k)] += float(scores[1])
    return ScoreLine(step, False, kl, nll, float(torch.cat(nll_dense).mean()))
