"""Gaussian approximations: exact where the density is Gaussian, the best one where it is not."""

import math

import pytest
import torch

from pyroflows.inference.search import gaussians
from pyroflows.inference.search.bfgs import Search
from pyroflows.inference.search.density import Density
from pyroflows.inference.search.pathfinder import pathfinder

NUM_ROWS = 64


class Traced:
    """A log-density as the search sees it: with one number of rows, counted."""

    def __init__(self, log_density, num_rows=NUM_ROWS):
        self.log_density, self.num_rows, self.num_calls = log_density, num_rows, 0

    def __call__(self, vectors):
        assert len(vectors) == self.num_rows
        self.num_calls += 1
        vectors = vectors.detach().requires_grad_()
        value = self.log_density(vectors)
        return value, torch.autograd.grad(value.sum(), vectors)[0]


def uniform_starts(num_starts, dim, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return 2 * torch.rand(num_starts, dim, dtype=dtype) - 1


def covariance(gaussian):
    return gaussian.scale_tril.double() @ gaussian.scale_tril.double().mT


def assert_gaussian(found, mean, exact_covariance, tol):
    """The mean within ``tol`` posterior standard deviations, the covariance within ``tol`` in whitened coordinates."""
    root = torch.linalg.cholesky(exact_covariance)
    error = torch.linalg.solve_triangular(root, (found.loc.double() - mean)[:, None], upper=False)
    assert error.norm() < tol
    whitened = torch.linalg.solve_triangular(root, found.scale_tril.double(), upper=False)
    assert (whitened @ whitened.mT - torch.eye(len(mean))).abs().max() < tol


@pytest.mark.parametrize(
    ("dim", "dtype", "tol"), [(10, torch.float32, 2e-2), (10, torch.float64, 1e-4), (100, torch.float64, 1e-4)]
)
def test_ill_conditioned_gaussian(dim, dtype, tol):
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    variances = torch.logspace(-4, 2, dim, dtype=torch.float64)
    mean = 3 * torch.randn(dim, generator=generator, dtype=torch.float64)
    factor = (axes / variances.sqrt()).to(dtype)
    density = Traced(lambda u: -0.5 * ((u - mean.to(dtype)) @ factor).square().sum(-1))
    starts = uniform_starts(8, dim, dtype)
    best, *others = pathfinder(density, starts)
    assert best.loc.dtype == best.scale_tril.dtype == dtype
    assert_gaussian(best, mean, (axes * variances) @ axes.mT, tol)
    log_evidence = 0.5 * dim * math.log(2 * math.pi) + 0.5 * variances.log().sum().item()
    assert best.elbo == pytest.approx(log_evidence, abs=tol)
    assert len(others) == 7
    assert density.num_calls < 300


def regression_log_density(x, y):
    """Flat priors on the coefficients and the scale, whose logarithm is the last entry."""

    def log_density(u):
        residuals = y - u[:, :-1] @ x.mT
        return -0.5 * (residuals * torch.exp(-u[:, -1:])).square().sum(-1) - (len(y) - 1) * u[:, -1]

    return log_density


def children(seed=0):
    """Intercept, an indicator, a score around 100 and their product: correlations of 0.99, scales from 0.1 to 15."""
    generator = torch.Generator().manual_seed(seed)
    group = (torch.rand(400, generator=generator) < 0.8).double()
    score = 100 + 15 * torch.randn(400, generator=generator, dtype=torch.float64)
    x = torch.stack([torch.ones_like(score), group, score, group * score], 1)
    noise = 18 * torch.randn(400, generator=generator, dtype=torch.float64)
    return x, x @ torch.tensor([-10.0, 50.0, 1.0, -0.5]).double() + noise


def years():
    """A slope over 3952, ..., 4013: it correlates with the intercept at -0.99999."""
    generator = torch.Generator().manual_seed(1)
    year = torch.arange(3952, 4014).double()
    x = torch.stack([torch.ones_like(year), year], 1)
    return x, x @ torch.tensor([-60.0, 0.017]).double() + torch.randn(len(year), generator=generator).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("data", [children, years])
def test_regression_on_raw_predictors(data, dtype):
    x, y = data()
    density = Traced(regression_log_density(x.to(dtype), y.to(dtype)))
    found = pathfinder(density, uniform_starts(8, x.shape[1] + 1, dtype))
    assert density.num_calls < 250
    # All starts end in the only mode, and see it.
    assert len({id(g) for g in found}) == 1
    num_free = len(y) - x.shape[1] - 1
    mean = torch.linalg.lstsq(x, y).solution
    scale = (y - x @ mean).square().sum() / (num_free - 2)
    sd = (scale * torch.linalg.inv(x.mT @ x).diagonal()).sqrt()
    # The posterior is a Student t, whose mean the Gaussian of least KL has; its draws are 64 a step.
    assert ((found[0].loc[:-1].double() - mean) / sd).abs().max() < 0.05
    assert covariance(found[0]).diagonal()[:-1].sqrt() / sd == pytest.approx(1.0, abs=0.05)


def test_the_gaussian_of_least_divergence():
    """The logarithm of Gamma(a, 1): its mode is log a, the best mean log a - 1 / (2 a), the best variance 1 / a."""
    a = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    density = Traced(lambda u: (a * u - u.exp()).sum(-1))
    best, *_ = pathfinder(density, uniform_starts(4, 3))
    sd = a.rsqrt()
    # The averages are over some 500 draws, of which the gradients are bounded by about one.
    assert ((best.loc - (a.log() - 0.5 / a)) / sd).abs().max() < 0.1
    assert (covariance(best) / (sd * sd[:, None]) - torch.eye(3)).abs().max() < 0.15
    assert best.elbo == pytest.approx(
        (a * a.log() - 0.5 - a + 0.5 * (2 * math.pi * math.e / a).log()).sum().item(), abs=0.15
    )


def test_the_search_learns_the_curvature():
    """The secant equation, H y = s, where the last step needed no damping; and the mode."""
    curvatures = torch.tensor([1.0, 10.0, 1e4], dtype=torch.float64)
    starts = uniform_starts(2, 3)
    search = Search(Density(Traced(lambda u: -0.5 * (curvatures * u * u).sum(-1)), NUM_ROWS, starts), starts)
    search.advance()
    num_checked = 0
    while search.active.any():
        loc, grad, root = search.loc, search.grad, search.root
        search.advance()
        step, change = search.loc - loc, grad - search.grad
        expected = torch.linalg.solve(root, step).square().sum(-1)
        undamped = (expected > 0) & ((step * change).sum(-1) > 0.2 * expected)
        secant = (search.root @ search.root.mT @ change[..., None])[..., 0]
        torch.testing.assert_close(secant[undamped], step[undamped], rtol=1e-6, atol=1e-12)
        num_checked += int(undamped.sum())
    assert num_checked > 10
    assert search.value.min() > -1e-2


def test_funnel():
    """The density grows without end into the neck, where a Gaussian is useless."""

    def log_density(u):
        width, inner = u[:, 0], u[:, 1:]
        log_normal = -0.5 * (inner * torch.exp(-0.5 * width[:, None])).square().sum(-1) - 4.5 * width
        return -0.5 * (width / 3).square() + log_normal - 5 * math.log(2 * math.pi) - math.log(3)

    density = Traced(log_density)
    best, *_ = pathfinder(density, uniform_starts(8, 10))
    # The best of all Gaussians has about -1.9.
    assert best.elbo > -2.8
    assert best.loc[0] > -1
    assert density.num_calls < 300


def test_two_modes():
    def log_density(u):
        return torch.logaddexp(-0.5 * (u - 6).square().sum(-1), -2 * (u + 6).square().sum(-1))

    starts = torch.tensor([[-5.0, -4.0], [5.0, 4.0], [-7.0, -7.0], [7.0, 5.0]], dtype=torch.float64)
    torch.manual_seed(0)
    found = pathfinder(Traced(log_density), starts)
    assert [round(g.loc.mean().item()) for g in found] == [6, 6, -6, -6]
    assert len({id(g) for g in found}) == 2
    assert found[0].elbo - found[-1].elbo == pytest.approx(math.log(4), abs=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(bad):
    """Beyond 3 the density fails; one start is there."""

    def log_density(u):
        return torch.where((u > 3).any(-1), torch.full_like(u[:, 0], bad), -2 * (u - 1).square().sum(-1))

    torch.manual_seed(0)
    starts = torch.tensor([[-8.0, 0.0], [5.0, 1.0], [2.9, 2.9]], dtype=torch.float64)
    found = pathfinder(Traced(log_density), starts)
    assert len(found) == 2
    assert_gaussian(found[0], torch.ones(2).double(), 0.25 * torch.eye(2).double(), 0.05)


def test_the_starts_are_used_up_to_the_number_of_rows():
    torch.manual_seed(0)
    density = Traced(lambda u: -0.5 * (u[:, 0] / 1e-3).square(), num_rows=5)
    for num_starts in (1, 2, 5):
        found = pathfinder(density, uniform_starts(num_starts, 1), num_rows=5)
        assert len(found) == num_starts
        assert_gaussian(found[0], torch.zeros(1).double(), 1e-6 * torch.eye(1).double(), 1e-3)


def test_errors():
    def log_density(u):
        return u.sum(-1) * math.nan

    with pytest.raises(ValueError, match="finite at none of the starts"):
        pathfinder(Traced(log_density), torch.zeros(2, 3))
    for shape in [(3,), (65, 2), (0, 2)]:
        with pytest.raises(ValueError, match="starts must be"):
            pathfinder(Traced(log_density), torch.zeros(shape))


def test_moments_by_values_are_those_by_gradients():
    """For a Gaussian target both are its precision P, and P b for its mean b, up to the noise of Stein's lemma."""
    torch.manual_seed(0)
    noise = torch.randn(200_000, 2, dtype=torch.float64)
    precision = torch.tensor([[1.5, 0.4], [0.4, 0.7]], dtype=torch.float64)
    z = noise - torch.tensor([0.3, -0.2], dtype=torch.float64)
    log_weights = -0.5 * ((z @ precision) * z).sum(-1) + 0.5 * noise.square().sum(-1)
    expected = gaussians._by_gradients(noise, -z @ precision)
    for found, exact in zip(gaussians._by_values(noise, log_weights), expected, strict=True):
        # The products of log weights and noise have sds of up to 3.
        torch.testing.assert_close(found, exact, rtol=0.0, atol=4 * 3 / len(noise) ** 0.5)
