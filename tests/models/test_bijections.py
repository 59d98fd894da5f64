"""Bijections: log-determinants, round trips, densities that integrate to one, and values near the edges."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TransformedDistribution as Transformed
from pyro.distributions.util import sum_rightmost
from torch import tensor
from torch.distributions import AffineTransform, ExpTransform, SigmoidTransform, biject_to

from pyroflows.constraints import wrapped
from pyroflows.models.bijections import bijection_of
from pyroflows.models.edges import log_density
from pyroflows.models.supports import simplified, support_of

DOUBLE = torch.float64


def _double(*values):
    return tensor(values, dtype=DOUBLE) if len(values) > 1 else tensor(values[0], dtype=DOUBLE)


A, B = _double(0.3), _double(0.4, 2.0)

WITH_LOGS = [
    dist.Beta(A, B),
    dist.Beta(A, B).to_event(1),
    dist.Beta(A, B).mask(tensor([True, False])),
    dist.Beta(A, B).mask(False),
    dist.Beta(A, A).expand([2]),
    dist.Uniform(_double(2.0), _double(3.0, 4.0)),
    dist.Kumaraswamy(A, B),
    dist.Dirichlet(_double(0.1, 0.2, 0.7)),
    dist.Dirichlet(_double(0.1, 0.2, 0.7)).expand([2]).to_event(1),
    dist.Gamma(A, B),
    dist.Chi2(A),
    dist.InverseGamma(A, B),
    dist.Weibull(A, B),
    dist.LogNormal(A, B),
    dist.RelaxedBernoulli(A, B / 3),
    dist.LKJCholesky(4, A),
    dist.LKJCholesky(2, B),
    Transformed(dist.Beta(A, B), [AffineTransform(1.0, -2.0)]),
    Transformed(dist.Gamma(A, B), [AffineTransform(1.0, 2.0), AffineTransform(1.0, _double(-3.0))]),
    Transformed(dist.Gamma(A, B).to_event(1), [AffineTransform(1.0, -2.0)]),
    Transformed(dist.Normal(A, B), [SigmoidTransform(), AffineTransform(1.0, -2.0)]),
    Transformed(dist.Normal(A, B), [AffineTransform(1.0, 2.0), ExpTransform(), AffineTransform(0.0, -1.0)]),
]
WITHOUT_LOGS = [
    dist.HalfNormal(B),
    dist.Pareto(B, A),
    dist.Normal(A, B),
    Transformed(dist.HalfNormal(B), [AffineTransform(0.0, -1.0)]),
    dist.ImproperUniform(torch.distributions.constraints.corr_cholesky, (), (3, 3)),
]


def _bijection(fn):
    return bijection_of(fn, fn.shape(), simplified(support_of(fn)))


@pytest.mark.parametrize("fn", WITH_LOGS + WITHOUT_LOGS, ids=str)
def test_values_and_determinants_are_those_of_torch(fn):
    """Away from the edges; so a flow means the same to Pyro's handlers, which use torch's maps."""
    bijection = _bijection(fn)
    u = 2 * torch.randn(5, *bijection.unconstrained_shape, dtype=DOUBLE)
    x, ladj = bijection.constrain(u)
    reference = biject_to(simplified(support_of(fn)))
    expected = reference.log_abs_det_jacobian(u, reference(u))
    torch.testing.assert_close(x, reference(u))
    torch.testing.assert_close(ladj, sum_rightmost(expected, expected.dim() - ladj.dim()))
    torch.testing.assert_close(bijection.unconstrain(x), u)


@pytest.mark.parametrize("fn", WITH_LOGS, ids=str)
def test_log_density_is_that_of_the_distribution(fn):
    bijection = _bijection(fn)
    assert bijection.has_logs
    u = 2 * torch.randn(5, *bijection.unconstrained_shape, dtype=DOUBLE)
    x, _ = bijection.constrain(u)
    torch.testing.assert_close(log_density(fn, bijection.logs(u)), fn.log_prob(x), check_dtype=False)


@pytest.mark.parametrize("fn", WITHOUT_LOGS, ids=str)
def test_other_families_have_no_log_density(fn):
    assert not _bijection(fn).has_logs


def _total_mass(fn, dtype, reach=400.0, num=400_001):
    """The integral of the unconstrained density of a scalar site, by the trapezoidal rule."""
    bijection = _bijection(fn)
    u = torch.linspace(-reach, reach, num, dtype=DOUBLE)
    part = u.to(dtype).reshape(-1, *bijection.unconstrained_shape)
    x, ladj = bijection.constrain(part)
    log_prob = log_density(fn, bijection.logs(part)) if bijection.has_logs else fn.log_prob(x)
    return torch.trapezoid((log_prob + ladj).double().exp(), u).item()


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize(
    "fn",
    [
        dist.Beta(0.1, 0.1),
        dist.Beta(0.1, 3.0),
        dist.Beta(3.0, 0.1),
        dist.Kumaraswamy(0.1, 0.1),
        dist.Dirichlet(tensor([0.1, 0.1])),
        dist.Gamma(0.1, 2.0),
        dist.InverseGamma(0.1, 2.0),
        dist.Weibull(2.0, 0.1),
        dist.LogNormal(0.0, 30.0),
        dist.LKJCholesky(2, 0.1),
        dist.RelaxedBernoulli(tensor(0.2), tensor(0.3)),
        Transformed(dist.Beta(0.1, 0.2), [AffineTransform(3.0, -2.0)]),
        Transformed(dist.Gamma(0.1, 1.0), [AffineTransform(3.0, -2.0)]),
        Transformed(dist.Normal(0.0, 30.0), [SigmoidTransform()]),
        dist.VonMises(0.5, 2.0),
    ],
    ids=str,
)
def test_unconstrained_density_integrates_to_one(fn, dtype):
    """Most of the mass lies where the value cannot be told from the edge."""
    assert _total_mass(fn, dtype) == pytest.approx(1.0, abs=2e-4)


@pytest.mark.parametrize("end", [-100.0, 100.0])
@pytest.mark.parametrize(
    "fn",
    [
        dist.Beta(0.1, 0.1),
        dist.Kumaraswamy(0.1, 0.1),
        dist.Dirichlet(torch.full((4,), 0.1)),
        dist.LKJCholesky(3, 0.1),
        dist.LogNormal(0.0, 9.0),
        dist.Uniform(5.0, 6.0),
        Transformed(dist.Normal(0.0, 9.0), [SigmoidTransform(), AffineTransform(1.0, -3.0)]),
        dist.VonMises(0.0, 1.0),
    ],
    ids=str,
)
def test_far_out_everything_is_finite(fn, end):
    bijection = _bijection(fn)
    u = torch.full(bijection.unconstrained_shape, end, requires_grad=True)
    x, ladj = bijection.constrain(u)
    log_prob = log_density(fn, bijection.logs(u)) if bijection.has_logs else fn.log_prob(x)
    value = (log_prob + ladj).sum()
    (gradient,) = torch.autograd.grad(value, u)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert bijection.unconstrain(x).isfinite().all()
    assert bijection.support.check(x.detach()).all()


def test_both_ends_of_an_interval_are_mirror_images():
    u = torch.linspace(-80, 80, 33)
    bijection = _bijection(dist.Beta(0.2, 0.7))
    mirrored = log_density(dist.Beta(0.7, 0.2), bijection.logs(-u))
    torch.testing.assert_close(log_density(dist.Beta(0.2, 0.7), bijection.logs(u)), mirrored)


def test_values_at_an_edge_are_counted():
    u = tensor([-100.0, -10.0, 0.0, 10.0, 100.0])
    at_edge = [True, False, False, False, True]
    for fn in (dist.ContinuousBernoulli(0.5), dist.HalfCauchy(1.0), dist.Uniform(1.0, 2.0)):
        assert _bijection(fn.expand([5])).is_at_edge(u).tolist() == at_edge
    assert not _bijection(dist.Normal(0.0, 1.0).expand([5])).is_at_edge(u).any()
    assert not _bijection(dist.VonMises(0.0, 1.0).expand([5])).is_at_edge(u).any()
    far_from_zero = Transformed(dist.HalfNormal(torch.ones(1)), [AffineTransform(1e6, 1.0)])
    assert _bijection(far_from_zero).is_at_edge(tensor([-4.0])).all()
    flat = dist.ImproperUniform(torch.distributions.constraints.simplex, (), (3,))
    assert _bijection(flat).is_at_edge(tensor([-100.0, 0.0])).tolist() == [True, False, False]
    assert not _bijection(flat).is_at_edge(tensor([30.0, 0.0])).any()


@pytest.mark.parametrize("center", [0.0, 1.0, 3.0, -3.0, math.pi])
def test_wrap(center):
    bijection = _bijection(dist.VonMises(_double(center), 1.0).expand([201]))
    u = torch.linspace(-4, 4, 201, dtype=DOUBLE, requires_grad=True)
    x, ladj = bijection.constrain(u)
    (slope,) = torch.autograd.grad(x.sum(), u)
    torch.testing.assert_close(slope.log(), ladj)
    assert ((x > -math.pi) & (x <= math.pi)).all()
    torch.testing.assert_close(bijection.unconstrain(x), u)
    torch.testing.assert_close(wrapped(bijection.center), wrapped(_double(center)).expand(201))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_uniform_law_on_the_circle_is_a_standard_normal(dtype):
    bijection = _bijection(dist.VonMises(0.0, 1.0).expand([41]))
    u = torch.linspace(-10, 10, 41, dtype=dtype)
    x, ladj = bijection.constrain(u)
    torch.testing.assert_close(ladj - math.log(2 * math.pi), dist.Normal(0.0, 1.0).log_prob(u))
    assert x.dtype == dtype


def test_wrapped_angles():
    turns = 2 * math.pi * torch.arange(-2, 3, dtype=DOUBLE)
    torch.testing.assert_close(wrapped(1.0 + turns), torch.ones(5, dtype=DOUBLE))
    assert wrapped(tensor(-math.pi, dtype=DOUBLE)) == math.pi


@pytest.mark.parametrize(
    ("fn", "center"),
    [
        (dist.VonMises(7.0, 1.0).expand([2]).to_event(1), [7.0 - 2 * math.pi] * 2),
        (dist.SineBivariateVonMises(1.0, -2.0, 1.0, 1.0, 0.5), [1.0, -2.0]),
        (dist.SineSkewed(dist.VonMises(tensor([2.0]), 1.0).to_event(1), tensor([0.5])), [2.0]),
        (dist.SineSkewed(dist.Uniform(-math.pi, math.pi).expand([1]).to_event(1), tensor([0.5])), [0.0]),
    ],
    ids=str,
)
def test_circles_are_centered_at_the_direction_of_the_prior(fn, center):
    torch.testing.assert_close(_bijection(fn).center, tensor(center))


def test_draws_that_underflow_have_finite_vectors():
    bijection = _bijection(dist.Dirichlet(torch.ones(4)))
    x = tensor([0.0, 1.0, 0.0, 0.0])
    u = bijection.unconstrain(x)
    assert u.isfinite().all()
    torch.testing.assert_close(bijection.constrain(u)[0], x, rtol=0, atol=1e-30)
