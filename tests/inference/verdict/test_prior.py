"""What draws of the prior show of a posterior that the flow's draws do not."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist

import pyroflows as pf
from pyroflows.inference.verdict import prior
from pyroflows.inference.verdict.prior import PriorDraws

ONE = torch.tensor(1.0)


def spike_on_slab(sd, noise=20.0):
    """A prior of two normal laws around zero in equal parts, one narrow and one of sd 10; the data hardly tell."""

    def model(y):
        parts = dist.Normal(torch.zeros(2), torch.tensor([sd, 10.0]))
        x = pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))
        pyro.sample("y", dist.Normal(x, noise), obs=y)

    return model


def share_of_slab(sd):
    densities = [dist.Normal(0.0, math.hypot(20.0, s)).log_prob(ONE).exp() for s in (sd, 10.0)]
    return float(densities[1] / sum(densities))


@pytest.mark.parametrize("sd", [pytest.param(1e-3, marks=pytest.mark.slow), 1e-2])
def test_a_flow_that_misses_the_slab_is_not_good(sd):
    posterior = pf.FlowVI(spike_on_slab(sd), seed=0, progress_bar=False).run(ONE)
    diagnosis = posterior.diagnose()
    assert diagnosis.verdict == "do not use"
    assert "draws of the prior show that about" in diagnosis.reasons[0]
    share = posterior._diagnostics.unseen_by_prior
    # A part of the slab lies under the spike.
    assert share.value == pytest.approx(share_of_slab(sd), abs=4 * share.se + 0.02)
    assert share.se < 0.02


def test_a_narrow_posterior_within_a_wide_prior():
    """Next to no draw of the prior lies in the posterior, and the estimate is not trusted."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(4), 10.0).to_event(1))
        pyro.sample("y", dist.Normal(mean, 0.1).to_event(1), obs=y)

    posterior = pf.FlowVI(model, seed=0, progress_bar=False).run(torch.tensor([0.5, -1.0, 2.0, 0.0]))
    assert posterior.diagnose().verdict == "good"


def test_the_share_is_that_of_the_weights(monkeypatch):
    """Of four draws one has no weight, and the last two lie where the flow has larger weights than its draws show."""
    monkeypatch.setattr(prior, "NUM_PRIOR_DRAWS", 4)
    draws = PriorDraws(torch.tensor([0.1, 0.4, 0.6]).double().log(), torch.tensor([0.0, 3.0, math.inf]))
    share = draws.unseen(level=2.0, log_evidence=math.log(0.5))
    masses = torch.tensor([0.0, 0.0, 0.4, 0.6]).double() / 0.5
    mass, error = masses.mean().item(), (masses.std(correction=0) / 2).item()
    assert share.value == pytest.approx(mass / (1 + mass))
    assert share.se == pytest.approx(error / (1 + mass) ** 2)
    assert draws.unseen(level=math.inf, log_evidence=0.0).value == 0.0


def test_a_share_that_is_next_to_all():
    """The draws of the prior show a mode that is a thousand nats better than that of the flow."""
    draws = PriorDraws(torch.tensor([1000.0, 1000.0]).double(), torch.tensor([5.0, 5.0]))
    assert draws.unseen(level=0.0, log_evidence=0.0) == (1.0, 0.0)


def test_without_data_or_draws_there_is_no_share():
    def without_data():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    posterior = pf.FlowVI(without_data, seed=0, progress_bar=False).run()
    assert posterior._diagnostics.unseen_by_prior is None


@pytest.mark.slow
def test_draws_of_next_to_no_weight_are_left_out(monkeypatch):
    posterior = pf.FlowVI(spike_on_slab(1e-2, noise=1.0), seed=0, progress_bar=False).run(0 * ONE)
    draws = posterior._diagnostics
    log_evidence = draws.weights.log_evidence

    def drawn():
        torch.manual_seed(0)
        return PriorDraws.drawn(draws.law, draws.log_joint, log_evidence)

    few = drawn()
    assert (few.log_weights > log_evidence + math.log(prior.NEGLIGIBLE_SHARE)).all()
    monkeypatch.setattr(prior, "NEGLIGIBLE_SHARE", 1e-300)
    level = draws.raw_log_weights.max().item()
    assert len(drawn().log_weights) > len(few.log_weights)
    assert few.unseen(level, log_evidence).value > 0.01
    assert few.unseen(level, log_evidence).value == pytest.approx(drawn().unseen(level, log_evidence).value, abs=1e-4)
