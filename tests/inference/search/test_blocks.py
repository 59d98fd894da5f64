"""Blocks of latents that depend on one another: their structure, their marginal density, fits against quadrature."""

import dataclasses

import pyro
import pytest
import torch
from pyro import distributions as dist

import pyroflows as pf
from pyroflows.compiling.check import Compiler
from pyroflows.flows import Recipe
from pyroflows.guides.centering import Centering
from pyroflows.guides.hierarchical import has_block, hierarchical_layer, hierarchy_near
from pyroflows.inference.candidates import FittedCandidate
from pyroflows.inference.search.blocks import colors, filled
from pyroflows.inference.search.gaussians import GaussianApproximation
from pyroflows.inference.search.hierarchical import global_marginal, with_locals
from pyroflows.inference.vi import FlowVI
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import describe
from pyroflows.transforms.markov_affine import MarkovAffine

NUM = 32


def walk(counts=None, y=None):
    """A random walk around a level, of which counts, or values with noise, are seen."""
    num = NUM if counts is None else len(counts)

    def model():
        level = pyro.sample("level", dist.Normal(torch.zeros(()).double(), 1.0))
        log_scale = pyro.sample("log_scale", dist.Normal(torch.tensor(-1.0).double(), 0.5))
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), (num,)))
        pyro.factor("first", dist.Normal(level, 1.0).log_prob(x[..., 0]))
        steps = dist.Normal(x[..., :-1], log_scale.exp()[..., None]).log_prob(x[..., 1:])
        pyro.factor("steps", steps.sum(-1))
        if counts is not None:
            pyro.sample("counts", dist.Poisson(x.exp()).to_event(1), obs=counts)
        else:
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    return model


def process(counts=None, y=None):
    """A Gaussian process whose length is known to be near 0.2, of which counts, or values with noise, are seen."""
    at = torch.linspace(0, 1, NUM).double()

    def model():
        log_length = pyro.sample("log_length", dist.Normal(torch.tensor(-1.6).double(), 0.2))
        scaled = (at[:, None] - at) / log_length.exp()[..., None, None]
        covariance = (-0.5 * scaled**2).exp() + 1e-5 * torch.eye(len(at)).double()
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(at)).double(), covariance))
        if counts is not None:
            pyro.sample("counts", dist.Poisson(f.exp()).to_event(1), obs=counts)
        else:
            pyro.sample("y", dist.Normal(f, 0.5).to_event(1), obs=y)

    return model


def made(model):
    layout = Layout(describe(model, (), {}))
    center = torch.zeros(layout.dim, dtype=layout.dtype)
    examples = 0.1 * torch.randn(5, layout.dim, dtype=layout.dtype)
    log_joint = LogJoint(model, (), {}, layout, examples, Compiler("none"))
    return log_joint, center, Centering.of(model, (), {}, layout, center)


def random_pattern(dim, generator):
    pattern = torch.rand(dim, dim, generator=generator) < 0.1
    return pattern | pattern.mT | torch.eye(dim, dtype=torch.bool)


@pytest.mark.parametrize("seed", range(3))
def test_the_factor_of_a_matrix_has_the_entries_that_its_pattern_foretells(seed):
    generator = torch.Generator().manual_seed(seed)
    pattern = random_pattern(20, generator)
    matrix = torch.where(pattern, torch.rand(20, 20, generator=generator).double(), 0.0)
    factor = torch.linalg.cholesky(matrix + matrix.mT + 40 * torch.eye(20).double())
    assert torch.equal(filled(pattern), factor != 0)


@pytest.mark.parametrize("seed", range(3))
def test_columns_of_one_color_share_no_row(seed):
    pattern = random_pattern(20, torch.Generator().manual_seed(seed))
    color = colors(pattern)
    for each in color.unique():
        assert pattern[:, color == each].sum(-1).max() == 1
    chain = torch.ones(20, 20, dtype=torch.bool).tril(1).triu(-1)
    assert colors(chain).max() == 2


@pytest.mark.parametrize("is_dense", [False, True], ids=["walk", "process"])
def test_the_gradient_of_the_marginal_density_is_right(is_dense):
    torch.manual_seed(0)
    counts = torch.poisson(torch.full((NUM,), 2.0)).double()
    log_joint, center, centering = made(process(counts) if is_dense else walk(counts))
    marginal = global_marginal(log_joint, center, centering)
    assert marginal.is_block and bool(marginal.levels[0].pattern.all()) == is_dense
    assert (marginal.centering is not None) == is_dense
    dim = len(marginal.places)
    at = center[marginal.places] + 0.2 * torch.randn(16, dim, dtype=torch.float64)
    function = marginal.value_and_grad(at)
    _, gradient = function(at)
    for j in range(dim):
        step = 1e-4 * torch.eye(dim, dtype=torch.float64)[j]
        slope = (function(at + step)[0] - function(at - step)[0]) / 2e-4
        torch.testing.assert_close(gradient[:, j], slope, rtol=1e-4, atol=1e-4)


