"""What calls other than FlowVI.run leave behind where an interrupt or divergence ends them."""

import sys

import pyro
import pytest
import torch
from pyro import distributions as dist

import pyroflows as pf
from pyroflows.fitting import comparison
from pyroflows.inference import conditional
from pyroflows.inference.mcmc import hmc
from pyroflows.interruption import keeping
from pyroflows.models.batching import BatchedModel
from pyroflows.training.loop import Trainer

QUIET = {"seed": 0, "progress_bar": False}


def model(y=None):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


@pytest.fixture(scope="module")
def posterior():
    return pf.FlowVI(model, num_steps=5, **QUIET).run(torch.tensor(1.0))


def interrupt(monkeypatch, owner, name, num_calls):
    """Let a function raise KeyboardInterrupt after as many calls."""
    function = getattr(owner, name)
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(name)
        if len(calls) > num_calls:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


def test_an_inner_result_is_turned_into_the_outer_one():
    with (
        pytest.raises(pf.FitInterrupted, match="outer was interrupted; what it had found") as caught,
        keeping("outer", lambda inner: inner + 1),
        keeping("inner", lambda _: 1),
    ):
        raise KeyboardInterrupt
    assert caught.value.result == 2


def test_no_result_is_said():
    with (
        pytest.raises(pf.FitInterrupted, match="before it had a draw, so that there is no result") as caught,
        keeping("outer", lambda _: None, "a draw"),
    ):
        raise KeyboardInterrupt
    assert caught.value.result is None


def test_train(monkeypatch):
    interrupt(monkeypatch, Trainer, "_take_step", 7)
    flow = pf.flows.Planar(2)
    with pytest.raises(pf.FitInterrupted) as caught:
        pf.train(pf.fitting.ReverseKL(flow, lambda x: -(x**2).sum(-1)), 50, **QUIET)
    assert caught.value.result.num_steps == 7


@pytest.mark.parametrize("fit", [pf.fit_density, pf.fit_flow_matching])
def test_fits_to_rows(monkeypatch, fit):
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    flow = pf.flows.MAF(2, num_layers=1) if fit is pf.fit_density else pf.flows.CNF(2, hidden_dims=(8,))
    options = {"batch_size": 90, "max_epochs": 30, "validation": 0.1, **QUIET}
    interrupt(monkeypatch, Trainer, "_take_step", 50)
    with pytest.raises(pf.FitInterrupted) as caught:
        fit(flow, x, **options)
    found = caught.value.result
    assert found.flow is flow and 1 <= found.history.num_steps <= 17
    # The flow is in its best state: a fit that goes on from there starts with the best score.
    monkeypatch.undo()
    interrupt(monkeypatch, Trainer, "_take_step", 0)
    with pytest.raises(pf.FitInterrupted) as caught:
        fit(flow, x, **options)
    again = caught.value.result
    assert again.best_epoch == 0 and not again.history
    if fit is pf.fit_density:
        assert again.best_log_prob == pytest.approx(found.best_log_prob, abs=1e-5)
    else:
        assert again.best_log_prob == pytest.approx(found.best_log_prob, abs=1e-3)
    assert repr(again)


@pytest.mark.parametrize(("num_steps", "num_kept"), [(10, 0), (30, 10)])
def test_distill(monkeypatch, num_steps, num_kept):
    """The first 20 steps are those of the warm start."""
    teacher, student = pf.flows.MAF(2, num_layers=1), pf.flows.IAF(2, num_layers=1)
    interrupt(monkeypatch, Trainer, "_take_step", num_steps)
    with pytest.raises(pf.FitInterrupted) as caught:
        pf.distill(student, teacher, num_steps=40, warm_start=20, **QUIET)
    found = caught.value.result
    assert found.student is student and found.history.num_steps == num_kept and abs(found.kl) < 0.1


