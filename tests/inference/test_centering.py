"""Fits of hierarchical models as they are written, against exact answers and the non-centred form."""

import copy
import math

import pyro
import pytest
import torch
from pyro import distributions as dist

import pyroflows as pf
from pyroflows import CheckpointError, FlowVI, load_posterior
from pyroflows.guides.centering import centerings

# The first has little to say of each school, the second much.
NOISY, PRECISE = 10.0, 0.05
Y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
SIGMA = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("component", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def groups(y, noise, x=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with pyro.plate("group", 8):
        theta = pyro.sample("theta", dist.Normal(mu if x is None else mu + x, tau))
        pyro.sample("y", dist.Normal(theta, noise), obs=y)


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def run(model, *args, **options):
    return FlowVI(model, seed=0, progress_bar=False, **options).run(*args)


def test_the_funnel_is_a_gaussian_behind_the_layer():
    posterior = run(funnel)
    assert posterior.is_gaussian and posterior.diagnose().verdict == "good"
    assert posterior.elbo == pytest.approx(0.0, abs=0.01)  # the evidence without data
    draws = posterior.sample(20_000, seed=0)
    v, e = draws["v"], draws["x"] / (draws["v"] / 2).exp()[:, None]
    assert v.mean().abs() < 0.1 and v.std() == pytest.approx(3.0, rel=0.03)
    assert e.mean(0).abs().max() < 0.05 and (e.std(0) - 1).abs().max() < 0.05


def centredness(noise):
    posterior = run(groups, Y / 10, torch.tensor(noise), num_steps=1)
    (layer,) = centerings(posterior.guide.flow)
    return layer.centredness[2:]


def test_what_data_inform_is_centred():
    assert centredness(NOISY).max() < 0.3
    assert centredness(PRECISE).min() > 0.7


def test_constant_priors_have_the_flow_that_they_had():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(mu.prod(-1), 0.5), obs=y)

    posterior = run(model, torch.tensor(1.0), num_steps=1)
    assert centerings(posterior.guide.flow) == []
    (named,) = (vars(posterior)["guide"].state_dict()["_extra_state"],)
    assert "theta" not in bytes(named.tolist()).decode()


def test_a_guide_of_the_user_s_stays_as_it_is():
    posterior = run(groups, Y, torch.tensor(NOISY), guide=pf.guides.AutoFlow(groups), num_steps=1)
    assert centerings(posterior.guide.flow) == []


def test_a_flow_of_the_user_s_is_before_the_layer():
    posterior = run(groups, Y, torch.tensor(NOISY), guide=pf.flows.NSF, num_steps=1)
    assert len(centerings(posterior.guide.flow)) == 1


def test_a_file(tmp_path):
    args = Y, torch.tensor(NOISY)
    posterior = run(groups, *args, num_steps=20)
    posterior.save(tmp_path / "file")
    loaded = load_posterior(tmp_path / "file", groups, *args)
    assert loaded.elbo == posterior.elbo
    other = load_posterior(tmp_path / "file", groups, Y + 1.0, args[1])  # data alone do not change a prior
    assert torch.equal(other.sample(3, seed=0)["theta"], posterior.sample(3, seed=0)["theta"])
    without_data = load_posterior(tmp_path / "file", groups, None, args[1])
    assert torch.equal(without_data.sample(3, seed=0)["theta"], posterior.sample(3, seed=0)["theta"])
    assert without_data.with_data(*args).elbo == posterior.elbo
    with pytest.raises(CheckpointError, match=r"priors of the sites \['theta'\].*the model's arguments"):
        load_posterior(tmp_path / "file", groups)
    with pytest.raises(CheckpointError, match="are other ones at these arguments"):
        load_posterior(tmp_path / "file", groups, *args, torch.arange(8.0))


def test_what_follows_a_fit():
    args = Y, torch.tensor(NOISY)
    posterior = run(groups, *args, num_steps=300)
    chains = posterior.mcmc(100, num_chains=16, num_warmup=100, seed=0, progress_bar=False)
    exact = chains.draws["theta"].flatten(0, 1)
    weighted = posterior.importance_sample(4000, seed=0)
    mean = (torch.softmax(weighted.log_weights, 0)[:, None] * weighted.draws["theta"]).sum(0)
    assert ((mean - exact.mean(0)) / exact.std(0)).abs().max() < 0.15
    draws = posterior.sample(5, seed=0)
    assert torch.isfinite(posterior.log_prob(draws)).all()
    trained = FlowVI(groups, guide=copy.deepcopy(posterior.guide), num_steps=20, seed=0, progress_bar=False).run(*args)
    assert trained.elbo == pytest.approx(posterior.elbo, abs=0.1)


@pytest.mark.slow
def test_centred_eight_schools():
    posterior = run(schools, Y, SIGMA)
    assert posterior.diagnose().verdict == "good" and posterior.log_joint is not None
    draws = posterior.sample(50_000, seed=0)
    # Ten chains of 1000 draws of the non-centred form, of posteriordb.
    mean = torch.tensor([4.41, 3.60, 6.15, 4.94, 3.91, 4.80, 3.61, 4.05, 6.32, 4.88])
    sd = torch.tensor([3.31, 3.20, 5.62, 4.65, 5.28, 4.77, 4.61, 4.80, 5.00, 5.32])
    found = torch.cat([draws["mu"][:, None], draws["tau"][:, None], draws["theta"]], -1)
    assert ((found.mean(0) - mean) / sd).abs().max() < 0.05
    assert (found.std(0) / sd - 1).abs().max() < 0.05
    assert math.isfinite(posterior.log_evidence)
