"""The evidence by bridge sampling is right to the error it states, which needs the autocorrelation of the chains."""

import math

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist

from pyroflows import OptionError
from pyroflows.inference.bridge import bridge
from tests.inference.test_posterior import by_hand

LOG_EVIDENCE = -123.4
LOC, SD = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])


def estimate(rng, autocorrelation=0.0, shift=0.8, sd=1.4, num_chains=10, num_draws=200):
    """The posterior is N(0, 1), by exact autoregressive chains; the flow is N(shift, sd^2)."""
    x = np.empty((num_chains, num_draws))
    x[:, 0] = rng.normal(size=num_chains)
    for i in range(1, num_draws):
        noise = rng.normal(size=num_chains)
        x[:, i] = autocorrelation * x[:, i - 1] + math.sqrt(1 - autocorrelation**2) * noise
    z = shift + sd * rng.normal(size=num_chains * num_draws)

    def log_weight(x):
        return LOG_EVIDENCE - 0.5 * x**2 + 0.5 * ((x - shift) / sd) ** 2 + math.log(sd)

    return bridge(log_weight(x), log_weight(z))


@pytest.mark.parametrize("autocorrelation", [0.0, 0.8])
@pytest.mark.parametrize("sd", [0.5, 1.4])
def test_standard_error_is_the_error(autocorrelation, sd):
    """Over 60 repetitions: z-scores have standard deviation 1, to three standard errors of that, 1/sqrt(120)."""
    rng = np.random.default_rng(1)
    found = [estimate(rng, autocorrelation, sd=sd) for _ in range(60)]
    z = np.array([(f.log_evidence - LOG_EVIDENCE) / f.log_evidence_se for f in found])
    assert 0.7 < z.std() < 1.3
    assert abs(z.mean()) < 3.5 / math.sqrt(60)
    assert (abs(z) < 3).mean() >= 0.95
    if autocorrelation:
        assert np.mean([f.ess / f.num_samples for f in found]) < 0.4


def test_it_is_the_optimal_bridge():
    """The fixed point of Meng and Wong's iteration, of independent draws."""
    rng = np.random.default_rng(2)
    of_posterior, of_flow = rng.normal(0.3, 0.6, (5, 100)), rng.normal(-0.2, 0.7, 500)
    result = bridge(of_posterior, of_flow)
    share = result.ess / (result.ess + len(of_flow))
    r = 1.0
    for _ in range(200):
        above = (np.exp(of_flow) / (share * np.exp(of_flow) + (1 - share) * r)).mean()
        r = above / (1 / (share * np.exp(of_posterior) + (1 - share) * r)).mean()
    assert result.log_evidence == pytest.approx(math.log(r), abs=1e-8)


def test_constant_weights_and_zero_weights():
    exact = bridge(np.full((4, 50), -3.0), np.full(200, -3.0))
    assert exact.log_evidence == pytest.approx(-3.0, abs=1e-9)
    assert exact.log_evidence_se == pytest.approx(0.0, abs=1e-9)
    # Half of the draws from the flow lie outside the support: the evidence is half.
    half = bridge(np.zeros((4, 250)), np.where(np.arange(1000) % 2, 0.0, np.nan))
    assert half.log_evidence == pytest.approx(math.log(0.5), abs=1e-9)
    assert 0 < half.log_evidence_se < 0.05


def test_chains_that_have_not_mixed():
    stuck = np.repeat(np.arange(4.0)[:, None], 50, 1) + 0.1 * np.random.default_rng(0).normal(size=(4, 50))
    with pytest.warns(UserWarning, match="have not mixed"):
        assert bridge(stuck, np.zeros(200)).rhat > 1.5


def gaussian():
    """Its own posterior; the evidence is 1."""
    pyro.sample("x", dist.Normal(LOC, SD).to_event(1))


def regression(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((b[..., None, :] * x).sum(-1), 0.7), obs=y)


def regression_case(shift, factor):
    """A Gaussian flow without the posterior's correlations, and the evidence: y is normal."""
    torch.manual_seed(3)
    x = torch.randn(20, 3) + torch.randn(20, 1)
    y = x @ torch.tensor([1.0, -1.0, 0.5]) + 0.7 * torch.randn(20)
    covariance = torch.linalg.inv(x.T @ x / 0.49 + torch.eye(3) / 4)
    mean, sd = covariance @ x.T @ y / 0.49, covariance.diagonal().sqrt()
    law = dist.MultivariateNormal(torch.zeros(20).double(), 4 * (x @ x.T).double() + 0.49 * torch.eye(20).double())
    return by_hand(regression, mean + shift * sd, factor * sd, x, y), law.log_prob(y.double()).item()


CASES = {
    "exact": lambda: (by_hand(gaussian, LOC, SD), 0.0),
    "shifted": lambda: (by_hand(gaussian, LOC + SD, SD), 0.0),
    "narrow": lambda: (by_hand(gaussian, LOC, 0.4 * SD), 0.0),
    "regression": lambda: regression_case(0.0, 1.0),
    "regression, off": lambda: regression_case(1.0, 0.7),
}


def check(name, repetitions):
    posterior, truth = CASES[name]()
    found = [posterior.bridge_sample(1000, 60, seed=i, progress_bar=False) for i in range(repetitions)]
    errors = np.array([f.log_evidence - truth for f in found])
    standard_errors = np.maximum([f.log_evidence_se for f in found], 1e-4)
    assert (abs(errors) <= 3 * standard_errors).mean() >= 0.95
    assert max(standard_errors) < 0.2
    return errors / standard_errors


@pytest.mark.parametrize("name", CASES)
def test_log_evidence_of_conjugate_models(name):
    check(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["narrow", "shifted"])
def test_standard_errors_with_real_chains(name):
    """Over 40 repetitions, to three standard errors of a standard deviation."""
    assert 0.65 < check(name, 40).std() < 1.35


def test_reproducible_and_printed():
    posterior = by_hand(gaussian, LOC + 0.5 * SD, SD)
    state = torch.get_rng_state()
    first, second = (posterior.bridge_sample(1000, 20, seed=1, progress_bar=False) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(first).startswith("BridgeEstimate(log_evidence=") and " +- " in repr(first)


def test_options():
    with pytest.raises(OptionError, match="num_samples must be at least 1000, got 10"):
        by_hand(gaussian, LOC, SD).bridge_sample(10)
