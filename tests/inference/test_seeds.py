"""Seeds make draws reproducible and leave the global generator as it was; None uses that generator."""

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist

import pyroflows as pf
from pyroflows import FlowVI, OptionError
from tests.inference.test_posterior import by_hand

Y = torch.tensor([0.5, -1.0, 2.0])
SCALE = torch.tensor(0.7)


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("N", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def guide(y):
    pyro.sample("mu", dist.Normal(y.mean(), 1.0))


@pytest.fixture(scope="module")
def posterior():
    return by_hand(model, torch.tensor([0.3]), torch.tensor([0.5]), Y)


@pytest.fixture(scope="module")
def amortized():
    options = {"max_epochs": 1, "num_flows": 1, "seed": 0, "progress_bar": False}
    return pf.fit_amortized(lambda y=None: model(torch.zeros(3) if y is None else y), num_simulations=100, **options)


def in_arviz(data):
    return {
        group: data[group][name].values
        for group, name in (("posterior", "mu"), ("posterior_predictive", "y"), ("prior", "mu"))
    }


ASK = {
    "sample": lambda p, seed: p.sample(8, seed=seed),
    "predictive": lambda p, seed: p.predictive(8, seed=seed),
    "predictive elsewhere": lambda p, seed: p.predictive(8, torch.zeros(2), seed=seed),
    "importance_sample": lambda p, seed: p.importance_sample(8, seed=seed).draws,
    "of a guide": lambda p, seed: (
        pf.importance_sample(model, guide, Y, num_samples=8, seed=seed, progress_bar=False).draws
    ),
    "resample": lambda p, seed: p.importance_sample(40, seed=0).resample(30, seed=seed),
    "to_arviz": lambda p, seed: in_arviz(p.to_arviz(8, seed=seed)),
    "chains": lambda p, seed: in_arviz(p.mcmc(4, 2, num_warmup=1, seed=0, progress_bar=False).to_arviz(seed=seed)),
    "pf.to_arviz": lambda p, seed: in_arviz(pf.to_arviz({"mu": Y}, model, (Y,), seed=seed)),
}


def same(a, b):
    return all(np.array_equal(np.asarray(a[name]), np.asarray(b[name])) for name in a)


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
def test_a_seed_repeats_draws_and_leaves_the_generator(posterior, ask):
    before = torch.get_rng_state()
    first = ask(posterior, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert same(first, ask(posterior, 3))
    assert not same(first, ask(posterior, 4))


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
def test_without_a_seed_the_generator_moves(posterior, ask):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = ask(posterior, None)
        assert not same(first, ask(posterior, None))
        torch.manual_seed(1)
        assert same(first, ask(posterior, None))


def test_amortised_posteriors(amortized):
    at = amortized.posterior(Y)
    assert same(at.predictive(5, seed=1), at.predictive(5, seed=1))
    rows = torch.stack([Y, -Y])
    assert same(amortized.sample(rows, 5, seed=1), amortized.sample(rows, 5, seed=1))
    assert not same(amortized.sample(rows, 5, seed=1), amortized.sample(rows, 5, seed=2))


def seeded_model(y, seed):
    mu = pyro.sample("mu", dist.Normal(seed, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_a_model_with_an_argument_of_this_name():
    posterior = FlowVI(seeded_model, seed=0, progress_bar=False).run(Y[0], seed=5.0)
    first = posterior.predictive(5, Y[0], 5.0, seed=1)
    assert same(first, posterior.predictive(5, Y[0], 5.0, seed=1))
    with pytest.raises(OptionError, match="seed is an option here and also an argument of the model"):
        posterior.predictive(5, Y[0], seed=1)
    with pytest.raises(OptionError, match="seed is an option here and also an argument of the model"):
        pf.importance_sample(seeded_model, posterior, Y[0], seed=1, progress_bar=False)
    with pytest.raises(OptionError, match="seed is an option here"):
        pf.sbc(seeded_model, posterior, Y[0], seed=1, progress_bar=False)


def counted(y=None, num_samples=2):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(num_samples), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(mu.sum(), 1.0), obs=y)


def test_a_model_with_an_argument_num_samples():
    posterior = FlowVI(counted, seed=0, progress_bar=False).run(Y[0], num_samples=3)
    assert posterior.predictive(5, None, 3)["y"].shape == (5,)
    options = {"num_samples": 50, "progress_bar": False}
    assert pf.importance_sample(counted, posterior, Y[0], 3, **options).draws["mu"].shape == (50, 3)
    with pytest.raises(OptionError, match="num_samples is an option here and also an argument .*, up to num_samples"):
        pf.importance_sample(counted, posterior, Y[0], **options)
    with pytest.raises(OptionError, match="num_samples is an option here"):
        pf.sbc(counted, posterior, **options)