def test_compare_densities(monkeypatch):
    interrupt(monkeypatch, comparison, "fit_density", 1)
    flows = {"first": pf.flows.Planar(2), "second": pf.flows.Planar(2)}
    with pytest.raises(pf.FitInterrupted) as caught:
        pf.compare_densities(flows, torch.randn(200, 2), max_epochs=2, **QUIET)
    assert caught.value.result.best == "first"


@pytest.mark.parametrize(("num_steps", "num_fits"), [(3, 1), (20, 1), (40, 2)])
def test_fit_amortized(monkeypatch, num_steps, num_fits):
    """Three flows are trained with 16 steps each."""
    interrupt(monkeypatch, Trainer, "_take_step", num_steps)
    options = {"num_simulations": 300, "num_flows": 3, "max_epochs": 2, "batch_size": 30, **QUIET}
    with pytest.raises(pf.FitInterrupted) as caught:
        pf.fit_amortized(model, flow=lambda dim, c: pf.flows.MAF(dim, context_dim=c, hidden_dims=(8,)), **options)
    amortized = caught.value.result
    assert len(amortized.fits) == num_fits
    assert amortized.posterior(torch.tensor(1.0)).sample(3)["x"].shape == (3,)


@pytest.mark.slow
def test_distill_and_fit_proposal_of_a_posterior(monkeypatch, posterior):
    for refit in (
        lambda: posterior.distill(num_steps=40, warm_start=20, **QUIET),
        lambda: posterior.fit_proposal(num_samples=500, max_epochs=20, **QUIET),
    ):
        with monkeypatch.context() as patched:
            interrupt(patched, Trainer, "_take_step", 30)
            with pytest.raises(pf.FitInterrupted) as caught:
                refit()
        assert isinstance(caught.value.result, pf.Posterior)
        assert caught.value.result.refitted.history.num_steps > 0
        assert caught.value.result.khat is not None


@pytest.mark.parametrize("method", ["hmc", "independence"])
def test_chains_have_the_draws_so_far(monkeypatch, posterior, method):
    interrupt(monkeypatch, hmc, "trajectory", 10 + 6)
    with pytest.raises(pf.FitInterrupted) as caught:
        posterior.mcmc(50, num_chains=3, num_warmup=10, method=method, **QUIET)
    monkeypatch.undo()
    whole = posterior.mcmc(50, num_chains=3, num_warmup=10, method=method, **QUIET)
    chains = caught.value.result
    assert chains.draws["x"].shape == (3, 6)
    assert torch.equal(chains.draws["x"], whole.draws["x"][:, :6])
    assert all(torch.equal(value, whole.sample_stats[name][:, :6]) for name, value in chains.sample_stats.items())
    assert "3 chains of 6 draws" in repr(chains)


@pytest.mark.parametrize("num_iterations", [5, 10 + 3])
def test_chains_without_draws_say_so(monkeypatch, posterior, num_iterations):
    interrupt(monkeypatch, hmc, "trajectory", num_iterations)
    with pytest.raises(pf.FitInterrupted, match="before it had 4 draws of each chain after the warm-up") as caught:
        posterior.mcmc(50, num_chains=3, num_warmup=10, **QUIET)
    assert caught.value.result is None


@pytest.mark.parametrize(
    ("num_iterations", "shape"), [(16, (1, 6)), (18 + 15, (1, 8)), (3 * 18 + 13, (3, 8)), (12, None)]
)
def test_nuts_has_complete_chains_or_the_first(monkeypatch, posterior, num_iterations, shape):
    interrupt(monkeypatch, pyro.infer.NUTS, "sample", num_iterations)
    with pytest.raises(pf.FitInterrupted) as caught:
        posterior.mcmc(8, num_chains=4, num_warmup=10, method="nuts", **QUIET)
    monkeypatch.undo()
    chains = caught.value.result
    if shape is None:
        assert chains is None
        return
    whole = posterior.mcmc(8, num_chains=4, num_warmup=10, method="nuts", **QUIET)
    assert chains.draws["x"].shape == shape
    assert torch.allclose(chains.draws["x"], whole.draws["x"][: shape[0], : shape[1]])
    if shape[1] == 8:
        assert torch.equal(chains.sample_stats["acceptance_rate"], whole.sample_stats["acceptance_rate"][: shape[0]])


