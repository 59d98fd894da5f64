"""The root search under the inverses of planar, Sylvester and monotone maps."""

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyroflows.errors import InversionError
from pyroflows.transforms.planar import tanh_root
from pyroflows.transforms.root import increasing_root


def tanh_map(m):
    def function(a):
        h = torch.tanh(a)
        return a + m * h, 1 + m * (1 - h**2)

    return function


def bent_line(left, right):
    return lambda a: (torch.where(a < 0, left * a, right * a), torch.where(a < 0, left, right).to(a))


def step(a):
    s = torch.sigmoid(1e3 * a)
    return a + 1e4 * s, 1 + 1e7 * s * (1 - s)


# Each returns value and derivative, and is increasing.
NASTY = {
    "identity": lambda a: (a, torch.ones_like(a)),
    "almost flat at zero": tanh_map(-1 + 1e-3),
    "ordinary bend": tanh_map(9.434518238129245),
    "steep at zero": tanh_map(1e6),
    "arctan": lambda a: (torch.arctan(a), 1 / (1 + a**2)),
    "arctan, almost flat outside": lambda a: (torch.arctan(10 * a) + 1e-3 * a, 10 / (1 + 100 * a**2) + 1e-3),
    "sinh": lambda a: (torch.sinh(a), torch.cosh(a)),
    "cube": lambda a: (a**3 + 1e-6 * a, 3 * a**2 + 1e-6),
    "flat, then steep": bent_line(1e-3, 1e3),
    "steep, then flat": bent_line(1e3, 1e-3),
    "staircase": lambda a: (a + 0.999 * torch.sin(a), 1 + 0.999 * torch.cos(a)),
    "step": step,
}


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "bracket",
    [(-50.0, 50.0), (-20.0, 50.0), (-50.0, 21.0), (-20.001, 20.001), (-1e4, 1e4), (-20.5, 1e7), (-1e7, 1e6)],
    ids=str,
)
def test_root_is_found_to_float_precision(name, dtype, bracket):
    function = NASTY[name]
    near = torch.logspace(-6, math.log10(20), 200, dtype=dtype)
    images, _ = function(torch.cat([-near.flip(0), torch.zeros(1, dtype=dtype), near]))
    # Values between images of floats have no exact root: there the search must come to rest beside it.
    target = torch.cat([images, (images[1:] + images[:-1]) / 2])
    a = increasing_root(function, target, *(torch.full_like(target, end) for end in bracket))
    value, slope = function(a)
    # The value is known to its own rounding, to that of its terms, which are of the size of a, and to a's, times slope.
    rounding = torch.finfo(dtype).eps * (target.abs() + a.abs() * (1 + slope))
    assert ((value - target).abs() <= 4 * rounding).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tanh_root_over_all_slopes_and_targets(dtype):
    """Newton's method runs in circles for some of these: the search must not trust it."""
    m = torch.cat([-1 + torch.logspace(-3, 0, 61, dtype=dtype), torch.logspace(-3, 4, 71, dtype=dtype)])
    c = torch.cat([torch.linspace(-30, 30, 601, dtype=dtype), torch.logspace(-8, 4, 61, dtype=dtype)])
    m, c = torch.broadcast_tensors(m[:, None], c)
    a = tanh_root(m, c)
    rounding = torch.finfo(dtype).eps * (c.abs() + a.abs() * (1 + 1 + m * (1 - torch.tanh(a) ** 2)))
    assert ((a + m * torch.tanh(a) - c).abs() <= 4 * rounding).all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 2)], ids=str)
def test_any_shape(shape):
    target = torch.randn(shape)
    a = increasing_root(NASTY["sinh"], target, target - 5, target + 5)
    torch.testing.assert_close(a, torch.asinh(target))


# Gradients


def root_of(m, c):
    return tanh_root(m, c)


def parameters():
    m = torch.tensor([-0.9, 0.0, 0.3, 9.0], dtype=torch.float64, requires_grad=True)
    c = torch.tensor([0.1, -2.0, 1.0, -7.0], dtype=torch.float64, requires_grad=True)
    return m, c


def test_gradient_is_the_implicit_one():
    m, c = parameters()
    assert torch.autograd.gradcheck(root_of, (m, c))
    a = root_of(m, c)
    h = torch.tanh(a.detach())
    slope = 1 + m * (1 - h**2)
    gradients = torch.autograd.grad(a.sum(), (m, c))
    for gradient, expected in zip(gradients, (-h / slope, 1 / slope), strict=True):
        torch.testing.assert_close(gradient, expected.detach())


def test_second_derivatives_are_exact():
    """A Hessian of log q, as Laplace's method takes it, must not be silently wrong."""
    assert torch.autograd.gradgradcheck(root_of, parameters())


