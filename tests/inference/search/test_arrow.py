"""Laws of hierarchies: exact where all is Gaussian, and fits of hundreds of local latents against quadrature."""

import pyro
import pytest
import torch
from pyro import distributions as dist

import pyroflows as pf
from pyroflows.compiling.check import Compiler
from pyroflows.flows import Recipe
from pyroflows.guides.hierarchical import hierarchy_near
from pyroflows.inference.search import hierarchical
from pyroflows.inference.search.gaussians import GaussianApproximation
from pyroflows.inference.search.hierarchical import global_marginal, with_locals
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import describe
from pyroflows.transforms.hierarchy import Hierarchy


@pytest.fixture(autouse=True)
def small_models_count(monkeypatch):
    monkeypatch.setattr(hierarchical, "MIN_LOCAL", 50)


def flat(num=60):
    """Rows of two elements, whose scales and data differ."""
    torch.manual_seed(0)
    scales, y = 0.5 + torch.rand(num, 2).double(), torch.randn(num, 2).double()

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2).double(), 2.0).to_event(1))
        slope = pyro.sample("slope", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("rows", num):
            x = pyro.sample("x", dist.Normal(mu + slope * scales, scales).to_event(1))
            pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=y[:, 0])
            pyro.sample("z", dist.Normal(x[:, 1], 1.0), obs=y[:, 1])

    return model


def nested():
    """Rows in groups in regions, each with a latent of its own, and groups with another site."""
    torch.manual_seed(0)
    y = torch.randn(3, 4, 9).double()

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2).double(), 2.0).to_event(1))
        with pyro.plate("regions", 9, dim=-1):
            region = pyro.sample("region", dist.Normal(mu[..., :1], 1.5))
            with pyro.plate("groups", 4 * 2, dim=-2):
                group = pyro.sample("group", dist.Normal(region, 0.7))
                other = pyro.sample("other", dist.Normal(mu[..., 1:] + 0.5 * group, 0.6))
                with pyro.plate("rows", 9, dim=-3):
                    row = pyro.sample("row", dist.Normal(region + group - other, 0.9))
                    pyro.sample("y", dist.Normal(row, 1.1), obs=y.repeat(3, 2, 1))

    return model


def made(model):
    layout = Layout(describe(model, (), {}))
    center = torch.zeros(layout.dim, dtype=layout.dtype)
    examples = 0.1 * torch.randn(5, layout.dim, dtype=layout.dtype)
    return LogJoint(model, (), {}, layout, examples, Compiler("none")), center


def exact(log_joint, center):
    """Mean and covariance of a Gaussian log joint, and its log evidence."""
    hessian = torch.autograd.functional.hessian(lambda u: log_joint(u[None]).sum(), center)
    value, gradient = torch.func.grad_and_value(lambda u: log_joint(u[None]).sum())(center)[::-1]
    covariance = torch.linalg.inv(-hessian)
    mean = center + covariance @ gradient
    at_mean = value + 0.5 * gradient @ covariance @ gradient
    return (
        mean,
        covariance,
        at_mean + 0.5 * torch.logdet(2 * torch.pi * covariance),
    )


@pytest.mark.parametrize("model", [flat(), nested()], ids=["flat", "nested"])
def test_a_gaussian_hierarchy_is_exact(model):
    log_joint, center = made(model)
    mean, covariance, log_evidence = exact(log_joint, center)
    marginal = global_marginal(log_joint, center)
    assert len(marginal.places) < 4
    # The marginal density is that of the exact Gaussian, and its gradient too.
    at = mean[marginal.places] + 0.3 * torch.randn(marginal.num_rows, len(marginal.places), dtype=torch.float64)
    value, gradient = marginal.value_and_grad(at)(at)
    of_globals = covariance[marginal.places][:, marginal.places]
    expected = torch.distributions.MultivariateNormal(mean[marginal.places], of_globals).log_prob(at) + log_evidence
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)
    score = -torch.linalg.solve(of_globals, (at - mean[marginal.places]).mT).mT
    torch.testing.assert_close(gradient, score, rtol=1e-5, atol=1e-5)
    # So is the flow that starts there.
    start = GaussianApproximation(mean[marginal.places], torch.linalg.cholesky(of_globals), elbo=0.0)
    flow = hierarchy_near(with_locals(marginal, start), Recipe("Gaussian"), has_local_flow=True)
    x, log_q = flow().rsample_and_log_prob((50,))
    torch.testing.assert_close(log_joint(x) - log_q, log_evidence.expand(50), rtol=0, atol=1e-5)
    found = torch.func.jacrev(flow.transform)(torch.zeros_like(center))
    torch.testing.assert_close(found @ found.mT, covariance, rtol=1e-5, atol=1e-5)


