"""The univariate maps: identity at zero, log-derivatives, inverses, gradients, and that training bends them."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from torch.nn import functional as F

from pyroflows.errors import OptionError
from pyroflows.transforms.univariate import (
    SOS,
    Additive,
    Affine,
    CircularSpline,
    LeakyReLU,
    Monotone,
    Scale,
    SinhArcsinh,
    Spline,
    univariate_named,
)
from pyroflows.transforms.univariate.affine import _Affine, _recorded

# A new map enters by one line, and by one in NAMES, OPTIONS and REPRS below.
MAPS = {
    "additive": Additive(),
    "scale": Scale(),
    "scale-unclamped": Scale(None, None),
    "affine": Affine(),
    "affine-unclamped": Affine(max_contraction=None, max_expansion=None),
    "leaky_relu": LeakyReLU(),
    "leaky_relu-unclamped": LeakyReLU(None, None),
    "sinh_arcsinh": SinhArcsinh(),
    "spline": Spline(),
    "circular_spline": CircularSpline(),
    "circular_spline-least": CircularSpline(bins=2),
    "sos": SOS(),
    "sos-many": SOS(num_polynomials=3, degree=5, bound=2.0),
    "sos-least": SOS(num_polynomials=1, degree=1),
    "monotone": Monotone(),
    "monotone-many": Monotone(num_units=13),
    "monotone-least": Monotone(num_units=1),
}
NAMES = {
    "additive": Additive,
    "scale": Scale,
    "affine": Affine,
    "leaky_relu": LeakyReLU,
    "sinh_arcsinh": SinhArcsinh,
    "spline": Spline,
    "circular_spline": CircularSpline,
    "sos": SOS,
    "monotone": Monotone,
}
OPTIONS = {
    "no polynomials": lambda: SOS(num_polynomials=0),
    "no degree": lambda: SOS(degree=0),
    "no bound": lambda: SOS(bound=0.0),
    "infinite bound": lambda: SOS(bound=math.inf),
    "bound not a number": lambda: SOS(bound=math.nan),
    "no units": lambda: Monotone(num_units=0),
}
REPRS = {
    "scale": "Scale(max_contraction=4.0, max_expansion=2.0)",
    "leaky_relu": "LeakyReLU(max_contraction=4.0, max_expansion=2.0)",
    "sinh_arcsinh": "SinhArcsinh()",
    "sos": "SOS(num_polynomials=2, degree=3, bound=3.0)",
    "monotone": "Monotone(num_units=8)",
}
BENDING = [
    "spline",
    "circular_spline",
    "sos",
    "monotone",
]  # maps that can be more than affine, at their default options
BY_ROOT_SEARCH = ["sos", "sos-many", "monotone", "monotone-many"]
# Of the parameters. An exponential of ten is extreme enough.
EXTREME = {torch.float64: 1e4, torch.float32: 1e2}
EXTREME_OF_LOGS = {
    "scale-unclamped": 10,
    "affine-unclamped": 10,
    "leaky_relu-unclamped": 10,
    "spline": 10,
    "circular_spline": 10,
    "circular_spline-least": 10,
}
NEAR = [0.0, 1e-6, -1e-6, 0.3, -1.0, 2.0, -3.0, 3.0, 10.0, -10.0]
FAR = [50.0, -50.0, 1e3, -1e3, 1e4, -1e4, 1e6, -1e6]

all_maps = pytest.mark.parametrize("name", MAPS)
all_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
half_dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
both_directions = pytest.mark.parametrize("direction", ["forward", "inverse"])
three_scales = pytest.mark.parametrize("scale", ["zero", "random", "extreme"])


def pair_of(name, direction):
    univariate = MAPS[name]
    return univariate.forward_and_ladj if direction == "forward" else univariate.inverse_and_ladj


def parameters(name, scale="random", dtype=torch.float64, num=50):
    """Random parameters ``(num, P)``; extremes of all sizes up to the greatest."""
    if scale == "zero":
        return torch.zeros(num, MAPS[name].num_params, dtype=dtype)
    theta = torch.randn(num, MAPS[name].num_params, dtype=dtype)
    if scale == "random":
        return theta
    sizes = torch.logspace(0, math.log10(EXTREME_OF_LOGS.get(name, EXTREME[dtype])), num, dtype=dtype)
    return sizes[:, None] * theta.clamp(-1, 1)


def numbers(name):
    """Points near and far. Far out, float32 does not tell angles of one turn apart."""
    return NEAR if name.startswith("circular") else NEAR + FAR


def points(theta, numbers):
    """One column of points for each row of parameters."""
    return torch.tensor(numbers, dtype=theta.dtype)[:, None].expand(-1, len(theta))


def rounding(name, z, theta):
    """To what a value x = T(z) is known: its own rounding, that of z times the slope, and that of the shift in it."""
    x, ladj = MAPS[name].forward_and_ladj(z, theta)
    shift, _ = MAPS[name].forward_and_ladj(torch.zeros_like(z), theta)
    return torch.finfo(z.dtype).eps * (1 + x.abs() + z.abs() * ladj.exp() + shift.abs())


# Identity


@all_maps
@all_dtypes
@both_directions
def test_zero_is_the_identity(name, dtype, direction):
    theta = parameters(name, "zero", dtype)
    z = points(theta, NEAR + FAR)
    x, ladj = pair_of(name, direction)(z, theta)
    eps = torch.finfo(dtype).eps
    assert ((x - z).abs() <= 4 * eps * (1 + z.abs())).all()
    assert (ladj.abs() <= 4 * eps).all()


@all_maps
@half_dtypes
@both_directions
def test_half_precision_stays_and_is_the_identity_at_zero(name, dtype, direction):
    theta = parameters(name, "zero", dtype, num=1)
    z = points(theta, [*NEAR, 50.0, -50.0, 1e3, -1e3])
    x, ladj = pair_of(name, direction)(z, theta)
    assert x.dtype == ladj.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert ((x - z).abs() <= 4 * eps * (1 + z.abs())).all()
    assert (ladj.abs() <= 4 * eps).all()


# Values and log-derivatives


def test_scale_and_leaky_rectifier_are_their_formulas():
    z, log_scale = torch.tensor([-3.0, -0.5, 0.0, 2.0]), torch.tensor([0.7])
    x, ladj = Scale(None, None).forward_and_ladj(z, log_scale)
    torch.testing.assert_close((x, ladj), (math.exp(0.7) * z, torch.full((4,), 0.7)))
    x, ladj = LeakyReLU(None, None).forward_and_ladj(z, log_scale)
    torch.testing.assert_close(x, F.leaky_relu(z, math.exp(0.7)))
    torch.testing.assert_close(ladj, torch.tensor([0.7, 0.7, 0.0, 0.0]))
    clamped = Scale(max_contraction=3.0, max_expansion=1.0).forward_and_ladj(
        torch.ones(2), torch.tensor([[-1e3], [1e3]])
    )
    torch.testing.assert_close(clamped[1], torch.tensor([-3.0, 1.0]))


def test_sinh_arcsinh_is_its_formula_and_linear_far_out():
    theta = torch.randn(4, dtype=torch.float64)
    shift, log_scale = theta[0], torch.where(theta[1] < 0, 4.0, 2.0).double()
    log_scale = log_scale * torch.tanh(theta[1] / log_scale)
    skew, tail = 2 * torch.tanh(theta[2] / 2), torch.exp(math.log(1.5) * torch.tanh(theta[3] / math.log(1.5)))
    z = torch.linspace(-99, 99, 41, dtype=torch.float64)
    x, _ = SinhArcsinh().forward_and_ladj(z, theta)
    torch.testing.assert_close(x, shift + log_scale.exp() * torch.sinh(tail * torch.asinh(z) + skew))
    for side in (1, -1):
        z = side * torch.tensor([1e6, 1e8, 1e9], dtype=torch.float64)
        _, ladj = SinhArcsinh().forward_and_ladj(z, theta)
        torch.testing.assert_close(ladj, ladj[0].expand(3))


@pytest.mark.parametrize(("num_polynomials", "degree"), [(1, 1), (2, 2), (2, 3), (3, 8)])
def test_sos_is_the_integral_of_its_squares(num_polynomials, degree):
    """Against NumPy's polynomials, expanded and integrated exactly."""
    sos = SOS(num_polynomials, degree, bound=2.0)
    theta = torch.randn(sos.num_params, dtype=torch.float64)
    coefficients = theta[1:].reshape(num_polynomials, degree + 1).numpy()
    centers = np.linspace(-1, 1, 2 * num_polynomials + 1)[1::2]  # the middles of K equal parts of [-1, 1]
    slope = Polynomial([0.0])
    for center, a in zip(centers, coefficients, strict=True):
        slope += (1 + Polynomial(a)(Polynomial([-center, 1 / 2.0]))) ** 2 * (1 - 1e-3) / num_polynomials
    slope += 1e-3
    z = torch.linspace(-2, 2, 41, dtype=torch.float64)
    x, ladj = sos.forward_and_ladj(z, theta)
    torch.testing.assert_close(x, theta[0] + torch.from_numpy(slope.integ()(z.numpy())))
    torch.testing.assert_close(ladj, torch.from_numpy(np.log(slope(z.numpy()))))


