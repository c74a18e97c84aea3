"""moe2gguf.experts.heal.losses and .router: every term against an example worked by hand."""

import math

import pytest
import torch

from moe2gguf.experts.heal import losses
from moe2gguf.experts.heal.router import LARGEST, Router, scale_of

LOG2, LOG3 = math.log(2), math.log(3)


def test_kl_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4): 1/2 ln 2 + 1/2 ln(2/3)."""
    teacher, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, LOG3]])

    assert 0.5 * math.log(2) + 0.5 * math.log(2 / 3) == pytest.approx(
        float(losses.kl(student, teacher).mean()), abs=1e-6
    )
    assert 0 == pytest.approx(float(losses.kl(teacher, teacher).mean()), abs=1e-6)


def test_the_likeliest_tokens_and_the_rest_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4), N = 1: events 1/2, 1/2 against 1/4, 3/4; N = 3 is all of them."""
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    student = torch.tensor([[0.25, 0.5, 0.25]]).log()
    full = 0.5 * math.log(2) + 0.25 * math.log(1 / 2)

    assert 0.5 * math.log(2) + 0.5 * math.log(2 / 3) == pytest.approx(
        float(losses.kl(student, teacher, 1).mean()), abs=1e-6
    )
    assert full == pytest.approx(float(losses.kl(student, teacher, 3).mean()), abs=1e-6)
    assert full == pytest.approx(float(losses.kl(student, teacher, 0).mean()), abs=1e-6)


def test_next_token_by_hand():
    """Token 0 is followed by token 1, q = 3/4; that by token 0, q = 1/2; the last predicts none."""
    logits = torch.tensor([[0.0, LOG3], [0.0, 0.0], [9.0, 0.0]])
    following = losses.following(torch.tensor([[0, 1, 0]]))[0]

    assert [1, 0, -1] == following.tolist()
    assert [-math.log(0.75), LOG2, 0] == pytest.approx(losses.next_token(logits, following).tolist(), abs=1e-6)


def test_hidden_by_hand():
    """Layer 1: |(1, 0) - (0, 0)|^2 / 1 for one token and 0 for the other; layer 2 equal: (1/2 + 0) / 2."""
    teacher = [torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2, 2)]
    student = [torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.ones(2, 2)]

    assert 0.25 == pytest.approx(float(losses.hidden(student, teacher)))


def test_balance_by_hand():
    """Two experts, both tokens choose the first with p = 3/4: 2 * (1 * 3/4 + 0) = 1.5; an even choice gives 1."""
    logits = torch.tensor([[LOG3, 0.0], [LOG3, 0.0]])

    assert 1.5 == pytest.approx(float(losses.balance(logits, torch.tensor([[0], [0]]))))
    assert 1.0 == pytest.approx(float(losses.balance(torch.zeros(2, 2), torch.tensor([[0], [1]]))))


def test_z_by_hand():
    """Logits (0, 0): (ln 2)^2; logits (ln 3, 0): (ln 4)^2; their mean."""
    logits = torch.tensor([[0.0, 0.0], [LOG3, 0.0]])

    assert (LOG2**2 + math.log(4) ** 2) / 2 == pytest.approx(float(losses.z(logits)))


def test_few_is_the_entropy():
    """Two equal experts: ln 2; a sure one: 0; p = (3/4, 1/4) by the formula."""
    assert pytest.approx(LOG2) == float(losses.few(torch.zeros(3, 2)))
    assert 0 == pytest.approx(float(losses.few(torch.tensor([[100.0, 0.0]]))), abs=1e-6)
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert expected == pytest.approx(float(losses.few(torch.tensor([[LOG3, 0.0]]))))


def test_needed_counts_experts_up_to_the_threshold():
    """p = (1/2, 1/4, 1/4): one expert reaches 0.5, two 0.7, three 0.9; no threshold needs more than all."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()

    assert [1, 2, 3, 3] == [int(losses.needed(logits, t)) for t in (0.4, 0.7, 0.9, 1.0)]
    assert 2 == int(losses.needed(torch.zeros(1, 4), 0.5))  # two quarters reach it exactly


def test_an_ordering_only_router_runs_as_stored_and_learns_as_if_it_were_not():
    """Forward: the plain softmax of the tiny rows, 1/k each; backward: the gradient of logits of order one."""
    torch.manual_seed(0)
    rows, x = torch.randn(4, 8) * 1e-4, torch.randn(16, 8)
    scale = scale_of(rows, x)
    router = Router(rows, scale, 2)

    _, weights, chosen = router(x)
    expected = (x @ rows.T).softmax(-1).topk(2)
    (weights[:, 0] ** 2).sum().backward()

    assert LARGEST == pytest.approx(float((x @ router.weight.detach().T).abs().max()))
    assert torch.equal(expected.indices, chosen)
    assert torch.allclose(weights, torch.full_like(weights, 0.5), atol=1e-3)
    assert torch.allclose(rows, router.stored, rtol=1e-6)
    w = torch.full((16, 2), 0.5)
    first, second = chosen[:, 0], chosen[:, 1]
    by_hand = torch.zeros(4, 8)  # d w0^2 / d logit = 2 w0 * w0 (1 - w0), with the opposite sign for the other expert
    slope = 2 * w[:, 0] * w[:, 0] * (1 - w[:, 0])
    by_hand.index_add_(0, first, slope[:, None] * x)
    by_hand.index_add_(0, second, -slope[:, None] * x)
    assert torch.allclose(by_hand, router.weight.grad, atol=1e-2)


def test_a_router_with_a_real_softmax_keeps_its_scale():
    """Logits above the limit: nothing is rescaled, and the gradient is the plain one."""
    rows, x = torch.randn(4, 8), torch.randn(16, 8)

    assert 1.0 == scale_of(rows, x)
    assert 1.0 == scale_of(torch.zeros(4, 8), x)


def test_noise_changes_choices_in_training_only():
    """Noisy top-k: other experts at times while training, none while evaluating."""
    torch.manual_seed(0)
    router, x = Router(torch.randn(8, 8) * 0.1, 1.0, 2), torch.randn(64, 8)
    router.noise = 1.0

    chosen = router.train()(x)[2]
    calm = router.eval()(x)[2]

    assert not torch.equal(chosen, calm)
    assert torch.equal(calm, router.eval()(x)[2])
