"""Weights whose norms as linear operators stay below a bound."""

import pytest
import torch

from pyroflows.nets.lipschitz.weights import almost_orthogonal

BOUND = 0.9
MATRICES = [(1, 1), (1, 7), (7, 1), (5, 3), (3, 5), (8, 8), (64, 2), (2, 64), (64, 64)]


def rescaled(weight, floor=0.0):
    return almost_orthogonal([weight], torch.tensor([BOUND], dtype=weight.dtype), [floor])[0]


def norm(matrix):
    return torch.linalg.matrix_norm(matrix.double(), 2)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_norms_of_matrices_stay_below_the_bound(shape, scale):
    torch.manual_seed(0)
    for weight in (torch.randn(shape), torch.randn(shape) ** 3, torch.ones(shape), torch.eye(*shape)):
        for floor in (0.0, BOUND**2):
            assert norm(rescaled(scale * weight.double(), floor)) <= BOUND * (1 + 1e-12)
            assert norm(rescaled(scale * weight, floor)) <= BOUND * (1 + 1e-6)


def test_orthogonal_weights_reach_the_bound():
    torch.manual_seed(0)
    orthogonal, _ = torch.linalg.qr(torch.randn(7, 3).double())
    torch.testing.assert_close(rescaled(5 * orthogonal), BOUND * orthogonal)
    torch.testing.assert_close(rescaled(5 * orthogonal.mT), BOUND * orthogonal.mT)


def test_small_weights_stay_as_they_are_above_a_floor():
    torch.manual_seed(0)
    weight = 0.01 * torch.randn(6, 6).double()
    torch.testing.assert_close(rescaled(weight, BOUND**2), weight, rtol=1e-14, atol=0)
    assert not rescaled(torch.zeros(3, 2), BOUND**2).any()
    assert not rescaled(torch.zeros(3, 2)).any()


@pytest.mark.parametrize("floor", [0.0, BOUND**2])
def test_gradients(floor):
    """By tall and wide weights and their bounds."""
    torch.manual_seed(0)
    bounds = torch.tensor([BOUND, 0.5]).double().requires_grad_()
    weights = [torch.randn(shape).double().requires_grad_() for shape in ((5, 3), (3, 5))]

    def function(bounds, *weights):
        return tuple(almost_orthogonal(weights, bounds, [floor, floor]))

    assert torch.autograd.gradcheck(function, (bounds, *weights), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, (bounds, *weights))
    # Where one of the outputs is left out.
    (gradient,) = torch.autograd.grad(function(bounds, *weights)[0].sum(), bounds)
    assert gradient[0] and not gradient[1]


def test_zero_output_weights_have_finite_gradients():
    weight = torch.zeros(3, 2, requires_grad=True)
    rescaled(weight, BOUND**2).sum().backward()
    torch.testing.assert_close(weight.grad, torch.ones(3, 2))


def test_vmap():
    torch.manual_seed(0)
    weights = torch.randn(4, 5, 3)
    found = torch.func.vmap(lambda weight: rescaled(weight))(weights)
    torch.testing.assert_close(found, torch.stack([rescaled(weight) for weight in weights]))
