"""Importance sampling with whatever draws: weights, evidence and draws are those of single runs."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import nn

import pyroflows as pf
from pyroflows import FlowVI, ModelError, OptionError, ShapeError, importance_sample
from pyroflows.flows import Flow
from pyroflows.guides import AutoIAF
from pyroflows.inference import weights
from pyroflows.inference.weights import Weights
from pyroflows.transforms import Elementwise
from tests.guides.models import fit

MAX_Z = 4.5
COUNTS = torch.tensor([3.0, 0.0, 2.0, 4.0])
Y = torch.tensor([1.3, 0.2])


def model(counts, y=Y):
    """Two conjugate halves: Gamma(2 + sum, 1 + n), and a normal mean for each y."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    pyro.deterministic("twice", 2 * rate)
    with pyro.plate("days", len(counts)):
        pyro.sample("count", dist.Poisson(rate), obs=counts)
    with pyro.plate("rows", 2):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def evidence():
    total, n = COUNTS.sum(), len(COUNTS)
    of_counts = torch.lgamma(2 + total) - (2 + total) * math.log(1 + n) - torch.lgamma(COUNTS + 1).sum()
    return (of_counts + dist.Normal(0.0, math.sqrt(5.0)).log_prob(Y).sum()).item()


def by_hand(counts, y=Y):
    """Sites in another order than the model's."""
    with pyro.plate("rows", 2):
        pyro.sample("mu", dist.StudentT(5.0, 0.8 * y, 1.0))
    pyro.sample("rate", dist.Gamma(1 + counts.sum(), torch.tensor(4.5)))


def in_two_parts(model):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["mu"])))
    guide.append(AutoMultivariateNormal(pyro.poutine.block(model, expose=["rate"])))
    return guide


GUIDES = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
    "AutoIAFNormal": lambda model: AutoIAFNormal(model, hidden_dim=[8]),
    "AutoGuideList": in_two_parts,
}


def assert_exact(weighted, num_draws=8000):
    assert weighted.draws["rate"].shape == (num_draws,)
    assert weighted.draws["mu"].shape == (num_draws, 2)
    assert torch.equal(weighted.draws["twice"], 2 * weighted.draws["rate"])
    assert not any(value.requires_grad for value in weighted.draws.values())
    assert weighted.log_evidence_se < 0.1
    assert abs(weighted.log_evidence - evidence()) < MAX_Z * weighted.log_evidence_se
    posterior = dist.Gamma(2 + COUNTS.sum(), 1.0 + len(COUNTS))
    weights = weighted.weights.normalized
    rate = weighted.draws["rate"].double()
    error = (weights @ rate - posterior.mean) / ((weights**2) @ (rate - posterior.mean) ** 2).sqrt()
    assert abs(error) < MAX_Z


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_autoguides(make):
    guide = make(model)
    fit(model, guide, COUNTS, steps=150, lr=0.03)
    torch.manual_seed(1)
    assert_exact(importance_sample(model, guide, COUNTS, num_samples=8000, progress_bar=False))


def test_a_guide_by_hand():
    assert_exact(importance_sample(model, by_hand, COUNTS, num_samples=8000, progress_bar=False))


def test_a_flow_and_a_posterior():
    posterior = FlowVI(model, num_steps=150, seed=0, progress_bar=False).run(COUNTS)
    for proposal in (posterior, posterior.guide, posterior.guide.flow):
        assert_exact(importance_sample(model, proposal, COUNTS, num_samples=8000, progress_bar=False))
    # Not trained, not even called.
    fresh = importance_sample(model, AutoIAF(model, init_scale=0.5), COUNTS, num_samples=100, progress_bar=False)
    assert fresh.log_weights.isfinite().all()
    # At other data, too.
    other = importance_sample(model, posterior, COUNTS, y=Y + 0.2, num_samples=100, progress_bar=False)
    assert other.log_evidence != pytest.approx(evidence(), abs=1e-3)


def test_weights_are_those_of_single_runs():
    """By Pyro's own traces, of the draws of a guide whose sites are constrained."""
    guide = AutoNormal(model)
    fit(model, guide, COUNTS, steps=5)
    weighted = importance_sample(model, guide, COUNTS, num_samples=20, progress_bar=False)  # too few to smooth
    for i in range(20):
        values = {name: weighted.draws[name][i] for name in ("rate", "mu")}
        log_p = pyro.poutine.trace(pyro.condition(model, data=values)).get_trace(COUNTS).log_prob_sum()
        locs, scales = guide.locs, guide.scales
        log_q = dist.LogNormal(locs.rate, scales.rate).log_prob(values["rate"])
        log_q = log_q + dist.Normal(locs.mu, scales.mu).log_prob(values["mu"]).sum()
        assert weighted.log_weights[i].item() == pytest.approx((log_p - log_q).item(), abs=1e-3)


