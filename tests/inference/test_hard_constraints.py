"""Models whose density is zero, or not a number, on a part of the space: right values, starts, and what is said."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import init_to_value
from torch import inf

from pyroflows import DivergedError, FlowVI, ModelError
from pyroflows.guides import AutoFlow
from pyroflows.models.inside import inside_support

MAX_Z = 4.0


def fit(model, *args, seed=0, num_steps=400, **options):
    return FlowVI(model, seed=seed, num_steps=num_steps, progress_bar=False, **options).run(*args)


# Exact means of the latent "a" and log evidences, by quadrature in float64


def on_square(log_density):
    """Of a density on the unit square."""
    axis = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    a, b = torch.meshgrid(axis, axis, indexing="ij")
    log_p = log_density(a, b)
    return (log_p.flatten().softmax(0) @ a.flatten()).item(), (log_p.logsumexp((0, 1)) - 2 * math.log(1000)).item()


def on_line(log_density, low, high, num=200_000):
    a = low + (high - low) * (torch.arange(num, dtype=torch.float64) + 0.5) / num
    log_p = log_density(a)
    return (log_p.softmax(0) @ a).item(), (log_p.logsumexp(0) + math.log((high - low) / num)).item()


def lognormal(a):
    return dist.LogNormal(torch.zeros((), dtype=a.dtype), 1.0).log_prob(a)


SUMS = torch.tensor([0.9, 0.7, 0.8])
WAITS = torch.tensor([1.2, 2.9, 0.7, 2.0])
MANY = 5 * torch.rand(100, generator=torch.Generator().manual_seed(0))


def two_uniforms():
    return pyro.sample("a", dist.Uniform(0.0, 1.0)), pyro.sample("b", dist.Uniform(0.0, 1.0))


def cut_by_factor():
    a, b = two_uniforms()
    pyro.factor("a + b < 1", torch.where(a + b < 1, 0.0, -inf))
    with pyro.plate("n", len(SUMS)):
        pyro.sample("y", dist.Normal(a + b, 0.3), obs=SUMS)


def of_cut(a, b):
    log_p = sum(dist.Normal(a + b, 0.3).log_prob(y) for y in SUMS.double())
    return torch.where(a + b < 1, log_p, -inf)


def cut_by_nan():
    a, b = two_uniforms()
    pyro.factor("log", (1 - a - b).log())


def cut_by_root():
    a, b = two_uniforms()
    pyro.sample("y", dist.Normal((1 - a - b).sqrt(), 0.3), obs=torch.tensor(0.2))


def of_root(a, b):
    log_p = dist.Normal((1 - a - b).clamp(min=0).sqrt(), 0.3).log_prob(torch.tensor(0.2).double())
    return torch.where(a + b < 1, log_p, -inf)


def far_from_the_start():
    a, b = two_uniforms()
    pyro.factor("corner", torch.where(a + b < 0.2, 0.0, -inf))


def uniform(y):
    a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Uniform(0.0, a), obs=y)


def shifted_exponential(y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    shift = dist.transforms.AffineTransform(a, 1.0)
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.TransformedDistribution(dist.Exponential(torch.ones(())), [shift]), obs=y)


def residual(y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Exponential(1.0), obs=y - a)


def of_shift(a):
    return dist.Normal(torch.zeros((), dtype=a.dtype), 2.0).log_prob(a) - (WAITS.double().sum() - len(WAITS) * a)


def pareto(y):
    a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Pareto(a, 2.0), obs=y)


def of_pareto(a):
    return lognormal(a) + len(WAITS) * (2 * a**2).log() - 3 * WAITS.double().log().sum()


def of_uniform(y):
    top = y.max().item()
    return on_line(lambda a: lognormal(a) - len(y) * a.log(), top, top * (1 + 300 / len(y)))


CASES = {
    "factor": (cut_by_factor, (), lambda: on_square(of_cut)),
    "nan": (cut_by_nan, (), lambda: on_square(lambda a, b: (1 - a - b).log().nan_to_num(nan=-inf))),
    "root": (cut_by_root, (), lambda: on_square(of_root)),
    "corner": (far_from_the_start, (), lambda: (0.2 / 3, math.log(0.02))),
    "uniform": (uniform, (WAITS,), lambda: of_uniform(WAITS)),
    "steep": (uniform, (MANY,), lambda: of_uniform(MANY)),
    "shifted": (shifted_exponential, (WAITS,), lambda: on_line(of_shift, -20.0, 0.7)),
    "residual": (residual, (WAITS,), lambda: on_line(of_shift, -20.0, 0.7)),
    "pareto": (pareto, (WAITS,), lambda: on_line(of_pareto, 1e-6, 0.7)),
}


SLOW = ("nan", "root", "corner", "residual", "uniform", "pareto", "shifted", "steep")


@pytest.mark.parametrize(
    ("model", "args", "exact"),
    [pytest.param(*case, marks=pytest.mark.slow if name in SLOW else (), id=name) for name, case in CASES.items()],
)
def test_right_values(model, args, exact):
    mean, log_evidence = exact()
    posterior = fit(model, *args, seed=1, num_steps=None)
    weighted = posterior.importance_sample(40_000)
    weights, a = weighted.weights.normalized, weighted.draws["a"].double()
    # The smoothing of the weights moves the mean by a little more than its standard error.
    sd = (weights @ (a - weights @ a) ** 2).sqrt().item()
    assert weights @ a == pytest.approx(mean, abs=0.1 * sd)
    assert weighted.log_evidence == pytest.approx(log_evidence, abs=MAX_Z * weighted.log_evidence_se)
    # The flow itself keeps most of its draws where the density is positive, and fits there.
    diagnosis = posterior.diagnose()
    assert diagnosis.num_non_finite < 0.25 * diagnosis.num_samples
    assert diagnosis.ess > 0.5 * diagnosis.num_samples


@pytest.mark.slow
def test_chains_and_bridge():
    mean, log_evidence = on_square(of_cut)
    posterior = fit(cut_by_factor, seed=1, num_steps=100)
    chains = posterior.mcmc(100, seed=0, progress_bar=False)
    a, b = chains.draws["a"], chains.draws["b"]
    assert (a + b < 1).all()
    assert a.mean().item() == pytest.approx(mean, abs=MAX_Z * a.std().item() / float(chains.ess["a"]) ** 0.5)
    found = posterior.bridge_sample(2000, seed=0, progress_bar=False)
    assert found.log_evidence == pytest.approx(log_evidence, abs=MAX_Z * found.log_evidence_se)


def test_the_printout_says_why_the_elbo_is_infinite():
    posterior = fit(cut_by_factor, num_steps=100)
    diagnosis = posterior.diagnose()
    outside = diagnosis.num_non_finite / diagnosis.num_samples
    assert outside > 0
    assert posterior.elbo == -inf
    assert f"ELBO -inf, since {outside:.2%} of the draws have density zero, log evidence -0." in repr(posterior)


# Starts


def test_a_guide_that_stands_where_the_density_is_zero():
    guide = AutoFlow(far_from_the_start, init_loc_fn=init_to_value(values={"a": torch.tensor(0.5)}))
    with pytest.raises(ModelError, match=r"initial values: site 'corner' has log-density -inf.*init_to_value"):
        fit(far_from_the_start, guide=guide)


def test_validation_at_the_initial_values_of_a_guide():
    guide = AutoFlow(shifted_exponential, init_loc_fn=init_to_value(values={"a": torch.tensor(5.0)}))
    with pytest.raises(ModelError, match=r"initial values: at site 'y'.*support.*init_to_value"):
        fit(shifted_exponential, WAITS, guide=guide)


def test_data_that_no_latents_allow():
    def model(y):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Exponential(rate), obs=y)

    with pytest.raises(ModelError, match=r"at site 'y'.*nor is it at any of 100 other points"):
        fit(model, torch.tensor(-1.0))


def test_a_fit_that_diverges_names_the_site():
    """The pull out of the half-line is so steep that the total gradient leaves it."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        pyro.factor("wall", torch.where(x < 3.0, 10 * x, torch.nan))

    with pytest.raises(DivergedError, match=r"not finite: 'wall' at .*constraint"):
        fit(model, num_steps=2000, estimator="total")