def test_sos_is_linear_beyond_its_bound():
    sos = SOS(bound=2.0)
    theta = torch.randn(sos.num_params, dtype=torch.float64)
    for end in (2.0, -2.0):
        z = end * torch.tensor([1.0, 1.5, 2.0, 500.0], dtype=torch.float64)
        x, ladj = sos.forward_and_ladj(z, theta)
        torch.testing.assert_close(ladj, ladj[0].expand(4))
        torch.testing.assert_close(x, x[0] + ladj[0].exp() * (z - end))


def test_monotone_is_the_logit_of_a_mean_of_sigmoids():
    monotone = Monotone(num_units=5)
    theta = torch.randn(15, dtype=torch.float64)
    alpha, beta, omega = theta.reshape(3, 5)
    a = 0.1 + 0.9 * F.softplus(5 * alpha + math.log(math.e - 1))
    m = torch.linspace(-2, 2, 11, dtype=torch.float64)[1::2]
    z = torch.linspace(-3, 3, 41, dtype=torch.float64)
    s = torch.softmax(omega, 0) @ torch.sigmoid(a[:, None] * (z - m[:, None]) + m[:, None] + 5 * beta[:, None])
    torch.testing.assert_close(monotone.forward_and_ladj(z, theta)[0], 1e-3 * z + (1 - 1e-3) * torch.logit(s))


