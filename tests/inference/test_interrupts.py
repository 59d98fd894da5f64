"""What a fit leaves behind when a callback, an interrupt or divergence ends it."""

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist

import pyroflows as pf
from pyroflows.inference import vi as module
from pyroflows.training.history import History

FITTED = {"seed": 0, "progress_bar": False}


def banana():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.0, 0.3), obs=pyro.sample("z", dist.Normal(0.0, 2.0)) - x**2)


def two_modes():
    x = pyro.sample("x", dist.Normal(0.0, 4.0))
    pyro.sample("y", dist.Normal(x.abs(), 0.3), obs=torch.tensor(3.0))


def interrupt_at(num_steps):
    def callback(history, posterior):
        if history.num_steps == num_steps:
            raise KeyboardInterrupt

    return callback


def test_a_callback_sees_the_history_and_copies_of_the_posterior():
    seen = []
    vi = pf.FlowVI(banana, num_steps=150, callback=lambda *found: seen.append(found), **FITTED)
    posterior = vi.run()
    assert [len(p.history["elbo"]) for _, p in seen] == [50, 100, 150]
    assert seen[0][1].elbo < seen[-1][1].elbo
    assert seen[0][0] is seen[-1][0] is posterior.history
    assert posterior is vi.posterior


def test_a_callback_that_draws_does_not_change_the_fit():
    plain = pf.FlowVI(banana, num_steps=100, **FITTED).run()
    watched = pf.FlowVI(banana, num_steps=100, callback=lambda _, p: bool(p.sample(7)), **FITTED).run()
    assert plain.history["elbo"].tolist() == watched.history["elbo"].tolist()
    assert all(map(torch.equal, plain.guide.flow.parameters(), watched.guide.flow.parameters()))


@pytest.mark.parametrize("model", [banana, two_modes])
def test_a_callback_that_returns_false_ends_the_fit(model):
    calls = []

    def callback(history, posterior):
        calls.append(history.num_steps)
        return history.num_steps < 100

    posterior = pf.FlowVI(model, gate=False, callback=callback, **FITTED).run()
    assert calls == [50, 100] and posterior.history.num_steps == 100
    assert len(posterior.guide.flow.components) == (2 if model is two_modes else 1)


@pytest.mark.parametrize("model", [banana, two_modes])
def test_an_interrupted_training_leaves_the_posterior_so_far(model):
    vi = pf.FlowVI(model, num_steps=500, callback=interrupt_at(100), **FITTED)
    with pytest.raises(pf.FitInterrupted, match="attribute posterior of the FlowVI") as caught:
        vi.run()
    posterior = caught.value.result
    assert posterior is vi.posterior and posterior.history.num_steps == 100
    assert posterior.diagnose().verdict in ("good", "correct it", "do not use")
    assert posterior.sample(5)["x"].shape == (5,)


def test_an_interrupted_fit_with_a_guide_leaves_it_as_the_posterior():
    guide = pf.guides.AutoIAF(banana)
    vi = pf.FlowVI(banana, guide, callback=interrupt_at(50), **FITTED)
    with pytest.raises(pf.FitInterrupted):
        vi.run()
    assert vi.posterior.history.num_steps == 50
    assert vi.posterior.guide.flow is guide.flow


def test_an_interrupt_after_a_better_candidate_leaves_that_one(monkeypatch):
    def heavy():
        pyro.sample("x", dist.StudentT(1.5, torch.zeros(2), 1.0).to_event(1))

    def briefly(vi, flow, make, so_far, progress):
        flows.append(flow)
        so_far.note_training(make, History())
        if len(flows) == 2:
            with torch.no_grad():
                flow.transform.layers[-1].loc += 100.0
            raise KeyboardInterrupt
        return History()

    flows = []
    monkeypatch.setattr(pf.FlowVI, "_train", briefly)
    vi = pf.FlowVI(heavy, gate=False, **FITTED)
    with pytest.raises(pf.FitInterrupted):
        vi.run()
    assert vi.posterior.guide.flow is flows[0]


@pytest.mark.parametrize(("where", "is_at_mode"), [("find_start", False), ("Candidate", True)])
def test_an_interrupted_search_leaves_a_gaussian(monkeypatch, where, is_at_mode):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, where, stop)

    def shifted():
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(8.0))

    vi = pf.FlowVI(shifted, **FITTED)
    with pytest.raises(pf.FitInterrupted):
        vi.run()
    draws = vi.posterior.sample(1000)["z"]
    assert vi.posterior.guide.flow_fn == pf.flows.Recipe("Gaussian")
    # At the mode it is the posterior, N(4, 1/2); before that it is narrow, at the initial values.
    assert abs(draws.std().item() - (0.5**0.5 if is_at_mode else 0.1)) < 0.1
    assert not is_at_mode or abs(draws.mean().item() - 4.0) < 0.1


def test_an_interrupt_before_the_model_is_known_leaves_nothing():
    def model():
        raise KeyboardInterrupt

    vi = pf.FlowVI(model, **FITTED)
    with pytest.raises(pf.FitInterrupted, match="so that there is no result") as caught:
        vi.run()
    assert caught.value.result is vi.posterior is None


def test_a_diverged_fit_leaves_the_posterior_of_its_last_good_state():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        is_late = len(calls) > 60
        calls.append(x)
        pyro.factor("wall", torch.where(torch.as_tensor(is_late), torch.nan, 0.0) * x.sum())

    calls = []
    vi = pf.FlowVI(model, num_steps=200, compile="none", dtype=torch.float32, num_starts=1, **FITTED)
    with pytest.raises(pf.DivergedError) as caught:
        vi.run()
    assert caught.value.result is vi.posterior
    assert vi.posterior.sample(3)["x"].isfinite().all()


@pytest.mark.parametrize("kept_by", ["interrupt", "callback"])
def test_training_goes_on_from_a_posterior_so_far(kept_by):
    seen = []
    if kept_by == "callback":
        pf.FlowVI(banana, num_steps=50, callback=lambda _, found: seen.append(found), **FITTED).run()
    else:
        vi = pf.FlowVI(banana, num_steps=500, callback=interrupt_at(100), **FITTED)
        with pytest.raises(pf.FitInterrupted):
            vi.run()
        seen.append(vi.posterior)
    assert callable(seen[0].guide.model) and seen[0].with_data().elbo < 0
    longer = pf.FlowVI(banana, seen[0].guide, num_steps=100, **FITTED).run()
    assert longer.elbo > seen[0].elbo - 0.05


def test_a_false_of_numpy_ends_the_fit():
    posterior = pf.FlowVI(banana, num_steps=200, callback=lambda h, _: np.bool_(False), **FITTED).run()
    assert posterior.history.num_steps == 50


def test_a_model_that_writes_into_the_data_is_refused_and_the_data_stay():
    def model(x):
        missing = pyro.sample("missing", dist.Normal(0.0, 1.0).expand([int(x.isnan().sum())]).to_event(1))
        x[x.isnan()] = missing
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.zeros(len(x)))

    x = torch.tensor([1.0, torch.nan, 2.0, torch.nan])
    with pytest.raises(pf.ModelError, match=r"writes into its argument 'x'.*x = x.clone\(\)"):
        pf.FlowVI(model, **FITTED).run(x)
    assert x.isnan().tolist() == [False, True, False, True]


def test_a_callback_must_be_a_function():
    with pytest.raises(pf.OptionError, match="callback must be a function of the history and the posterior"):
        pf.FlowVI(banana, callback=7)
