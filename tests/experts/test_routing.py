"""moe2gguf.experts.routing: regressions against textbook solutions, and rows that only order."""

import pytest
import torch

from moe2gguf.experts import routing
from moe2gguf.experts.slicing import ROUTER_SIZE
from moe2gguf.experts.stats import router_moments

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(400, 6, generator=GENERATOR) + torch.tensor([2.0, 0, 0, 1, 0, 0])


def test_ridge_is_the_textbook_least_squares() -> None:
    """Without a ridge, torch's own least squares solution."""
    targets = X @ torch.randn(6, 3, generator=GENERATOR) + torch.randn(400, 3, generator=GENERATOR)

    rows = routing.solve_ridge(X.T @ X, X.T @ targets, strength=0)

    torch.testing.assert_close(torch.linalg.lstsq(X, targets).solution.T, rows, rtol=1e-4, atol=1e-5)


def test_the_constant_direction_is_constant() -> None:
    """v . x is close to 1 where the inputs have a common offset, and the best linear fit of 1 anywhere."""
    offset = X * 0.05 + torch.tensor([1.0, 0, 0, 0, 0, 0])
    v = routing.constant_direction(router_moments(offset, offset[:, :0]))

    assert (offset @ v - 1).abs().max() < 0.3
    expected = torch.linalg.lstsq(X, torch.ones(400, 1)).solution[:, 0]
    found = routing.constant_direction(router_moments(X, X[:, :0]))
    torch.testing.assert_close(expected, found, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("n_shared", [0, 1, 3])
def test_assembled_rows_only_order(n_shared: int) -> None:
    """Logits stay below the size; always-on experts come first for every token; the routed order is kept."""
    x = X * 0.05 + torch.tensor([1.0, 0, 0, 0, 0, 0])
    v = routing.constant_direction(router_moments(x, x[:, :0]))
    rows = routing.center_rows(torch.randn(5, 6, generator=GENERATOR))

    router = routing.order_only(rows, v, n_shared, float((x @ rows.T).abs().max()))

    logits = x @ router.T
    assert logits.abs().max() <= ROUTER_SIZE * 1.4
    assert (n_shared + 5, 6) == router.shape
    order = logits.argsort(dim=1, descending=True)
    assert (order[:, :n_shared] < n_shared).all()
    assert torch.equal((x @ rows.T).argsort(dim=1), logits[:, n_shared:].argsort(dim=1))
    assert (logits.softmax(-1) * (n_shared + 5) - 1).abs().max() < 2 * ROUTER_SIZE


def test_concentrated_rows_give_the_routed_experts_their_share() -> None:
    """Where v . x is 1, the routed experts hold the mass they were promised, evenly to within the ordering."""
    x = torch.cat([torch.ones(50, 1), 0.1 * torch.randn(50, 5, generator=GENERATOR)], dim=1)
    v = torch.tensor([1.0, 0, 0, 0, 0, 0])
    rows = routing.center_rows(torch.cat([torch.zeros(8, 1), torch.randn(8, 5, generator=GENERATOR)], dim=1))

    router = routing.concentrate(rows, v, 4, 0.3, float((x @ rows.T).abs().max()))
    p = (x @ router.T).softmax(-1)

    torch.testing.assert_close(torch.full((50,), 0.3), p[:, 4:].sum(1), rtol=0.02, atol=0)
    assert (p[:, :4].min(1).values > p[:, 4:].max(1).values).all()