@all_maps
@all_dtypes
@pytest.mark.parametrize("scale", ["zero", "random"])
def test_log_derivative_is_that_of_autograd(name, dtype, scale):
    theta = parameters(name, scale, dtype)
    z = points(theta, numbers(name))
    ladj = MAPS[name].forward_and_ladj(z, theta)[1].double()
    z = z.double().requires_grad_()
    (derivative,) = torch.autograd.grad(MAPS[name].forward_and_ladj(z, theta.double())[0].sum(), z)
    torch.testing.assert_close(ladj, derivative.log(), rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-4)


@all_maps
@pytest.mark.parametrize("scale", ["zero", "random"])
def test_gradients_keep_their_digits_far_out(name, scale):
    """Autograd's derivative must be as good as the one that the map computes itself."""
    theta = parameters(name, scale, torch.float32)
    z = points(theta, FAR).clone().requires_grad_()
    x, ladj = MAPS[name].forward_and_ladj(z, theta)
    (derivative,) = torch.autograd.grad(x.sum(), z)
    torch.testing.assert_close(derivative.log(), ladj, rtol=0, atol=1e-5)


@all_maps
@three_scales
def test_log_derivative_of_the_inverse_is_minus_that_at_the_root(name, scale):
    theta = parameters(name, scale)
    z, ladj = MAPS[name].inverse_and_ladj(points(theta, NEAR + FAR), theta)
    torch.testing.assert_close(ladj, -MAPS[name].forward_and_ladj(z, theta)[1])