# Singular matrices and scales that underflow


def gaussian_process(y):
    """For long scales and little noise the matrix has no factor in float32."""
    x = torch.linspace(0, 1, len(y))
    length = pyro.sample("length", dist.LogNormal(0.0, 2.0))
    noise = pyro.sample("noise", dist.LogNormal(-2.0, 2.0))
    kernel = torch.exp(-0.5 * ((x[:, None] - x) / length[..., None, None]) ** 2)
    covariance = kernel + noise[..., None, None] ** 2 * torch.eye(len(y))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(y)), covariance), obs=y)


def vague(y):
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 200.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(0.0, log_scale.exp()), obs=y)


@pytest.mark.parametrize("mode", ["trace", "none"])
def test_matrices_that_are_singular_in_a_part_of_the_space(mode):
    y = torch.sin(6 * torch.linspace(0, 1, 20))
    for seed in range(2):
        assert fit(gaussian_process, y, seed=seed, num_steps=5, num_starts=1, compile=mode).log_evidence > -inf


@pytest.mark.parametrize("seed", range(8))
def test_a_vague_scale(seed):
    """Pyro's initial values are medians of few draws, where this scale is zero or infinite for most seeds."""
    posterior = fit(vague, torch.tensor([0.5, -1.0, 2.0]), seed=seed, num_steps=2, num_starts=1)
    assert math.isfinite(posterior.log_evidence)


# Supports of observed sites


def test_values_outside_of_a_support():
    x = torch.tensor([-1.0, 0.5, 2.0])
    assert inside_support(dist.Exponential(1.0), x).tolist() == [False, True, True]
    assert inside_support(dist.Uniform(0.0, torch.tensor([1.0, 1.0, 3.0])), x).tolist() == [False, True, True]
    assert inside_support(dist.Exponential(1.0).expand([3]).to_event(1), x).item() is False
    mask = torch.tensor([False, True, True])
    assert inside_support(dist.Exponential(1.0).expand([3]).mask(mask), x).all()
    assert inside_support(dist.Exponential(1.0).expand([3]).mask(mask).to_event(1), x).item() is True
    scaled = dist.TransformedDistribution(dist.Beta(1.0, 1.0), [dist.transforms.AffineTransform(0.0, 2.0)])
    assert inside_support(scaled, x).tolist() == [False, True, True]
    assert inside_support(dist.Poisson(1.0), x) is None
    assert inside_support(dist.Dirichlet(torch.ones(3)), x) is None
    assert inside_support(dist.Gumbel(0.0, 1.0), x) is None
