"""Supports: the declared ones, circles, and those behind monotone transforms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TransformedDistribution as Transformed
from pyro.distributions.transforms import Spline
from torch.distributions import AffineTransform, ExpTransform, PowerTransform, SigmoidTransform, TanhTransform
from torch.distributions.constraints import (
    corr_cholesky,
    greater_than,
    independent,
    interval,
    less_than,
    nonnegative,
    positive,
    real,
    simplex,
    unit_interval,
)

from pyroflows.constraints import circular
from pyroflows.models.structure import describe
from pyroflows.models.supports import has_declared_support, simplified, support_of

FLIP = AffineTransform(0.0, -1.0)
REVERSE = dist.transforms.Permute(torch.tensor([1, 0]))


@pytest.mark.parametrize(
    ("fn", "support"),
    [
        (dist.Normal(0.0, 1.0), real),
        (dist.HalfNormal(1.0), nonnegative),
        (dist.LogNormal(0.0, 1.0), positive),
        (dist.Beta(1.0, 1.0).expand([2]).to_event(1), independent(unit_interval, 1)),
        (dist.Dirichlet(torch.ones(3)), simplex),
        (dist.LKJCholesky(3, 1.0), corr_cholesky),
        (dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), independent(real, 1)),
        (Transformed(dist.HalfNormal(1.0), [FLIP]), less_than(0.0)),
        (Transformed(dist.Exponential(1.0), [FLIP]), less_than(0.0)),
        (Transformed(dist.Gamma(2.0, 1.0), [FLIP]), less_than(0.0)),
        (Transformed(dist.Beta(2.0, 1.0), [AffineTransform(0.0, torch.tensor(-1.0))]), interval(-1.0, 0.0)),
        (Transformed(dist.Exponential(1.0), [AffineTransform(1.0, 1.0)]), greater_than(1.0)),
        (Transformed(dist.Exponential(1.0), [FLIP, FLIP]), greater_than(0.0)),
        (Transformed(dist.Beta(2.0, 1.0), [AffineTransform(-1.0, 2.0)]), interval(-1.0, 1.0)),
        (Transformed(dist.Normal(0.0, 1.0), [ExpTransform(), AffineTransform(1.0, 1.0)]), greater_than(1.0)),
        (Transformed(dist.Normal(0.0, 1.0), [SigmoidTransform(), AffineTransform(3.0, -2.0)]), interval(1.0, 3.0)),
        (Transformed(dist.Normal(0.0, 1.0), [TanhTransform()]), interval(-1.0, 1.0)),
        (Transformed(dist.Uniform(1.0, 2.0), [PowerTransform(torch.tensor(-1.0))]), interval(0.5, 1.0)),
        (Transformed(dist.Gamma(1.0, 1.0), [PowerTransform(torch.tensor(-1.0))]), greater_than(0.0)),
        (Transformed(dist.Exponential(1.0), [ExpTransform().inv]), real),
        (Transformed(dist.Exponential(1.0).expand([2]).to_event(1), [FLIP]), independent(less_than(0.0), 1)),
        (
            Transformed(dist.Normal(0.0, 1.0).expand([2]).to_event(1), [REVERSE, ExpTransform()]),
            independent(positive, 1),
        ),
        (dist.VonMises(0.0, 1.0), circular),
        (dist.VonMises(torch.zeros(2), 1.0).mask(False).to_event(1), independent(circular, 1)),
        (dist.SineBivariateVonMises(0.0, 0.0, 1.0, 1.0, 0.5), independent(circular, 1)),
        (dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.VonMises(torch.zeros(2), 1.0)), circular),
        (dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Beta(torch.ones(2), 1.0)), unit_interval),
    ],
    ids=str,
)
def test_support(fn, support):
    assert repr(simplified(support_of(fn))) == repr(support)
    draws = fn.sample((100,)) if not isinstance(fn, dist.MaskedDistribution) else fn.sample()
    assert support_of(fn).check(draws).all()


@pytest.mark.parametrize(
    "fn",
    [
        Transformed(dist.VonMises(0.0, 1.0), [AffineTransform(0.0, 2.0)]),
        Transformed(dist.Dirichlet(torch.ones(3)), [AffineTransform(0.0, 2.0)]),
        Transformed(dist.Exponential(torch.ones(2)).to_event(1), [REVERSE]),
        Transformed(dist.Exponential(torch.ones(2)), [AffineTransform(0.0, torch.tensor([1.0, -1.0]))]),
    ],
    ids=["scaled angle", "scaled simplex", "permuted half lines", "half lines to both sides"],
)
def test_support_that_has_no_name_is_not_known(fn):
    """The declared support, the real line, would be silently wrong."""
    assert simplified(support_of(fn)) is None


def test_mixture_of_laws_with_their_own_bounds_is_no_interval():
    fn = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Uniform(0.0, torch.tensor([1.0, 2.0])))
    assert support_of(fn).check(torch.tensor([0.5])).all()
    assert _is_refused(fn)


def _is_refused(fn):
    def model():
        pyro.sample("x", fn)

    return describe(model, (), {}).latents[0].bijection is None


def test_tensor_bounds_keep_their_entries():
    fn = Transformed(dist.Exponential(torch.ones(2)), [AffineTransform(torch.tensor([1.0, 2.0]), torch.ones(2))])
    support = simplified(support_of(fn))
    torch.testing.assert_close(support.lower_bound, torch.tensor([1.0, 2.0]))
    assert type(support) is greater_than


def test_circle_holds_one_period():
    values = torch.tensor([-math.pi, 0.0, math.pi, 3.2, -4.0, torch.nan])
    assert circular.check(values).tolist() == [True, True, True, False, False, False]


def test_structure_shows_the_true_support():
    def model():
        pyro.sample("debt", Transformed(dist.HalfNormal(1.0), [FLIP]))
        pyro.sample("angle", dist.VonMises(0.0, 1.0))

    debt, angle = describe(model, (), {}).latents
    assert repr(debt.support) == "LessThan(upper_bound=0.0)"
    assert angle.support is circular


def test_declared_supports_are_told_from_others():
    assert has_declared_support(dist.HalfNormal(torch.ones(2)).to_event(1))
    assert not has_declared_support(dist.VonMises(torch.ones(2), 1.0).to_event(1))
    assert not has_declared_support(Transformed(dist.HalfNormal(1.0), [FLIP]).expand([2]))


def test_a_bijection_of_all_numbers_need_not_tell_its_direction():
    """A spline of Pyro's has no sign."""
    support = support_of(Transformed(dist.Normal(torch.zeros(3), 1.0).to_event(1), [Spline(3)]))
    assert (support.base_constraint, support.event_dim) == (real, 1)
