"""Operations that are done once: the same results and gradients, and no tensor that is shared after a write."""

import pytest
import torch

from pyroflows.models.shared_results import SharedResults, WrittenShared
from pyroflows.models.size_guard import SizeGuard, TooLarge


def test_results_are_shared_with_their_gradients():
    x, i = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([1, 0])
    with SharedResults():
        a, b = x[i].exp(), x[i].exp()
        total = (a * b).sum()
    assert a is b
    (gradient,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(gradient, 2 * torch.exp(2 * x.detach()))


def test_other_arguments_have_other_results():
    x = torch.arange(6.0).reshape(2, 3)
    with SharedResults():
        found = [x.sum(0), x.sum(1), x[..., 0], x[0], x[:, 1:], x[:, :2], x + 1, x + 1.0, x + True]
        again = [torch.arange(3.0).exp(), torch.arange(3.0).exp()]
    expected = [x.sum(0), x.sum(1), x[..., 0], x[0], x[:, 1:], x[:, :2], x + 1, x + 1, x + 1]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert again[0] is not again[1]


def test_what_was_written_into_is_computed_anew():
    x = torch.ones(2)
    with SharedResults():
        first = x + 1
        first += 5
        second = x + 1
        x *= 3
        third = x + 1
    assert second.tolist() == [2.0, 2.0] and third.tolist() == [4.0, 4.0]


@pytest.mark.parametrize(
    "write",
    [lambda t: t.add_(1), lambda t: t.__iadd__(1), lambda t: t.__setitem__(0, 1.0), lambda t: t.view(-1).mul_(2)],
)
def test_a_write_into_a_shared_tensor_is_noticed(write):
    x = torch.ones(2)
    with SharedResults():
        first, _ = x + 1, x + 1
        with pytest.raises(WrittenShared):
            write(first)


def test_under_vmap():
    i = torch.tensor([1, 0])

    def run(x):
        with SharedResults():
            return x[i].log() + x[i].log()

    x = torch.rand(5, 2)
    torch.testing.assert_close(torch.func.vmap(run)(x), 2 * x[:, i].log())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(100, 1) * torch.ones(100),
        lambda: torch.broadcast_tensors(torch.ones(100, 1), torch.ones(100)),
        lambda: torch.einsum("a,b->ab", torch.ones(100), torch.ones(100)),
        lambda: torch.einsum("a,b->ab", [torch.ones(100), torch.ones(100)]),
        lambda: torch.ones(10_000),
        lambda: torch.ones(1).expand(10_000),
    ],
)
def test_large_tensors_are_noticed(make):
    with pytest.raises(TooLarge, match="10,000"), SizeGuard(9_999):
        make()
    with SizeGuard(10_000):
        make()
