"""The written-out gradient of velocity and divergence of networks with two hidden layers."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.nets.velocity import VelocityMLP
from pyroflows.nets.velocity.bilinear import velocity_and_divergence

SIZES = (3, 8, 7, 3)


def arguments(*batch: int) -> list[Tensor]:
    """Return places, offsets and weights, all of which require gradients; the offsets are shared without a batch."""
    torch.manual_seed(0)
    shapes = [(*(batch or (4,)), SIZES[0]), (*batch, sum(SIZES[1:])), *zip(SIZES[1:], SIZES[:-1], strict=True)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def of_arguments(z: Tensor, offset: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    return velocity_and_divergence(z, offset, weights, weights[1] * (weights[0] @ weights[2]).T)


def plain(z: Tensor, offset: Tensor, *weights: Tensor) -> Tensor:
    o1, o2, o3 = offset.split(SIZES[1:], -1)
    h = F.silu(F.silu(z @ weights[0].T + o1) @ weights[1].T + o2)
    return h @ weights[2].T + o3


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_velocity_and_divergence_are_those_of_autograd(batch: tuple[int, ...]) -> None:
    z, *others = arguments(*batch)
    velocity, divergence = of_arguments(z, *others)
    columns = [torch.autograd.grad(c.sum(), z, retain_graph=True)[0] for c in plain(z, *others).unbind(-1)]
    torch.testing.assert_close(velocity, plain(z, *others))
    torch.testing.assert_close(divergence, torch.stack(columns, -1).diagonal(dim1=-2, dim2=-1).sum(-1))


@pytest.mark.parametrize("batch", [(), (4,)])
def test_first_and_second_derivatives(batch: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(of_arguments, arguments(*batch))
    assert torch.autograd.gradgradcheck(of_arguments, arguments(*batch))


@pytest.mark.parametrize("batch", [(), (4,)])
def test_gradients_that_are_recorded_are_those_that_are_written_out(batch: tuple[int, ...]) -> None:
    inputs = arguments(*batch)
    written_out, recorded = (
        torch.autograd.grad([part.sin().sum() for part in of_arguments(*inputs)], inputs, create_graph=create_graph)
        for create_graph in (False, True)
    )
    torch.testing.assert_close(recorded, written_out)


def test_a_batch_of_gradients() -> None:
    z, *others = arguments()
    velocity, _ = of_arguments(z, *others)
    rows = torch.eye(SIZES[-1], dtype=z.dtype).expand(len(z), -1, -1).movedim(1, 0)
    (batched,) = torch.autograd.grad(velocity, z, rows, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(velocity, z, row, retain_graph=True)[0] for row in rows]
    torch.testing.assert_close(batched, torch.stack(each))


@pytest.mark.parametrize("size", [3, 43])  # the products of the larger one are oneDNN's on some processors
def test_columns_of_a_state_as_places(size: int) -> None:
    torch.manual_seed(0)
    net = VelocityMLP(size)
    torch.nn.init.normal_(net.linear[-1].weight, std=0.1)
    state = torch.randn(1024, size + 1)
    z, t = state[:, :-1], torch.tensor(0.3)
    found = net.at(None).with_divergence(t, z)
    with torch.no_grad():
        expected = net.at(None).with_divergence(t, z)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