@all_maps
@three_scales
def test_increases(name, scale):
    theta = parameters(name, scale)
    z = torch.cat([-torch.logspace(6, 1, 100), torch.linspace(-10, 10, 4001)[1:-1], torch.logspace(1, 6, 100)]).double()
    z = z[:, None].expand(-1, len(theta))
    x, ladj = MAPS[name].forward_and_ladj(z, theta)
    assert ladj.isfinite().all()
    # Where two values differ by rounding, rounding decides.
    assert (x.diff(dim=0) >= -4 * rounding(name, z, theta)[1:]).all()
    assert (x[4:] > x[:-4]).all()


@pytest.mark.parametrize("name", BY_ROOT_SEARCH)
@all_dtypes
@three_scales
def test_slope_has_a_floor(name, dtype, scale):
    """It bounds the condition of the inverse, and the gradients of samples."""
    theta = parameters(name, scale, dtype)
    ladj = MAPS[name].forward_and_ladj(points(theta, NEAR + FAR), theta)[1]
    assert (ladj >= math.log(1e-3) - 1e-5).all()


# Inverses


@all_maps
@all_dtypes
@three_scales
def test_inverse_undoes_forward(name, dtype, scale):
    theta = parameters(name, scale, dtype)
    z = points(theta, [*torch.linspace(-10, 10, 101).tolist(), 1e3, -1e3])
    x, ladj = MAPS[name].forward_and_ladj(z, theta)
    again, ladj_again = MAPS[name].inverse_and_ladj(x, theta)
    # x is known to rounding, and the inverse carries that back by its slope, of the two ends the steeper one.
    slope = torch.minimum(ladj, -ladj_again).exp()
    error = torch.finfo(dtype).eps * z.abs() + rounding(name, z, theta) / slope
    assert ((again - z).abs() <= 16 * error).all()


@all_maps
@all_dtypes
@three_scales
def test_inverse_meets_its_target_however_far(name, dtype, scale):
    """A search that saturates at the end of a bracket would return a value whose image is another."""
    theta = parameters(name, scale, dtype)
    x = points(theta, numbers(name))
    z, ladj = MAPS[name].inverse_and_ladj(x, theta)
    again, _ = MAPS[name].forward_and_ladj(z, theta)
    assert z.isfinite().all() and ladj.isfinite().all()
    assert ((again - x).abs() <= 16 * rounding(name, z, theta)).all()


@all_maps
def test_values_that_are_not_finite_pass_as_nan(name):
    theta = parameters(name, num=1)
    z, ladj = MAPS[name].inverse_and_ladj(torch.tensor([math.nan, 1.0], dtype=torch.float64), theta)
    assert z.isnan().tolist() == [True, False]
    assert ladj[1].isfinite()


@pytest.mark.parametrize("name", BY_ROOT_SEARCH)
def test_parameters_that_are_not_finite_pass_as_nan(name):
    """Each of them, whether or not the bracket depends on it: a diverged fit is for the training guard to see."""
    for i in range(MAPS[name].num_params):
        theta = parameters(name, num=1)
        theta[..., i] = math.nan
        z, ladj = MAPS[name].inverse_and_ladj(torch.ones(1, dtype=torch.float64), theta)
        assert z.isnan().all() and ladj.isnan().all()


