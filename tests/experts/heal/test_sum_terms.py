"""moe2gguf.experts.heal.losses: what is summed piece by piece is the sum, and so is its gradient."""

from typing import Any

import pytest
import torch

from moe2gguf.experts.heal import losses
from moe2gguf.experts.heal.losses import TOKENS, sum_terms


def test_terms_and_gradient_are_those_of_all_tokens_at_once() -> None:
    """Two terms over an odd number of tokens, scaled from outside: as torch gives them without pieces."""
    generator = torch.Generator().manual_seed(0)
    n_token, d_model, n_vocab = 2 * TOKENS + 5, 6, 11
    matrix, dense = (torch.randn(n_vocab, d_model, generator=generator) for _ in range(2))
    teacher = torch.randn(n_token, d_model, generator=generator)
    following = torch.randint(0, n_vocab, (n_token,), generator=generator)

    def measure(hidden: Any, part: Any) -> Any:
        logits = hidden @ matrix.T
        terms = (
            losses.kl_divergence(logits, teacher[part] @ dense.T),
            0.5 * losses.next_token_loss(logits, following[part]),
        )
        return torch.stack([term.sum() for term in terms])

    hidden = torch.randn(n_token, d_model, generator=generator)
    pieces, whole = (hidden.clone().requires_grad_() for _ in range(2))
    terms, expected = sum_terms(pieces, measure), measure(whole, slice(None))
    (3 * terms.sum()).backward()
    (3 * expected.sum()).backward()

    assert expected.tolist() == pytest.approx(terms.tolist(), rel=1e-5)
    assert torch.allclose(whole.grad, pieces.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert expected.tolist() == pytest.approx(sum_terms(hidden, measure).tolist(), rel=1e-5)