def test_gradient_where_newton_needs_the_bracket():
    theta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    target = torch.linspace(-1.3, 1.3, 5, dtype=torch.float64, requires_grad=True)

    def root(theta, target):
        bracket = torch.full_like(target, 50)
        return increasing_root(
            lambda a: (torch.arctan(theta * a), theta / (1 + (theta * a) ** 2)), target, -bracket, bracket
        )

    torch.testing.assert_close(root(theta, target), torch.tan(target) / theta)
    assert torch.autograd.gradcheck(root, (theta, target))


def test_bracket_gets_no_gradient():
    target, end = torch.tensor(1.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    increasing_root(NASTY["sinh"], target, -end, end).backward()
    assert target.grad is not None
    assert end.grad is None or end.grad == 0


# Under vmap and tracing


def test_vmap_equals_a_batch():
    m, c = parameters()
    torch.testing.assert_close(torch.func.vmap(root_of)(m, c), root_of(m, c))
    torch.testing.assert_close(torch.func.vmap(root_of, in_dims=(None, 0))(m[3], c), root_of(m[3], c))


def test_vmap_of_gradients_equals_a_batch():
    m, c = parameters()
    gradients = torch.func.vmap(torch.func.grad(root_of, argnums=(0, 1)))(m.detach(), c.detach())
    for gradient, expected in zip(gradients, torch.autograd.grad(root_of(m, c).sum(), (m, c)), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_trace_serves_other_values():
    m, c = (p.detach() for p in parameters())
    graph = make_fx(root_of)(m, c)
    torch.testing.assert_close(graph(m + 0.05, c - 3), root_of(m + 0.05, c - 3))


def test_trace_of_gradients_serves_other_values():
    m, c = (p.detach() for p in parameters())
    gradients = torch.func.grad(lambda m, c: root_of(m, c).sum(), argnums=(0, 1))
    graph = make_fx(gradients)(m, c)
    for gradient, expected in zip(graph(m + 0.05, c - 3), gradients(m + 0.05, c - 3), strict=True):
        torch.testing.assert_close(gradient, expected)


# Failures


def search(target):
    return increasing_root(NASTY["sinh"], target, torch.full_like(target, -1), torch.full_like(target, 1))


def test_root_outside_the_bracket_raises():
    with pytest.raises(InversionError, match="missed its target by 8.8e.00 at 1 of 2 values.*float64"):
        search(torch.tensor([0.5, 10.0]))


@pytest.mark.parametrize("width", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_root_outside_a_wide_bracket_raises(width, dtype):
    """The residual counts against target and root, however wide the bracket: otherwise 1 beside 1e6 is rounding."""
    target = torch.ones(1, dtype=dtype)
    with pytest.raises(InversionError, match="missed its target by 1.0e.00 at 1 of 1 values"):
        increasing_root(NASTY["identity"], target, -width * target, 0 * target)


def test_vmap_gives_nan_where_eager_raises():
    roots = torch.func.vmap(search)(torch.tensor([0.5, 10.0]))
    torch.testing.assert_close(roots[0], torch.asinh(torch.tensor(0.5)))
    assert roots[1].isnan()


def test_trace_gives_nan_where_eager_raises():
    graph = make_fx(search)(torch.tensor([0.5, 0.1]))
    roots = graph(torch.tensor([0.5, 10.0]))
    torch.testing.assert_close(roots[0], torch.asinh(torch.tensor(0.5)))
    assert roots[1].isnan()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_targets_that_are_not_finite_pass_as_nan(bad):
    m = torch.full((3,), 0.7)
    c = torch.tensor([1.0, bad, -2.0], requires_grad=True)
    roots = root_of(m, c)
    assert roots.isnan().tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(roots[[0, 2]].sum(), c)
    torch.testing.assert_close(gradient[[0, 2]], torch.autograd.grad(root_of(m[:2], d := c[[0, 2]]).sum(), d)[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_parameters_that_are_not_finite_pass_as_nan(bad):
    """A diverged fit must reach the training guard as NaN, whatever went bad first."""
    roots = root_of(torch.tensor([0.7, bad]), torch.tensor([1.0, 1.0]))
    assert roots.isnan().tolist() == [False, True]


def test_parameters_unknown_to_the_bracket_that_are_not_finite_pass_as_nan():
    m = torch.tensor([0.7, math.nan])
    roots = increasing_root(tanh_map(m), torch.ones(2), torch.zeros(2), torch.ones(2))
    assert roots.isnan().tolist() == [False, True]


@pytest.mark.parametrize("end", [math.nan, math.inf])
def test_brackets_that_are_not_finite_pass_as_nan(end):
    upper = torch.tensor([5.0, end])
    for lower in (-upper, torch.full_like(upper, -5)):
        roots = increasing_root(NASTY["sinh"], torch.ones(2), lower, upper)
        assert roots.isnan().tolist() == [False, True]
