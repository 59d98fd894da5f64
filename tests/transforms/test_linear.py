"""Linear layers against their matrices."""

import math

import pytest
import torch
from torch.nn import functional as F

from pyroflows.errors import OptionError
from pyroflows.transforms import LU, QR, LowRank, Orthogonal, Permutation
from pyroflows.transforms.linear.positive_diagonal import MIN_SCALE
from tests.transforms.registry import CONTEXT_DIM, jacobian, perturb, points

ORDER = [2, 0, 3, 1]


def factors(t, raw):
    """P, L and U as the docstring has them."""
    identity = torch.eye(t.dim, dtype=raw.dtype)
    scale = MIN_SCALE + F.softplus(raw.diagonal() + math.log(math.expm1(1 - MIN_SCALE)))
    return identity[t.permutation.order], raw.tril(-1) + identity, (raw.triu(1) + identity) @ scale.diag()


def test_lu_is_the_product_of_its_factors():
    t = perturb(LU(4, ORDER).double())
    p, lower, upper = factors(t, t.matrix_of.value.detach())
    z = points((7,), 4)
    x, ladj = t.forward_and_ladj(z)
    torch.testing.assert_close(x, z @ (p @ lower @ upper).T)
    torch.testing.assert_close(t.inv(z), z @ torch.linalg.inv(p @ lower @ upper).T)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(lower @ upper).logabsdet.expand(7))
    assert (upper.diagonal() > 0).all()


def test_every_parameter_of_lu_counts():
    """No entry of the matrix is hidden under a triangle of the other factor."""
    t = perturb(LU(3).double())
    z = torch.randn(3, dtype=torch.float64)
    for view in (t, t.inv):
        (gradient,) = torch.autograd.grad(view(z).square().sum(), t.matrix_of.value)
        assert (gradient != 0).all()


@pytest.mark.parametrize("dim", [1, 4])
@pytest.mark.parametrize("value", [-1e4, 0.0, 1e4])
def test_lu_stays_invertible(dim, value):
    """However far the parameters of the diagonal go."""
    t = LU(dim).double()
    with torch.no_grad():
        t.matrix_of.value.diagonal().fill_(value)
    z = torch.randn(7, dim, dtype=torch.float64)
    x, ladj = t.forward_and_ladj(z)
    torch.testing.assert_close(t.inv(x), z)
    assert (ladj >= dim * math.log(MIN_SCALE) * (1 + 1e-12)).all()


@pytest.mark.parametrize("order", [None, ORDER], ids=str)
def test_lu_starts_as_its_permutation(order):
    t, permutation = LU(4, order), Permutation(order or range(4))
    z = torch.randn(7, 4)
    torch.testing.assert_close(t(z), permutation(z))
    torch.testing.assert_close(t.inv(z), permutation.inv(z))


def test_lu_depends_on_its_context():
    t = perturb(LU(4, ORDER, CONTEXT_DIM).double())
    context = torch.randn(CONTEXT_DIM, dtype=torch.float64)
    raw = t.matrix_of(context)
    p, lower, upper = factors(t, raw.detach())
    z = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(jacobian(t.condition(context), z), p @ lower @ upper)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lu_in_half_precision_is_right_to_its_digits(dtype):
    t = perturb(LU(4, ORDER), 0.3)
    z = torch.randn(7, 4).to(dtype)
    expected = t(z.float()), t.inv(z.float())
    t = t.to(dtype)
    for result, full in zip((t(z), t.inv(z)), expected, strict=True):
        assert ((result.float() - full).norm(dim=-1) <= 20 * torch.finfo(dtype).eps * full.norm(dim=-1)).all()


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [1, 2, 3], [0, 1, 2, 3], []], ids=str)
def test_lu_of_no_permutation_raises(order):
    with pytest.raises(OptionError, match="permutation of 0 to 2"):
        LU(3, order)


@pytest.mark.parametrize("layer", [LU, QR, Orthogonal, lambda dim: LowRank(dim, 1)])
@pytest.mark.parametrize("dim", [(3,), 2.5, "3", 0], ids=str)
def test_linear_layers_map_vectors(layer, dim):
    with pytest.raises(OptionError, match="dim must be .*at least 1, got"):
        layer(dim)
