"""Posteriors of models with masks, missing values and scales: evidence, draws, and what ArviZ is told."""

import warnings

import arviz as az
import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

import pyroflows as pf
from pyroflows.errors import ModelError

Y, SEEN = torch.tensor([1.5, -0.5, torch.nan]), torch.tensor([True, True, False])
LOG_EVIDENCE = -3.471
QUIET = {"seed": 0, "progress_bar": False}


def imputed(y=Y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(a, 1.0), obs=y, obs_mask=~y.isnan())


@pytest.fixture(scope="module")
def posterior():
    return pf.FlowVI(imputed, **QUIET).run()


def assert_moments(draws, mean, sd):
    """To four standard errors."""
    num = len(draws)
    assert draws.mean().item() == pytest.approx(mean, abs=4 * sd / num**0.5)
    assert draws.std().item() == pytest.approx(sd, rel=4 / (2 * num) ** 0.5)


def test_imputed_values(posterior):
    assert posterior.log_evidence == pytest.approx(LOG_EVIDENCE, abs=0.01)
    assert posterior.diagnose().verdict == "good"
    torch.manual_seed(0)
    draws = posterior.sample(4000)
    assert_moments(draws["a"], 1 / 3, 3**-0.5)
    # The missing value, and what its own prior gives for the others, given a.
    for i in range(3):
        assert_moments(draws["y_unobserved"][:, i], 1 / 3, (4 / 3) ** 0.5)
    assert torch.equal(draws["y"][:, :2], Y[:2].expand(4000, 2))
    assert torch.equal(draws["y"][:, 2], draws["y_unobserved"][:, 2])
    assert draws["y_unobserved"][:, 0].unique().numel() > 3900
    weighted = posterior.importance_sample(2000)
    assert_moments(weighted.draws["y_unobserved"][:, 0] - weighted.draws["a"], 0.0, 1.0)


def test_summary_has_the_entries_of_the_posterior(posterior):
    assert list(posterior.summary().index) == ["a", "y_unobserved[2]"]
    assert list(posterior.summary(["y"]).index) == ["y[0]", "y[1]", "y[2]"]


def test_log_prob_is_that_of_the_entries_of_the_posterior(posterior):
    draws = posterior.sample(10)
    first = posterior.log_prob(draws)
    draws["y_unobserved"][:, :2] += 7.0
    torch.testing.assert_close(posterior.log_prob(draws), first)


def test_predictive(posterior):
    torch.manual_seed(0)
    drawn = posterior.predictive(4000)
    for i in range(3):
        assert_moments(drawn["y"][:, i], 1 / 3, (4 / 3) ** 0.5)
    with pytest.raises(ModelError, match="'y_unobserved'"):
        posterior.predictive(10, torch.zeros(5))


def test_chains(posterior):
    chains = posterior.mcmc(200, 16, seed=0, progress_bar=False)
    draws = chains.draws["y_unobserved"] - chains.draws["a"][..., None]
    assert_moments(draws[..., 0].flatten(), 0.0, 1.0)
    assert chains.to_arviz(prior=False).log_likelihood["y_observed"].sizes["row"] == 2


def test_other_data_have_the_same_mask(posterior):
    assert posterior.with_data(torch.tensor([1.0, 0.0, torch.nan])).log_evidence
    with pytest.raises(ModelError, match="'y_unobserved' is masked at other entries"):
        posterior.with_data(torch.tensor([torch.nan, 1.0, 0.0]))


def own_guide(y=Y):
    pyro.sample("a", dist.Normal(0.3, 0.7))
    with pyro.plate("row", 3):
        pyro.sample("y_unobserved", dist.Normal(0.3, 1.4))


def masked_guide(y=Y):
    pyro.sample("a", dist.Normal(0.3, 0.7))
    with pyro.plate("row", 3), poutine.mask(mask=~SEEN):
        pyro.sample("y_unobserved", dist.Normal(0.3, 1.4))


PROPOSALS = {
    "own": lambda: own_guide,
    "masked": lambda: masked_guide,
    "AutoNormal": lambda: AutoNormal(imputed, init_scale=1.2),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal(imputed, init_scale=1.2),
    "AutoFlow": lambda: pf.guides.AutoFlow(imputed, init_scale=1.2),
}


@pytest.mark.parametrize("make", PROPOSALS.values(), ids=PROPOSALS)
def test_proposals(make):
    """Those that score the entries too, and those that do not, have the same evidence and draws."""
    torch.manual_seed(0)
    found = pf.importance_sample(imputed, make(), num_samples=20_000, progress_bar=False)
    assert found.log_evidence == pytest.approx(LOG_EVIDENCE, abs=4 * found.log_evidence_se)
    assert found.log_evidence_se < 0.05
    weights = found.log_weights.softmax(0)
    given_a = found.draws["y_unobserved"][:, 0] - found.draws["a"]
    if make() is not masked_guide:
        assert (weights * given_a).sum().item() == pytest.approx(0.0, abs=0.1)
        assert (weights * given_a**2).sum().item() == pytest.approx(1.0, abs=0.15)


