"""moe2gguf.experts.heal.losses and .router: every term against an example worked by hand."""

import math

import pytest
import torch

from moe2gguf.experts.heal import losses
from moe2gguf.experts.heal.router import LARGEST, Router, find_scale

LOG2, LOG3 = math.log(2), math.log(3)


def test_kl_by_hand() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): 1/2 ln 2 + 1/2 ln(2/3)."""
    teacher, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, LOG3]])

    assert 0.5 * math.log(2) + 0.5 * math.log(2 / 3) == pytest.approx(
        float(losses.kl_divergence(student, teacher).mean()), abs=1e-6
    )
    assert 0 == pytest.approx(float(losses.kl_divergence(teacher, teacher).mean()), abs=1e-6)


def test_the_likeliest_tokens_and_the_rest_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4), N = 1: events 1/2, 1/2 against 1/4, 3/4; N = 3 is all of them."""
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    student = torch.tensor([[0.25, 0.5, 0.25]]).log()
    full = 0.5 * math.log(2) + 0.25 * math.log(1 / 2)

    assert 0.5 * math.log(2) + 0.5 * math.log(2 / 3) == pytest.approx(
        float(losses.kl_divergence(student, teacher, 1).mean()), abs=1e-6
    )
    assert full == pytest.approx(float(losses.kl_divergence(student, teacher, 3).mean()), abs=1e-6)
    assert full == pytest.approx(float(losses.kl_divergence(student, teacher, 0).mean()), abs=1e-6)


def test_next_token_by_hand() -> None:
    """Token 0 is followed by token 1, q = 3/4; that by token 0, q = 1/2; the last predicts none."""
    logits = torch.tensor([[0.0, LOG3], [0.0, 0.0], [9.0, 0.0]])
    following = losses.next_ids(torch.tensor([[0, 1, 0]]))[0]

    assert [1, 0, -1] == following.tolist()
    assert [-math.log(0.75), LOG2, 0] == pytest.approx(losses.next_token_loss(logits, following).tolist(), abs=1e-6)


def test_an_ordering_only_router_runs_as_stored_and_learns_as_if_it_were_not() -> None:
    """Forward: the plain softmax of the tiny rows, 1/k each; backward: the gradient of logits of order one."""
    torch.manual_seed(0)
    rows, x = torch.randn(4, 8) * 1e-4, torch.randn(16, 8)
    scale = find_scale(rows, x)
    router = Router(rows, scale)
    router.use(2)

    _, weights, chosen = router(x)
    expected = (x @ rows.T).softmax(-1).topk(2)
    (weights[:, 0] ** 2).sum().backward()

    assert LARGEST == pytest.approx(float((x @ router.weight.detach().T).abs().max()))
    assert torch.equal(expected.indices, chosen)
    assert torch.allclose(weights, torch.full_like(weights, 0.5), atol=1e-3)
    assert torch.allclose(rows, router.rows, rtol=1e-6)
    w = torch.full((16, 2), 0.5)
    first, second = chosen[:, 0], chosen[:, 1]
    by_hand = torch.zeros(4, 8)  # d w0^2 / d logit = 2 w0 * w0 (1 - w0), with the opposite sign for the other expert
    slope = 2 * w[:, 0] * w[:, 0] * (1 - w[:, 0])
    by_hand.index_add_(0, first, slope[:, None] * x)
    by_hand.index_add_(0, second, -slope[:, None] * x)
    assert torch.allclose(by_hand, router.weight.grad, atol=1e-2)


def test_a_router_with_a_real_softmax_keeps_its_scale() -> None:
    """Logits above the limit: nothing is rescaled, and the gradient is the plain one."""
    rows, x = torch.randn(4, 8), torch.randn(16, 8)

    assert 1.0 == find_scale(rows, x)
    assert 1.0 == find_scale(torch.zeros(4, 8), x)
