"""The circular spline: a smooth map of the whole circle, whatever its shift; and maps by column."""

import math

import pytest
import torch
from torch.distributions import biject_to, transform_to

from pyroflows.constraints import angles_in, circular, is_angular, turns, without_angles, wrapped
from pyroflows.errors import OptionError
from pyroflows.transforms import Autoregressive, Coupling, Elementwise
from pyroflows.transforms.univariate import Affine, ByColumn, CircularSpline, Spline
from tests.transforms.registry import perturb

PI = math.pi
constraints = torch.distributions.constraints

both_directions = pytest.mark.parametrize("direction", ["forward_and_ladj", "inverse_and_ladj"])
structures = pytest.mark.parametrize("structure", [Elementwise, Coupling, Autoregressive])


def random_spline(bins=5, num=20):
    spline = CircularSpline(bins)
    theta = torch.randn(num, spline.num_params, dtype=torch.float64)
    theta[:, -1] *= 10  # shifts of several turns
    return spline, theta


@both_directions
def test_turns_pass(direction):
    spline, theta = random_spline()
    z = torch.linspace(-3, 3, 20, dtype=torch.float64)
    x, ladj = getattr(spline, direction)(z, theta)
    for k in (-3, 1, 40):
        x_turned, ladj_turned = getattr(spline, direction)(z + 2 * PI * k, theta)
        torch.testing.assert_close(x_turned, x + 2 * PI * k)
        torch.testing.assert_close(ladj_turned, ladj, rtol=0, atol=1e-9)


@both_directions
@pytest.mark.parametrize("place", ["at the cut", "where the spline is fixed"])
def test_derivatives_are_continuous_all_around(direction, place):
    """At pi, and where the shift brings the fixed point of the spline, on the side of the values."""
    spline, theta = random_spline()
    at = torch.full((20,), PI, dtype=torch.float64)
    if place != "at the cut" and direction == "inverse_and_ladj":
        at = at + theta[:, -1]
    before, after = (getattr(spline, direction)(at + step, theta) for step in (-1e-9, 1e-9))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-4)
    assert before[1].std() > 0.1  # a derivative of 1 there would be no achievement


def test_derivative_at_the_cut_has_a_gradient_of_its_own():
    spline, theta = random_spline(num=1)
    theta.requires_grad_()
    z = torch.tensor([PI - 1e-3, 1e-3 - PI], dtype=torch.float64)
    for value in z:
        _, ladj = spline.forward_and_ladj(value[None], theta)
        (gradient,) = torch.autograd.grad(ladj.sum(), theta)
        assert gradient[0, 2 * spline.bins] > 0.1
    assert torch.autograd.gradcheck(spline.forward_and_ladj, (z[:1].requires_grad_(), theta))
    assert torch.autograd.gradgradcheck(spline.inverse_and_ladj, (z[:1].detach().requires_grad_(), theta), atol=1e-4)


def test_ends_that_are_one_knot_leave_the_plain_spline_as_it_is():
    """With one derivative at both ends that is 1, and no shift, it is the spline on [-pi, pi]."""
    plain, spline = Spline(bins=6, bound=PI), CircularSpline(bins=6)
    theta = torch.randn(50, plain.num_params, dtype=torch.float64)
    zero = theta.new_zeros(50, 1)
    z = torch.linspace(-3.1, 3.1, 50, dtype=torch.float64)
    found = spline.forward_and_ladj(z, torch.cat([theta[:, :12], zero, theta[:, 12:], zero], -1))
    torch.testing.assert_close(found, plain.forward_and_ladj(z, theta))


# Maps by column


@structures
def test_columns_have_their_own_maps(structure):
    """Beside each layer of one map, in a column without neighbours that determine it."""
    maps = ["spline", "affine", "circular_spline", "circular_spline"]
    t = perturb(structure(4, maps).double())
    z = torch.randn(7, 4, dtype=torch.float64)
    x, ladj = t.forward_and_ladj(z)
    far = z.clone()
    far[:, 0] = 10.0
    assert (t(far)[:, 0] == 10.0).all()  # a spline is the identity far out
    assert angles_in(t.domain, 4) == angles_in(t.inv.codomain, 4) == [False, False, True, True]
    torch.testing.assert_close(t.inv.forward_and_ladj(x)[1], -ladj)


@structures
def test_conditioners_know_no_turns(structure):
    """A turn of an angle moves that angle by a turn, and nothing else, though all others depend on it."""
    t = perturb(structure(4, ["circular_spline", "spline", "circular_spline", "circular_spline"]).double())
    z = torch.randn(7, 4, dtype=torch.float64)
    for value, pair in ((z, t.forward_and_ladj), (t(z).detach(), t.inverse_and_ladj)):
        result, ladj = pair(value)
        for j in (0, 2, 3):
            turn = torch.zeros(4, dtype=torch.float64)
            turn[j] = 2 * PI
            again, ladj_again = pair(value + turn)
            torch.testing.assert_close(again, result + turn)
            torch.testing.assert_close(ladj_again, ladj)


def test_number_of_maps_must_be_that_of_columns():
    for structure in (Elementwise, Coupling, Autoregressive):
        with pytest.raises(OptionError, match="2 univariate maps for events of shape"):
            structure(3, ["spline", "affine"])
        with pytest.raises(OptionError, match="one for all"):
            structure((2, 2), ["spline", "affine"])
    with pytest.raises(OptionError, match="empty"):
        ByColumn([])
    with pytest.raises(OptionError, match="must be one of"):
        Elementwise(2, ["spline", "cubic"])


def test_neighbours_of_one_kind_are_one_run():
    univariate = ByColumn([Spline(), Spline(), CircularSpline(4), CircularSpline(5), Affine()])
    assert [length for _, length in univariate._runs] == [2, 1, 1, 1]


# Angles


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wrapped_angles_are_angles(dtype):
    angle = torch.cat([torch.linspace(-20, 20, 10_001, dtype=dtype), torch.arange(-7, 8, dtype=dtype) * PI])
    assert circular.check(wrapped(angle)).all()
    torch.testing.assert_close(wrapped(angle).cos(), angle.cos(), rtol=0, atol=1e-5)
    inside = angle[(angle.abs() < 3.14)]
    assert torch.equal(wrapped(inside), inside) and (turns(inside) == 0).all()


def test_bijection_onto_the_circle_is_registered():
    u = torch.randn(100, dtype=torch.float64)
    for registry in (biject_to, transform_to):
        transform = registry(circular)
        x = transform(u)
        assert circular.check(x).all()
        torch.testing.assert_close(transform.inv(x), u)
    both = constraints.cat([circular, constraints.positive], dim=-1)
    assert both.check(biject_to(both)(torch.randn(5, 2))).all()


def test_parts_of_constraints():
    columns = constraints.cat([constraints.real, circular, constraints.positive], dim=-1, lengths=[1, 2, 1])
    nested = constraints.independent(columns, 1)
    assert angles_in(nested, 4) == [False, True, True, False]
    rest = without_angles(nested)
    assert angles_in(rest, 4) == [False] * 4
    assert rest.check(torch.tensor([-1.0, -9.0, 9.0, 1.0])) and not nested.check(torch.tensor([-1.0, -9.0, 9.0, 1.0]))
    assert is_angular(constraints.independent(circular, 2)) and not is_angular(columns)