def test_programs_written_for_one_draw():
    """Neither broadcasts: model and guide index from the left. The guide's draw is a function of an auxiliary one."""

    def single():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x[0] + x[1], 1.0), obs=torch.tensor(1.0))

    class Guide(nn.Module):
        def forward(self):
            a = pyro.sample("a", dist.Normal(torch.tensor([0.3, 0.3]), 1.0).to_event(1), infer={"is_auxiliary": True})
            # The density of x = (a_0, 2 a_1) is that of a, over 2.
            x = torch.stack([a[0], 2 * a[1]])
            pyro.sample("x", dist.Delta(x, log_density=-math.log(2.0), event_dim=1))

    weighted = importance_sample(single, Guide(), num_samples=8000, progress_bar=False)
    expected = dist.Normal(0.0, math.sqrt(3.0)).log_prob(torch.tensor(1.0)).item()
    assert abs(weighted.log_evidence - expected) < MAX_Z * weighted.log_evidence_se
    assert weighted.log_evidence_se < 0.02


def test_draws_outside_the_support_count_nothing():
    """Without validation an exponential density at -1 is a number."""

    def positive():
        x = pyro.sample("x", dist.Exponential(1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.5))

    def guide():
        pyro.sample("x", dist.Normal(0.5, 1.5))

    weighted = importance_sample(positive, guide, num_samples=20_000, progress_bar=False)
    outside = weighted.draws["x"] < 0
    assert outside.any()
    assert (weighted.log_weights[outside] == -math.inf).all()
    # The integral of e^-x N(0.5; x, 1) over x > 0, which is e^0 N(-0.5 > -z).
    expected = math.log(dist.Normal(0.0, 1.0).cdf(torch.tensor(-0.5)).item())
    assert abs(weighted.log_evidence - expected) < MAX_Z * weighted.log_evidence_se


def test_reproducible_in_batches(monkeypatch):
    monkeypatch.setattr(pf.inference.importance, "BATCH_SIZE", 700)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(importance_sample(model, by_hand, COUNTS, num_samples=2000, progress_bar=False))
    assert torch.equal(runs[0].log_weights, runs[1].log_weights)
    assert len(runs[0].log_weights) == 2000
    assert len(runs[0].draws["mu"].unique(dim=0)) == 2000


def test_progress(capsys, monkeypatch):
    monkeypatch.setattr(weights, "DELAY", 0.0)
    importance_sample(model, by_hand, COUNTS, num_samples=100)
    assert "100/100" in capsys.readouterr().err


# Errors


def without_mu(counts):
    pyro.sample("rate", dist.Gamma(2.0, 1.0))


def with_another(counts):
    by_hand(counts)
    pyro.sample("other", dist.Normal(0.0, 1.0))


def of_another_shape(counts):
    pyro.sample("rate", dist.Gamma(torch.full((3,), 2.0), 1.0))
    with pyro.plate("rows", 2):
        pyro.sample("mu", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (without_mu, "latent site 'mu' of the model is no site of the proposal"),
        (with_another, "site 'other' of the proposal is no latent of the model"),
        (of_another_shape, r"site 'rate' has shape \(3,\) in the proposal and \(\) in the model"),
        (AutoDelta(model), "a point mass at site 'rate'"),
        (AutoNormal(pyro.poutine.block(model, hide=["mu"])), "latent site 'mu' of the model is no site"),
    ],
)
def test_guides_that_do_not_fit(guide, message):
    with pytest.raises(ModelError, match=message):
        importance_sample(model, guide, COUNTS, num_samples=50, progress_bar=False)


@pytest.mark.parametrize(("dim", "events"), [(2, "size 2"), ((1, 1, 3), r"shape \(1, 1, 3\)")])
def test_a_flow_of_another_size(dim, events):
    with pytest.raises(ShapeError, match=f"the model has 3 unconstrained latents, but the flow has events of {events}"):
        importance_sample(model, Flow([Elementwise(dim)]), COUNTS, progress_bar=False)


@pytest.mark.parametrize("num_samples", [0, -1, 10.0])
def test_num_samples(num_samples):
    with pytest.raises(OptionError, match="num_samples must be .*at least 1"):
        importance_sample(model, by_hand, COUNTS, num_samples=num_samples)


def test_what_is_no_proposal():
    with pytest.raises(OptionError, match="proposal must be a guide, a flow or a posterior, got int"):
        importance_sample(model, 3, COUNTS)


def test_a_subsampled_plate():
    def subsampled(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(x, 1.0), obs=y[index])

    with pytest.raises(ModelError, match="plate 'rows' is subsampled \\(2 of 4 rows\\)"):
        importance_sample(subsampled, by_hand, COUNTS)


def test_the_evidence_is_that_of_raw_weights():
    """Smoothing replaces the largest weights, and with them moves their mean and its standard error."""
    raw = 2 * torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 100
    weights = Weights.smoothed(raw)
    assert not torch.allclose(weights.log_weights, raw)
    w = (raw + 100).exp()
    assert weights.log_evidence == pytest.approx(w.mean().log().item() - 100, abs=1e-9)
    se = (w.std(correction=0) / w.mean()).item() / math.sqrt(len(w))
    assert weights.log_evidence_se == pytest.approx(se, rel=1e-6)
