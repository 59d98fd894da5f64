"""The rational-quadratic spline: its bounds, its written-out derivative, its stability."""

import math

import pytest
import torch

from pyroflows.errors import OptionError
from pyroflows.transforms.univariate import Spline
from pyroflows.transforms.univariate.spline import MIN_DERIVATIVE, MIN_WIDTH, _evaluate, _forward, _inverse

BINS, BOUND = 5, 3.0
DTYPES = [torch.float64, torch.float32]

both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_directions = pytest.mark.parametrize("direction", ["forward", "inverse"])


def theta(*batch_shape, scale=1.0, dtype=torch.float64, bins=BINS):
    return scale * torch.randn(*batch_shape, 3 * bins - 1, dtype=dtype)


def pair(spline, direction):
    return spline.forward_and_ladj if direction == "forward" else spline.inverse_and_ladj


def knots(raw, bins, bound):
    """Positions and derivatives of the knots of one spline, written down one after the other."""
    widths, heights = (
        2 * bound * (MIN_WIDTH + (1 - bins * MIN_WIDTH) * torch.softmax(raw[i * bins : (i + 1) * bins], 0))
        for i in range(2)
    )
    x = torch.cat([torch.tensor([-bound]), -bound + widths.cumsum(0)])
    y = torch.cat([torch.tensor([-bound]), -bound + heights.cumsum(0)])
    one = torch.ones(1, dtype=raw.dtype)
    # A softplus above the floor, shifted so that a raw 0 gives 1.
    inner = MIN_DERIVATIVE + torch.log(1 + math.expm1(1 - MIN_DERIVATIVE) * torch.exp(raw[2 * bins :]))
    return x, y, torch.cat([one, inner, one])


def test_passes_through_its_knots_with_their_derivatives():
    raw = theta()
    x, y, d = knots(raw, BINS, BOUND)
    # Just inside its bin, each knot belongs to the bin on its right, and minus a little to the one on its left.
    for shift in (1e-9, -1e-9):
        z = x[1:-1] + shift
        value, ladj = Spline(BINS, BOUND).forward_and_ladj(z, raw.expand(len(z), -1))
        torch.testing.assert_close(value, y[1:-1], rtol=0, atol=1e-6)
        torch.testing.assert_close(ladj.exp(), d[1:-1], rtol=1e-5, atol=1e-6)


def test_between_knots_it_is_the_formula_of_the_paper():
    raw = theta()
    x, y, d = knots(raw, BINS, BOUND)
    xi = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    for k in range(BINS):
        w, h = x[k + 1] - x[k], y[k + 1] - y[k]
        s = h / w
        expected = y[k] + h * (s * xi**2 + d[k] * xi * (1 - xi)) / (s + (d[k] + d[k + 1] - 2 * s) * xi * (1 - xi))
        value, _ = Spline(BINS, BOUND).forward_and_ladj(x[k] + w * xi, raw.expand(5, -1))
        torch.testing.assert_close(value, expected)


@both_dtypes
@both_directions
def test_identity_outside(direction, dtype):
    value = torch.tensor([-1e6, -7.0, -BOUND, BOUND, 3.5, 1e6, torch.inf, -torch.inf], dtype=dtype)
    result, ladj = pair(Spline(BINS, BOUND), direction)(value, theta(8, dtype=dtype))
    assert torch.equal(result, value)
    assert (ladj == 0).all()


@both_dtypes
@both_directions
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_at_the_bounds_value_and_gradients_are_continuous(direction, dtype, scale):
    """At the bound +- 1e-6: the value to rounding, all gradients finite, the derivative near 1."""
    offsets = torch.tensor([-1e-2, -1e-4, -1e-6, 0.0, 1e-6, 1e-4, 1e-2], dtype=dtype)
    value = torch.cat([-BOUND + offsets, BOUND + offsets]).requires_grad_()
    raw = theta(scale=scale, dtype=dtype).expand(14, -1).clone().requires_grad_()
    result, ladj = pair(Spline(BINS, BOUND), direction)(value, raw)
    gradients = torch.autograd.grad(result.sum() + ladj.sum(), (value, raw))
    assert all(t.isfinite().all() for t in (result, ladj, *gradients))
    near = offsets.abs().repeat(2) <= 1e-6
    torch.testing.assert_close(result[near], value[near], rtol=0, atol=5e-6)
    assert (ladj[near].abs() < 1e-2).all()
    outside = value.abs() >= BOUND
    assert (gradients[1][outside] == 0).all()
    assert (gradients[0][outside] == 1).all()


@both_directions
def test_written_out_derivative_is_that_of_the_formula(direction):
    value = (2 * torch.randn(60, dtype=torch.float64)).requires_grad_()
    raw = theta(60).requires_grad_()
    weights = torch.randn(2, 60, dtype=torch.float64)
    formula = _evaluate(_forward if direction == "forward" else _inverse, value, raw, BINS, BOUND)[0]
    results = pair(Spline(BINS, BOUND), direction)(value, raw)
    for result, expected in zip(results, formula, strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    gradients = torch.autograd.grad(results, (value, raw), tuple(weights))
    expected = torch.autograd.grad(formula, (value, raw), tuple(weights))
    torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-8)


@both_directions
def test_first_and_second_derivatives(direction):
    value = (2 * torch.randn(8, dtype=torch.float64)).requires_grad_()
    raw = theta(8).requires_grad_()
    function = pair(Spline(BINS, BOUND), direction)
    assert torch.autograd.gradcheck(function, (value, raw))
    assert torch.autograd.gradgradcheck(function, (value, raw))


@both_dtypes
@both_directions
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 1000.0])
def test_finite_everywhere(direction, dtype, scale):
    value = torch.linspace(-BOUND - 1, BOUND + 1, 4001, dtype=dtype).requires_grad_()
    raw = theta(4001, scale=scale, dtype=dtype).requires_grad_()
    result, ladj = pair(Spline(BINS, BOUND), direction)(value, raw)
    gradients = torch.autograd.grad(result.sum() + ladj.sum(), (value, raw))
    assert all(t.isfinite().all() for t in (result, ladj, *gradients))
    assert (result[value.abs() < BOUND].abs() <= BOUND * (1 + 1e-5)).all()


def test_increases_along_a_line():
    z = torch.linspace(-4, 4, 10_001)
    x, _ = Spline(BINS, BOUND).forward_and_ladj(z, theta(scale=3.0, dtype=torch.float32).expand(len(z), -1))
    assert (x.diff() > -1e-6).all()


@pytest.mark.parametrize(("bins", "bound"), [(1, 5.0), (1000, 5.0), (8, 0.0), (8, -1.0), (8, torch.inf)])
def test_bad_options_raise(bins, bound):
    with pytest.raises(OptionError, match="bins must be at least 2|bins and a positive finite bound"):
        Spline(bins, bound)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it imports its compiler
def test_compiles_without_graph_breaks():
    spline = Spline(BINS, BOUND)
    value, raw = torch.randn(20, requires_grad=True), theta(20, dtype=torch.float32).requires_grad_()

    def loss(value, raw):
        x, ladj = spline.forward_and_ladj(value, raw)
        return (x.sin() + ladj).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True)
    gradients = torch.autograd.grad(compiled(value, raw), (value, raw))
    torch.testing.assert_close(gradients, torch.autograd.grad(loss(value, raw), (value, raw)), rtol=1e-4, atol=1e-4)