@pytest.mark.parametrize(("num_kept", "is_enough"), [(110, True), (60, False)])
def test_bridge(monkeypatch, posterior, num_kept, is_enough):
    interrupt(monkeypatch, hmc, "trajectory", 20 + num_kept)
    with pytest.raises(pf.FitInterrupted) as caught:
        posterior.bridge_sample(8000, num_warmup=20, **QUIET)
    found = caught.value.result
    assert (found is not None) == is_enough
    if found is not None:
        assert (
            abs(found.log_evidence - dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0))) < 5 * found.log_evidence_se
        )


@pytest.mark.parametrize("num_batches", [0, 3])
def test_importance_sampling_has_the_draws_so_far(monkeypatch, posterior, num_batches):
    monkeypatch.setattr(BatchedModel, "chunk_size", 100)
    y = torch.tensor(1.0)
    calls = [
        lambda: posterior.importance_sample(1000, **QUIET),
        lambda: pf.importance_sample(model, posterior, y, num_samples=1000, **QUIET),
    ]
    for call in calls:
        whole = call()
        with monkeypatch.context() as patched:
            interrupt(patched, BatchedModel, "__call__", num_batches)
            with pytest.raises(pf.FitInterrupted, match="importance sampling was interrupted") as caught:
                call()
        weighted = caught.value.result
        if num_batches == 0:
            assert weighted is None and "before it had a batch of draws" in str(caught.value)
        else:
            # The first of these runs may have compared draws with single runs.
            num_draws = len(weighted.draws["x"])
            assert num_draws in (100, 200, 300)
            assert torch.equal(weighted.draws["x"], whole.draws["x"][:num_draws])
            assert abs(weighted.log_evidence - whole.log_evidence) < 5 * weighted.log_evidence_se


@pytest.mark.parametrize("num_rounds", [0, 1, 2])
def test_conditional_draws_are_those_of_the_latest_proposal(monkeypatch, num_rounds):
    flow = pf.flows.Gaussian(2)
    interrupt(monkeypatch, conditional, "_weighted", num_rounds)
    with pytest.raises(pf.FitInterrupted) as caught:
        pf.sample_conditional(flow, [0.3], columns=[0], num_samples=500, seed=0)
    weighted = caught.value.result
    if num_rounds == 0:
        assert weighted is None and "before it had the draws of a first proposal" in str(caught.value)
    else:
        assert weighted.draws["x"].shape == (2000, 2) and (weighted.draws["x"][:, 0] == 0.3).all()
        exact = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.3))
        assert abs(weighted.log_evidence - exact) < 5 * weighted.log_evidence_se


@pytest.mark.parametrize("num_fits", [5, 12])
def test_sbc(monkeypatch, num_fits):
    interrupt(monkeypatch, sys.modules["pyroflows.inference.calibration.sbc"], "_attempt", num_fits)
    with pytest.raises(pf.FitInterrupted) as caught:
        pf.sbc(model, lambda m: {"x": dist.Normal(m.data["y"] / 2, 0.5**0.5).sample((50,))}, num_datasets=30, **QUIET)
    calibration = caught.value.result
    assert (calibration.num_datasets if calibration else None) == (12 if num_fits == 12 else None)


def test_a_diverged_fit_has_its_result():
    class Rises(pf.Objective):
        monitor = "loss"
        falls = True

        def __init__(self, flow):
            super().__init__(flow)
            self.count = 0

        def draw(self):
            self.count += 1
            return [torch.tensor(float("nan") if self.count > 60 else 1.0)]

        def loss(self, factor):
            return factor * self.flow().log_prob(torch.ones(2)), {}

    with pytest.raises(pf.DivergedError) as caught:
        pf.train(Rises(pf.flows.Planar(2)), 200, **QUIET)
    assert caught.value.result.num_steps > 60