@all_maps
@both_directions
def test_density_integrates_to_one(name, direction):
    """The density of T(z), or of its inverse, for a normal z; the grid is dense where the density is."""
    theta = parameters(name, num=2)
    there, back = pair_of(name, direction), pair_of(name, "inverse" if direction == "forward" else "forward")
    # The inverse of a linear slope, squared, is steep where the slope is at its floor.
    num_edges = 40_001 if name == "sos-least" else 10_001
    edges, _ = there(torch.linspace(-6, 6, num_edges, dtype=torch.float64)[:, None].expand(-1, 2), theta)
    z, ladj = back((edges[1:] + edges[:-1]) / 2, theta)
    density = (ladj - z**2 / 2).exp() / math.sqrt(2 * math.pi)
    mass = (density * edges.diff(dim=0)).sum(0)
    torch.testing.assert_close(mass, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-4)


# Gradients


@all_maps
@both_directions
@pytest.mark.parametrize("scale", ["zero", "random"])
def test_gradients(name, direction, scale):
    """Of both results, with respect to value and parameters; those of a root search are implicit."""
    least = 0.1 if name.startswith("leaky_relu") else 0.0  # zero is its corner
    value = torch.tensor([least, 0.4, -1.2, 7.0, -20.0], dtype=torch.float64, requires_grad=True)
    theta = parameters(name, scale, num=5).requires_grad_()
    # Of many parameters a random projection of the Jacobian is checked.
    assert torch.autograd.gradcheck(pair_of(name, direction), (value, theta), fast_mode=theta.numel() > 50)


@all_maps
@both_directions
def test_derivatives_for_parameters_that_depend_on_the_value(name, direction):
    """As in an autoregressive layer: derivatives by the value alone and through the parameters must not mix."""
    value = torch.tensor([0.3, 0.4, -1.2], dtype=torch.float64, requires_grad=True)
    theta = parameters(name, num=3)
    map_of = pair_of(name, direction)

    def total(value):
        return map_of(value, theta + 0.1 * torch.sin(value.roll(1))[:, None])

    def gradient(create_graph):
        return torch.autograd.grad(sum(t.sin().sum() for t in total(value)), value, create_graph=create_graph)[0]

    torch.testing.assert_close(gradient(True), gradient(False))
    assert torch.autograd.gradgradcheck(total, value, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("name", BY_ROOT_SEARCH)
@both_directions
def test_second_derivatives(name, direction):
    value = torch.tensor([0.0, 0.4, -1.2], dtype=torch.float64, requires_grad=True)
    theta = parameters(name, num=3).requires_grad_()
    assert torch.autograd.gradgradcheck(pair_of(name, direction), (value, theta), fast_mode=True, atol=1e-4)


@all_maps
@both_directions
@three_scales
def test_gradients_are_finite_everywhere(name, direction, scale):
    theta = parameters(name, scale, torch.float32).requires_grad_()
    value = points(theta, NEAR + FAR).clone().requires_grad_()
    for result in pair_of(name, direction)(value, theta):
        if result.requires_grad:
            for gradient in torch.autograd.grad(result.sum(), (value, theta), allow_unused=True, retain_graph=True):
                assert gradient is None or gradient.isfinite().all()


# Shapes


@all_maps
@both_directions
def test_parameters_broadcast(name, direction):
    pair, theta = pair_of(name, direction), parameters(name, num=4)
    value = torch.randn(3, 2, 4, dtype=torch.float64)
    results = pair(value, theta)
    one_by_one = [pair(value[i, j, k], theta[k]) for i in range(3) for j in range(2) for k in range(4)]
    for result, scalars in zip(results, zip(*one_by_one, strict=True), strict=True):
        assert result.shape == (3, 2, 4)
        torch.testing.assert_close(result, torch.stack(scalars).reshape(3, 2, 4))


@all_maps
@both_directions
def test_layout_of_parameters_does_not_matter(name, direction):
    pair, theta = pair_of(name, direction), parameters(name, num=4)
    value = torch.randn(4, dtype=torch.float64)
    parameter_major = theta.T.contiguous().T
    for result, expected in zip(pair(value, parameter_major), pair(value, theta), strict=True):
        torch.testing.assert_close(result, expected)


@all_maps
@both_directions
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)], ids=str)
def test_scalars_and_empty_batches(name, direction, shape):
    theta = torch.randn(*shape, MAPS[name].num_params)
    for result in pair_of(name, direction)(torch.randn(shape), theta):
        assert result.shape == shape


