"""Chains in the flow's base space have the posterior's law, whatever the flow is, and say whether they have mixed."""

import math
from functools import partial

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist

from pyroflows import FlowVI, ModelError, OptionError, Posterior
from pyroflows.flows import Flow
from pyroflows.guides import AutoFlow
from pyroflows.inference import arviz
from pyroflows.inference.mcmc import hmc, independence
from pyroflows.inference.mcmc.chains import Chains
from pyroflows.inference.mcmc.target import where_finite
from pyroflows.training.loop import History
from pyroflows.transforms import Elementwise
from tests.inference.test_posterior import by_hand

MAX_Z = 4.5
QUIET = {"seed": 0, "progress_bar": False}
LOC, SD = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])


def with_gradient(log_density):
    """What a sampler takes."""

    def value_and_grad(z):
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            value = log_density(leaf)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), gradient

    return value_and_grad


def gaussian():
    """Its own posterior."""
    pyro.sample("x", dist.Normal(LOC, SD).to_event(1))


def assert_moments(draws, mean, sd):
    """Of draws (chain, draw, ...): means and variances, within what their effective sample sizes allow."""
    x = ((draws.double() - mean) / sd).numpy()
    for power, expected in ((1, 0.0), (2, 1.0)):
        z = (x**power).mean((0, 1)) - expected
        z = z * np.sqrt(arviz.ess(x**power, "mean")) / (x**power).std((0, 1))
        assert (abs(z) < MAX_Z).all(), (power, z)


# Exactness, of all methods


@pytest.mark.parametrize("flow", [(LOC, SD), (LOC + SD, 0.4 * SD), (LOC, 3 * SD)], ids=["exact", "off", "wide"])
@pytest.mark.parametrize("method", ["hmc", "independence"])
def test_moments_whatever_the_flow(flow, method):
    chains = by_hand(gaussian, *flow).mcmc(100, 32, method, num_warmup=150, **QUIET)
    assert chains.draws["x"].shape == (32, 100, 2)
    assert_moments(chains.draws["x"], LOC, SD)
    assert max(chains.rhat["x"]) < 1.05
    assert min(chains.ess["x"]) > 300
    assert chains.num_divergences == 0


def test_nuts():
    chains = by_hand(gaussian, LOC + 0.5 * SD, 1.5 * SD).mcmc(120, 2, "nuts", num_warmup=60, **QUIET)
    assert chains.draws["x"].shape == (2, 120, 2)
    assert_moments(chains.draws["x"], LOC, SD)
    assert 0.6 < chains.acceptance_rate <= 1.0


def test_a_base_that_is_not_normal():
    guide = AutoFlow(gaussian, lambda dim: Flow([Elementwise(dim)], base="student_t"), init_scale=1.0)
    guide()
    chains = Posterior(gaussian, guide, (), {}, History({"elbo": [-1.0]})).mcmc(100, 32, **QUIET)
    assert_moments(chains.draws["x"], LOC, SD)


COUNTS = torch.tensor([3.0, 0.0, 2.0, 4.0])
VOTES = torch.tensor([6.0, 1.0, 3.0])