def test_the_marginal_density_is_exact_where_the_block_is_a_gaussian():
    torch.manual_seed(0)
    y = torch.randn(NUM).double()
    log_joint, center, centering = made(process(y=y))
    marginal = global_marginal(log_joint, center, centering)
    assert marginal.centering is not None
    log_length = torch.linspace(-2.2, -1.0, marginal.num_rows).double()[:, None]
    found, _ = marginal.value_and_grad(log_length)(log_length)
    at = torch.linspace(0, 1, NUM).double()
    scaled = (at[:, None] - at) / log_length.exp()[..., None]
    noisy = (-0.5 * scaled**2).exp() + (0.25 + 1e-5) * torch.eye(NUM).double()
    prior = dist.Normal(torch.tensor(-1.6).double(), 0.2).log_prob(log_length[:, 0])
    expected = prior + dist.MultivariateNormal(torch.zeros(NUM).double(), noisy).log_prob(y)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def by_quadrature(y):
    """Log evidence, and mean and sd of the scale and of all x, by a grid over the log-scale; all else is Gaussian."""
    t = torch.arange(NUM).double()
    grid = torch.linspace(-3.5, 1.5, 401).double()
    # The walk with its level integrated out: the first element has variance 1 + 1.
    prior = 2.0 + grid.mul(2).exp()[:, None, None] * torch.minimum(t[:, None], t)
    noisy = prior + 0.25 * torch.eye(NUM).double()
    zero = torch.zeros(NUM).double()
    log_p = dist.MultivariateNormal(zero, noisy).log_prob(y) + dist.Normal(-1.0, 0.5).log_prob(grid)
    gain = prior @ torch.linalg.inv(noisy)
    means, variances = gain @ y, (prior - gain @ prior).diagonal(dim1=-2, dim2=-1)
    weights = log_p.softmax(0)
    mean = weights @ means
    sd = (weights @ (variances + means**2) - mean**2).sqrt()
    of_scale = weights @ grid
    return (
        torch.logsumexp(log_p, 0).item() + (grid[1] - grid[0]).log().item(),
        (of_scale, (weights @ (grid - of_scale) ** 2).sqrt()),
        (mean, sd),
    )


def test_a_fit_of_a_random_walk_agrees_with_quadrature_and_is_saved(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = 1.0 + 0.4 * torch.randn(NUM, generator=generator).cumsum(0)
    y = (x + 0.5 * torch.randn(NUM, generator=generator)).double()
    posterior = pf.FlowVI(walk(y=y), seed=0, progress_bar=False).run()
    assert isinstance(hierarchical_layer(posterior.guide.flow).levels[0].flow, MarkovAffine)
    assert posterior.diagnose().verdict == "good"
    log_evidence, *expected = by_quadrature(y)
    assert abs(posterior.log_evidence - log_evidence) < 0.05
    draws = posterior.sample(20_000, seed=1)
    for name, (mean, sd) in zip(("log_scale", "x"), expected, strict=True):
        assert ((draws[name].mean(0) - mean).abs() / sd).max() < 0.05
        assert (draws[name].std(0) / sd - 1).abs().max() < 0.05
    posterior.save(tmp_path / "posterior.safetensors")
    loaded = pf.load_posterior(tmp_path / "posterior.safetensors", walk(y=y))
    assert torch.equal(loaded.sample(5, seed=1)["x"], posterior.sample(5, seed=1)["x"])


def test_the_flow_that_starts_at_a_gaussian_process_is_near_to_it():
    torch.manual_seed(0)
    log_joint, center, centering = made(process(torch.poisson(torch.full((NUM,), 2.0)).double()))
    marginal = global_marginal(log_joint, center, centering)
    start = GaussianApproximation(torch.tensor([-1.6]).double(), torch.tensor([[0.2]]).double(), elbo=0.0)
    flow = hierarchy_near(with_locals(marginal, start), Recipe("Gaussian"), has_local_flow=True)
    x, log_q = flow().rsample_and_log_prob((500,))
    log_weights = (log_joint(x) - log_q).detach()
    torch.testing.assert_close(flow().log_prob(x), log_q, rtol=1e-5, atol=1e-5)
    assert log_weights.var() < 0.5  # a Gaussian given the length, and a Gaussian of the length


@pytest.mark.parametrize("has_images", [False, True])
def test_a_block_that_cannot_be_used_is_left_for_a_flow_over_all_latents_once(monkeypatch, has_images):
    found = []
    judge = FittedCandidate.diagnosis.func
    fit_from = FlowVI._fit_from

    def noted(vi, *args):
        found.append(args[-1] is not None and args[-1].is_block)
        return fit_from(vi, *args)

    monkeypatch.setattr(FlowVI, "_fit_from", noted)
    monkeypatch.setattr(FlowVI, "_best", lambda vi, fit, *rest: fit(Recipe("Gaussian"), is_trained=False))
    monkeypatch.setattr(
        FittedCandidate, "diagnosis", property(lambda fitted: dataclasses.replace(judge(fitted), verdict="do not use"))
    )
    monkeypatch.setattr("pyroflows.inference.vi.has_images", lambda *args: has_images)
    y = torch.randn(NUM, generator=torch.Generator().manual_seed(0)).double()
    posterior = pf.FlowVI(walk(y=y), seed=0, progress_bar=False).run()
    assert found == [True, False]
    # Given its scales the walk is a Gaussian, so that the block is the better one, where it was fitted.
    assert has_block(posterior.guide.flow.components[0]) is not has_images