def flat(mask):
    z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(mask))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(3.0))


@pytest.mark.parametrize("mask", [False, torch.tensor(False)])
def test_a_flat_prior_by_a_mask(mask):
    posterior = pf.FlowVI(flat, **QUIET).run(mask)
    assert posterior.log_evidence == pytest.approx(0.0, abs=0.01)
    torch.manual_seed(0)
    assert_moments(posterior.sample(4000)["z"], 3.0, 1.0)
    with pytest.warns(UserWarning, match="prior of 'z', since its prior is flat"):
        posterior.to_arviz(10)


def walks(lengths, observations):
    """Sequences that are padded to the same length."""
    z = 0.0
    with pyro.plate("sequence", len(lengths)):
        for t in range(observations.shape[1]):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=observations[:, t])


def test_padded_sequences():
    """The evidence is that of the sequences by themselves; padding goes on from the last value."""
    lengths = torch.tensor([3, 1, 2])
    observations = torch.tensor([[0.5, 1.0, -1.0], [2.0, 0.0, 0.0], [-1.0, 1.0, 0.0]])
    posterior = pf.FlowVI(walks, **QUIET).run(lengths, observations)
    expected = 0.0
    for length, y in zip(lengths.tolist(), observations, strict=True):
        steps = torch.arange(1, length + 1)
        cov = torch.minimum(steps[:, None], steps) + torch.eye(length)
        expected += dist.MultivariateNormal(torch.zeros(length), cov).log_prob(y[:length])
    assert posterior.log_evidence == pytest.approx(expected.item(), abs=0.01)
    torch.manual_seed(0)
    draws = posterior.sample(4000)
    assert_moments(draws["z_2"][:, 1] - draws["z_0"][:, 1], 0.0, 2**0.5)
    assert_moments(draws["z_2"][:, 2] - draws["z_1"][:, 2], 0.0, 1.0)


# ArviZ


def by_handler(y):
    m = pyro.sample("m", dist.Normal(0.0, 5.0))
    with pyro.plate("n", len(y)), poutine.mask(mask=~y.isnan()):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y.nan_to_num())


def by_distribution(y):
    m = pyro.sample("m", dist.Normal(0.0, 5.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0).expand([len(y)]).mask(~y.isnan()), obs=y)


def nan_masked(y):
    m = pyro.sample("m", dist.Normal(0.0, 5.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.NanMaskedNormal(m, 1.0), obs=y)


def scaled(y):
    """Half of the rows twice."""
    m = pyro.sample("m", dist.Normal(0.0, 5.0))
    with pyro.plate("n", len(y)), poutine.scale(scale=2.0), poutine.mask(mask=~y.isnan()):
        pyro.sample("y", dist.Normal(m, 2.0**0.5), obs=y.nan_to_num())


def data_of(model, y, num_samples=500):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return pf.FlowVI(model, **QUIET).run(y).to_arviz(num_samples, prior=False)


def half_of_sixty():
    torch.manual_seed(0)
    y = torch.randn(60)
    y[::2] = torch.nan
    return y


@pytest.mark.parametrize("model", [by_handler, by_distribution, nan_masked])
def test_missing_rows_do_not_enter_loo(model):
    y = half_of_sixty()
    data, cut = data_of(model, y), data_of(model, y[1::2])
    loo, expected = az.loo(data, pointwise=True), az.loo(cut, pointwise=True)
    assert loo.n_data_points == 30
    assert (loo.elpd_loo, loo.se) == pytest.approx((expected.elpd_loo, expected.se), abs=0.3)
    assert (loo.pareto_k < 0.7).all()
    assert az.waic(data).n_data_points == 30
    assert data.log_likelihood["n"].values.tolist() == list(range(1, 60, 2))
    np.testing.assert_array_equal(data.observed_data["y"], y)
    assert data.posterior_predictive["y"].sizes["n"] == 60


def test_log_likelihood_is_without_scale():
    y = half_of_sixty()
    data = data_of(scaled, y)
    m = data.posterior["m"].values[..., None]
    expected = dist.Normal(torch.as_tensor(m), 2.0**0.5).log_prob(y[1::2].double())
    np.testing.assert_allclose(data.log_likelihood["y"], expected, rtol=1e-4)


def test_rows_of_vectors():
    """A row counts as long as an entry of it does; one that is missing altogether does not."""
    y = torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [torch.nan, torch.nan]])

    def model(y):
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.NanMaskedMultivariateNormal(m, torch.eye(2)), obs=y)

    data = data_of(model, y, 50)
    assert data.log_likelihood["n"].values.tolist() == [0, 1]
    np.testing.assert_array_equal(data.observed_data["y"], y)


def test_counts_that_are_missing():
    counts = torch.tensor([1, 4, 2])

    def model(counts):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("n", 3), poutine.mask(mask=SEEN):
            pyro.sample("y", dist.Poisson(rate), obs=counts)

    data = data_of(model, counts, 50)
    np.testing.assert_array_equal(data.observed_data["y"], [1.0, 4.0, np.nan])
    assert data.log_likelihood["y"].sizes["n"] == 2