def constrained():
    """Conjugate: Gamma(11, 5) and Dirichlet(2 + votes)."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    pyro.deterministic("log_rate", rate.log())
    with pyro.plate("days", len(COUNTS)):
        pyro.sample("count", dist.Poisson(rate), obs=COUNTS)
    share = pyro.sample("share", dist.Dirichlet(torch.full((3,), 2.0)))
    pyro.sample("votes", dist.Multinomial(10, share, validate_args=False), obs=VOTES)


@pytest.mark.parametrize("method", ["hmc", "independence"])
def test_constrained_sites_with_a_flow_that_was_hardly_trained(method):
    posterior = FlowVI(constrained, num_steps=15, **QUIET).run()
    chains = posterior.mcmc(60, 32, method, num_warmup=80, **QUIET)
    draws = chains.draws
    assert {name: tuple(value.shape) for name, value in draws.items()} == {
        "rate": (32, 60),
        "share": (32, 60, 3),
        "log_rate": (32, 60),
    }
    assert torch.equal(draws["log_rate"], draws["rate"].log())
    rate, share = dist.Gamma(11.0, 5.0), dist.Dirichlet(2 + VOTES)
    assert_moments(draws["rate"], rate.mean, rate.stddev)
    assert_moments(draws["share"], share.mean, share.stddev)
    # ``lp`` is the log joint where the draws are.
    vectors = posterior.layout.unconstrain({name: draws[name].flatten(0, 1) for name in ("rate", "share")})
    expected = posterior.log_joint.in_chunks(vectors)
    assert chains.sample_stats["lp"].flatten().tolist() == pytest.approx(expected.tolist(), abs=1e-3)


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(torch.zeros(2), (v / 2).exp()[..., None]).to_event(1))


def test_funnel_with_a_gaussian_flow():
    chains = by_hand(funnel, torch.zeros(3), torch.ones(3)).mcmc(150, 64, num_warmup=150, **QUIET)
    assert_moments(chains.draws["v"], 0.0, 1.0)
    assert chains.rhat["v"] < 1.05


def half_of_it_is_nan():
    """Half-normal. The gradient is NaN at zero, too."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0 * x.sqrt(), 1.0, validate_args=False), obs=torch.tensor(0.0))


@pytest.mark.parametrize("method", ["hmc", "independence"])
def test_nan_is_rejected_and_goes_nowhere(method):
    chains = by_hand(half_of_it_is_nan, [0.3], [1.0]).mcmc(80, 32, method, num_warmup=100, **QUIET)
    x = chains.draws["x"]
    assert (x > 0).all()
    assert chains.sample_stats["lp"].isfinite().all() and chains.sample_stats["acceptance_rate"].isfinite().all()
    assert chains.num_divergences > 0
    assert_moments(x[..., None], math.sqrt(2 / math.pi), math.sqrt(1 - 2 / math.pi))


# Two modes