def test_the_laws_of_rows_bend_with_the_globals():
    """Given mu and tau the rows are Gaussian, with means and sds that are known, and far from linear in these.

    Without products of mu and tau the means are wrong by 0.16 sd.
    """
    y, precision = 1.0 + torch.randn(60).double(), torch.linspace(0.2, 20.0, 60).double()

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 2.0))
        log_tau = pyro.sample("log_tau", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("groups", 60):
            theta = pyro.sample("theta", dist.Normal(mu, log_tau.exp()))
            pyro.sample("y", dist.Normal(theta, precision**-0.5), obs=y)

    log_joint, center = made(model)
    marginal = global_marginal(log_joint, center)
    start = GaussianApproximation(torch.tensor([1.0, 0.0]).double(), 0.4 * torch.eye(2).double(), elbo=0.0)
    flow = hierarchy_near(with_locals(marginal, start), Recipe("Gaussian"), has_local_flow=False)
    h = torch.randn(200, 2).double()
    z = torch.cat([h, torch.zeros(200, 60).double()], -1)
    x, up = flow.transform(z), flow.transform(torch.cat([h, torch.ones(200, 60).double()], -1))
    total = precision + (-2 * x[:, 1:2]).exp()
    mean = (precision * y + (-2 * x[:, 1:2]).exp() * x[:, :1]) / total
    assert ((x[:, 2:] - mean) * total.sqrt()).square().mean().sqrt() < 0.08
    assert ((up - x)[:, 2:] * total.sqrt()).log().square().mean().sqrt() < 0.08


def groups(num, counts):
    """Counts with random rates, whose conditional laws are skewed."""
    group = torch.arange(len(counts)) % num

    def model():
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 2.0)), pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", num):
            rate = pyro.sample("rate", dist.Normal(mu, tau))
        with pyro.plate("rows", len(counts)):
            pyro.sample("y", dist.Poisson(rate[group].exp()), obs=counts)

    return model


def test_the_gradient_of_the_marginal_density_follows_the_curvature():
    log_joint, center = made(groups(60, torch.poisson(torch.full((180,), 2.0)).double()))
    center = center.double()
    marginal = global_marginal(log_joint, center)
    at = 0.3 * torch.randn(marginal.num_rows, 2, dtype=torch.float64)
    function = marginal.value_and_grad(at)
    _, gradient = function(at)
    for j in range(2):
        step = 1e-4 * torch.eye(2, dtype=torch.float64)[j]
        slope = (function(at + step)[0] - function(at - step)[0]) / 2e-4
        torch.testing.assert_close(gradient[:, j], slope, rtol=1e-5, atol=1e-5)


def gaussian_groups(y):
    """Groups of five observations each, of which y has the means."""

    def model(y):
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 5**-0.5), obs=y)

    return model


def test_a_fit_of_three_hundred_groups_agrees_with_quadrature():
    torch.manual_seed(0)
    y = 1.0 + 0.7 * torch.randn(300) + torch.randn(300) / 5**0.5
    posterior = pf.FlowVI(gaussian_groups(y), seed=0, progress_bar=False).run(y)
    assert isinstance(posterior.guide.flow.layers[-1], Hierarchy)
    assert posterior.diagnose().verdict == "good"
    mu, tau = torch.linspace(0.6, 1.4, 401).double(), torch.linspace(0.4, 1.1, 401).double()
    variance = tau**2 + 0.2
    prior = dist.Normal(0.0, 5.0).log_prob(mu)[:, None] + dist.HalfNormal(2.0).log_prob(tau)
    squares = ((y.double() - mu[:, None]) ** 2).sum(-1)
    likelihood = -150 * (2 * torch.pi * variance).log() - squares[:, None] / (2 * variance)
    log_p = prior + likelihood
    weights = log_p.flatten().softmax(0).reshape(log_p.shape)
    evidence = log_p.logsumexp((0, 1)) + (mu[1] - mu[0]).log() + (tau[1] - tau[0]).log()
    assert abs(posterior.log_evidence - evidence.item()) < 0.05
    draws = posterior.sample(20_000, seed=1)

    def assert_moments(values, mean, square):
        sd = (square - mean**2).sqrt()
        assert ((values.double().mean(0) - mean).abs() / sd).max() < 0.05
        assert (values.double().std(0) / sd - 1).abs().max() < 0.05

    for name, axis, grid in (("mu", 1, mu), ("tau", 0, tau)):
        marginal = weights.sum(axis)
        assert_moments(draws[name], marginal @ grid, marginal @ grid**2)
    # Given mu and tau a group's mean is Gaussian.
    gain = 1 / (1 / tau**2 + 5)
    group_mean = gain[None, :, None] * (mu[:, None, None] / tau[None, :, None] ** 2 + 5 * y.double())
    mean = (weights[..., None] * group_mean).sum((0, 1))
    square = (weights[..., None] * (group_mean**2 + gain[None, :, None])).sum((0, 1))
    assert_moments(draws["theta"], mean, square)


def test_a_fit_of_a_hierarchy_is_saved_and_loaded(tmp_path):
    y = torch.randn(60, generator=torch.Generator().manual_seed(0))
    posterior = pf.FlowVI(gaussian_groups(y), seed=0, progress_bar=False).run(y)
    assert isinstance(posterior.guide.flow.layers[-1], Hierarchy)
    posterior.save(tmp_path / "posterior.safetensors")
    loaded = pf.load_posterior(tmp_path / "posterior.safetensors", gaussian_groups(y), y)
    assert loaded.elbo == posterior.elbo
    assert torch.equal(loaded.sample(5, seed=1)["theta"], posterior.sample(5, seed=1)["theta"])