# Training from zero parameters


def trained(name, optimiser, lr, steps):
    """Fit ``p(x) = N(T(x)) T'(x)`` to two clusters from zero parameters, where a network's output starts."""
    cluster = torch.bernoulli(torch.full((500,), 0.4, dtype=torch.float64))
    x = torch.where(cluster == 1, -1.2, 0.8) + 0.3 * torch.randn(500, dtype=torch.float64)
    theta = torch.zeros(MAPS[name].num_params, dtype=torch.float64, requires_grad=True)
    steps_of = optimiser([theta], lr=lr)
    for _ in range(steps):
        z, ladj = MAPS[name].forward_and_ladj(x, theta)
        loss = (z**2 / 2 - ladj).mean()
        steps_of.zero_grad()
        loss.backward()
        steps_of.step()
    return theta.detach(), loss.item(), 0.5 + x.std().log().item()


@pytest.mark.parametrize("name", BENDING)
def test_training_bends_the_map(name):
    theta, loss, loss_of_affine = trained(name, torch.optim.Adam, 0.05, 150)
    assert loss < loss_of_affine - 0.2
    _, ladj = MAPS[name].forward_and_ladj(torch.linspace(-2, 2, 101, dtype=torch.float64), theta)
    assert ladj.std() > 0.3


OPTIMISERS = {"adam": (torch.optim.Adam, 0.05), "sgd": (torch.optim.SGD, 0.02)}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_polynomials_do_not_stay_multiples_of_one(optimiser):
    theta, _, _ = trained("sos-many", *OPTIMISERS[optimiser], 200)
    sos = MAPS["sos-many"]
    v = torch.linspace(-1, 1, 101, dtype=torch.float64)
    powers = (v - torch.tensor(sos._centers)[:, None])[..., None] ** torch.arange(sos.degree + 1)
    values = torch.linalg.svdvals(1 + (powers @ theta[1:].reshape(3, -1, 1)).squeeze(-1))
    assert values[1] > 0.1 * values[0]


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_units_do_not_stay_alike(optimiser):
    theta, _, _ = trained("monotone", *OPTIMISERS[optimiser], 200)
    slopes, offsets, _ = MAPS["monotone"]._units(theta, 0)
    assert torch.pdist(torch.stack([slopes, offsets], -1)).min() > 1e-4


# Names and options


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    assert type(univariate_named(name)) is NAMES[name]


@pytest.mark.parametrize("option", OPTIONS)
def test_wrong_options_raise(option):
    with pytest.raises(OptionError, match="must be at least 1, got|needs a positive, finite bound, got"):
        OPTIONS[option]()


@pytest.mark.parametrize("name", REPRS)
def test_repr(name):
    assert repr(univariate_named(name)) == REPRS[name]


@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize("in_columns", [False, True])
def test_written_out_derivative_of_affine_maps_is_that_of_the_formula(is_inverse, in_columns):
    torch.manual_seed(0)
    theta = torch.randn(2, 5, 7, dtype=torch.float64)
    theta = (3 * theta.permute(2, 1, 0) if in_columns else theta.reshape(7, 5, 2)).requires_grad_()
    value = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    found, expected = (f(is_inverse, value, theta, (4.0, 2.0)) for f in (_Affine.apply, _recorded))
    torch.testing.assert_close(found, expected)
    cotangents = torch.randn(2, 7, 5, dtype=torch.float64).unbind()
    a, b = (torch.autograd.grad(outputs, (value, theta), cotangents) for outputs in (found, expected))
    torch.testing.assert_close(a, b)
    assert torch.autograd.gradgradcheck(lambda *inputs: _Affine.apply(is_inverse, *inputs, (4.0, 2.0)), (value, theta))