def two_modes():
    """Three in ten of the mass at -6, the rest at 6."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
    parts = torch.stack([dist.Normal(-6.0, 1.0).log_prob(x), dist.Normal(6.0, 1.0).log_prob(x)], -1)
    pyro.factor("mixture", torch.logsumexp(parts + torch.tensor([0.3, 0.7]).log(), -1))


def test_rhat_shows_that_chains_are_stuck():
    chains = by_hand(two_modes, [0.0], [6.0]).mcmc(30, 16, num_warmup=30, **QUIET)
    assert chains.rhat["x"] > 1.5
    assert chains.ess["x"] < 100
    assert "not mixed" in repr(chains)


def test_independence_moves_between_modes():
    chains = by_hand(two_modes, [0.0], [6.0]).mcmc(200, 32, "independence", num_warmup=40, **QUIET)
    upper = (chains.draws["x"] > 0).double().numpy()
    se = math.sqrt(0.21 / arviz.ess(upper, "mean"))
    assert se < 0.05
    assert abs(upper.mean() - 0.7) < MAX_Z * se
    assert chains.rhat["x"] < 1.05
    assert 0.05 < chains.sample_stats["flow_acceptance_rate"].mean() < 0.5


# The transitions leave the target as it is: chains that start with its law keep it


def target_gradient(z):
    return with_gradient(lambda z: dist.Normal(0.5, 0.7).log_prob(z).sum(-1))(z)


def keeps_its_law(transition, num_chains=40_000, num_steps=4, dim=2):
    z = 0.5 + 0.7 * torch.randn(num_chains, dim)
    state = hmc.State(z, *target_gradient(z))
    for _ in range(num_steps):
        state = transition(state)
    value, gradient = target_gradient(state.z)
    assert torch.equal(state.log_density, value) and torch.equal(state.gradient, gradient)
    x = (state.z - 0.5) / 0.7
    z_scores = [(x**k - m).mean(0) / (x**k).std(0) * math.sqrt(num_chains) for k, m in ((1, 0), (2, 1), (4, 3))]
    return torch.stack(z_scores).abs().max() < MAX_Z


def hmc_step(state):
    proposal = hmc.trajectory(target_gradient, state, 1.3, 2, torch.tensor([0.5, 1.0]))
    assert 0.3 < proposal.accept_prob.mean() < 0.9
    return state.moved(torch.rand_like(proposal.accept_prob) < proposal.accept_prob, proposal.state)


def independent_step(state):
    tuner = hmc.Tuner(state.z, 100)
    tuner.loc, tuner.scale = torch.tensor([0.2, 0.6]), torch.tensor([0.8, 1.2])
    base = dist.Normal(torch.zeros(2), 0.8).to_event(1)
    return independence.independent_move(target_gradient, base, state, tuner)[0]


@pytest.mark.parametrize("step", [hmc_step, independent_step])
def test_detailed_balance(step):
    assert keeps_its_law(step)


def test_the_check_notices_a_wrong_density_of_the_mixture(monkeypatch):
    monkeypatch.setattr(independence.DefensiveMixture, "log_prob", lambda self, z: self._base.log_prob(z))
    assert not keeps_its_law(independent_step)


def test_the_mixture_has_the_density_of_its_draws():
    """On one axis: its integral over a grid, and a histogram."""
    base = dist.Normal(torch.zeros(1), 0.5).to_event(1)
    mixture = independence.DefensiveMixture(base, torch.tensor([2.0]), torch.tensor([1.5]))
    edges = torch.linspace(-4, 8, 13)
    fine = torch.linspace(-4, 8, 12_001)
    density = mixture.log_prob(fine[:, None]).exp()
    masses = torch.stack([torch.trapezoid(density[i : i + 1001], fine[i : i + 1001]) for i in range(0, 12_000, 1000)])
    counts = torch.histogram(mixture.sample(100_000)[:, 0], edges).hist
    error = (counts - 1e5 * masses) / (1e5 * masses * (1 - masses)).sqrt()
    assert error.abs().max() < MAX_Z


# Tuning


def test_tuning_finds_scales_and_acceptance():
    sd = torch.logspace(-1, 1, 20)
    value_and_grad = with_gradient(lambda z: dist.Normal(3.0, sd).log_prob(z).sum(-1))
    state = hmc.start(value_and_grad, dist.Normal(torch.zeros(20), 1.0).to_event(1), 32)
    tuner = hmc.Tuner(state.z, 200)
    rates = []
    for i in range(260):
        jitter = 0.5 + hmc.van_der_corput(i)
        proposal = hmc.trajectory(value_and_grad, state, *tuner.steps(jitter), tuner.scale)
        before = state
        state = state.moved(torch.rand(32) < proposal.accept_prob, proposal.state)
        if i < 200:
            tuner.update(i, before, proposal, jitter, state)
        else:
            rates.append(proposal.accept_prob.mean().item())
    assert (tuner.scale / sd).log().abs().max() < 0.15
    assert np.mean(rates) == pytest.approx(0.8, abs=0.1)
    assert 0.3 < tuner.step_size < 1.5


def test_trajectories_grow_where_scales_do_not_help():
    """Correlation 0.95 in ten dimensions: one direction is 14 times as wide as the others."""
    covariance = torch.full((10, 10), 0.95) + 0.05 * torch.eye(10)
    law = dist.MultivariateNormal(torch.zeros(10), covariance)
    base = dist.Normal(torch.zeros(10), 1.0).to_event(1)
    result = hmc.run_hmc(with_gradient(law.log_prob), base, 100, 32, 100, progress_bar=False)
    assert_moments(result.z, 0.0, 1.0)
    assert arviz.ess(result.z.double().numpy()).min() > 1000


def test_trajectory_lengths_are_met():
    tuner = hmc.Tuner(torch.zeros(4, 3), 100)
    for jitter in (0.5, 0.9, 1.5):
        step_size, num_steps = tuner.steps(jitter)
        assert step_size * num_steps == pytest.approx(jitter * math.pi / 2)
        assert 0 < step_size <= tuner.step_size


def test_van_der_corput():
    assert [hmc.van_der_corput(i) for i in range(6)] == [0.5, 0.25, 0.75, 0.125, 0.625, 0.375]


# The target


def test_the_target_is_the_log_joint_pulled_back():
    """Of an affine flow by hand: loc + sd z, with log-determinant sum(log sd)."""
    posterior = by_hand(gaussian, LOC + 1, 2 * SD)
    z = torch.randn(6, 2)
    value, gradient = posterior.log_joint.value_and_grad(z, posterior.guide.flow.transform.forward_and_ladj)(z)
    x = (LOC + 1) + 2 * SD * z
    expected = dist.Normal(LOC, SD).log_prob(x).sum(-1) + (2 * SD).log().sum()
    assert value.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert torch.allclose(gradient, -(x - LOC) / SD**2 * 2 * SD, atol=1e-4)
    assert not value.requires_grad and not gradient.requires_grad


def test_where_finite():
    values, gradients = torch.tensor([1.0, math.nan, math.inf]), torch.tensor([[1.0], [math.inf], [math.nan]])
    value, gradient = where_finite(lambda z: (values, gradients))(torch.zeros(3, 1))
    assert value.tolist() == [1.0, -math.inf, -math.inf]
    assert gradient.flatten().tolist() == [1.0, 0.0, 0.0]


# What comes back


@pytest.mark.parametrize(("method", "num_chains"), [("hmc", 4), ("independence", 4), ("nuts", 2)])
def test_chains_follow_the_seed_and_leave_the_generator(method, num_chains):
    run = partial(by_hand(gaussian, LOC, SD).mcmc, 10, num_chains, method, num_warmup=10, progress_bar=False)
    state = torch.get_rng_state()
    first = run(seed=3).draws["x"]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(run(seed=3).draws["x"], first)
    assert not torch.equal(run(seed=4).draws["x"], first)


def test_arviz_data_and_repr():
    posterior = by_hand(constrained, torch.tensor([0.8, 0.0, 0.0]), torch.full((3,), 0.4))
    chains = posterior.mcmc(20, 6, num_warmup=50, **QUIET)
    assert isinstance(chains, Chains)
    data = chains.to_arviz(prior=False)
    assert data["posterior"]["share"].shape == (6, 20, 3)
    assert np.array_equal(data["posterior"]["rate"].values, chains.draws["rate"].numpy())
    assert data["log_likelihood"]["count"].shape == (6, 20, 4)
    assert data["sample_stats"]["diverging"].dtype == bool
    assert data["sample_stats"]["lp"].shape == (6, 20)
    text = repr(chains)
    for part in ("hmc: 6 chains of 20 draws", "worst R-hat", "smallest ESS", "acceptance", "0 divergences"):
        assert part in text
    assert np.allclose(chains.rhat["share"], arviz.rhat(chains.draws["share"].double().numpy()))


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gibbs"}, "method must be one of .*hmc.*nuts.*independence.* got 'gibbs'"),
        ({"num_samples": 3}, "num_samples must be at least 4, got 3"),
        ({"num_samples": 10.0}, "num_samples must be an integer"),
        ({"num_chains": 0}, "num_chains must be at least 1, got 0"),
        ({"num_warmup": 0}, "num_warmup must be at least 1, got 0"),
    ],
)
def test_options(options, message):
    with pytest.raises(OptionError, match=message):
        by_hand(gaussian, LOC, SD).mcmc(**options)


def test_nowhere_to_start():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal((x - 50).sqrt(), 1.0, validate_args=False), obs=torch.tensor(0.0))

    guide = AutoFlow(model, lambda dim: [Elementwise(dim)])
    guide()
    posterior = Posterior(model, guide, (), {}, History({"elbo": [-1.0]}))
    with pytest.raises(ModelError, match="finite at only 0 of 400 draws from the flow, too few to start 4 chains"):
        posterior.mcmc(10, 4, **QUIET)


def test_a_subsampled_plate_is_an_error():
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(x, 1.0), obs=y[index])

    posterior = by_hand(model, [0.0], [1.0], torch.zeros(5))
    for run in (posterior.mcmc, posterior.bridge_sample):
        with pytest.raises(ModelError, match="plate 'rows' is subsampled"):
            run()
