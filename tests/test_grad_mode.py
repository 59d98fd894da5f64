"""Fits do the same whatever torch's modes are around them."""

import pyro
import pytest
import torch
from pyro import distributions as dist

import pyroflows as pf
from pyroflows.grad_mode import isolated

Y = torch.tensor([0.5, -1.0, 2.0])


def model(y):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean[..., :1] * mean[..., 1:], 1.0), obs=y)


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


MODES = [torch.no_grad, torch.inference_mode, autocast]
OPTIONS = {"seed": 0, "progress_bar": False}


def fit():
    return pf.FlowVI(model, lambda dim: pf.flows.IAF(dim), num_steps=5, num_starts=2, **OPTIONS).run(Y.clone())


def figures():
    """Every public call that fits something, or that runs a model with gradients."""
    posterior = fit()
    flow = posterior.distill(num_steps=5, warm_start=5, **OPTIONS)
    return [
        posterior.elbo,
        posterior.with_data(Y.clone()).elbo,
        flow.elbo,
        posterior.importance_sample(1).draws["mean"].dtype == torch.float32,
        posterior.fit_proposal(num_samples=300, max_epochs=2, **OPTIONS).elbo,
        posterior.mcmc(num_samples=4, num_chains=2, num_warmup=3, **OPTIONS).draws["mean"].sum().item(),
        posterior.predictive(3)["y"].dtype == torch.float32,
        posterior.to_arviz(5)["posterior"]["mean"].shape,
    ]


@pytest.fixture(scope="module")
def expected():
    return figures()


@pytest.mark.parametrize("mode", MODES)
def test_a_fit_and_its_posterior(mode, expected):
    torch.manual_seed(0)
    with mode():
        assert figures() == expected


@pytest.mark.parametrize("mode", MODES)
def test_fits_of_flows(mode):
    x = torch.randn(100, 2)
    results = []
    for context in (torch.enable_grad, mode):
        torch.manual_seed(0)
        flow = pf.flows.MAF(2, num_layers=1, hidden_dims=(8,))
        with context():
            fitted = pf.fit_density(flow, x.clone(), max_epochs=2, **OPTIONS)
            history = pf.train(pf.fitting.ReverseKL(flow, lambda x: -(x**2).sum(-1)), num_steps=3, **OPTIONS)
        results.append([fitted.best_log_prob, *history["elbo"]])
    assert results[0] == results[1]


@pytest.mark.parametrize("mode", MODES)
def test_importance_sampling(mode):
    guide = pf.guides.AutoFlow(model)
    with mode():
        weighted = pf.importance_sample(model, guide, Y.clone(), num_samples=50, progress_bar=False)
    assert weighted.draws["mean"].dtype == torch.float32
    assert not weighted.draws["mean"].is_inference()
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in guide.parameters())


def test_data_that_were_made_under_inference_mode():
    with torch.inference_mode():
        y = Y.clone()
    assert pf.FlowVI(model, num_steps=3, **OPTIONS).run(y).sample(2)["mean"].shape == (2, 2)


def test_a_flow_that_was_made_under_inference_mode():
    with torch.inference_mode():
        flow = pf.flows.IAF(2)
    for train in (
        lambda: pf.fit_density(flow, torch.randn(100, 2), **OPTIONS),
        lambda: pf.distill(flow, pf.flows.MAF(2), **OPTIONS),
        lambda: pf.train(pf.fitting.ReverseKL(flow, lambda x: -(x**2).sum(-1)), num_steps=3, **OPTIONS),
    ):
        with pytest.raises(pf.errors.OptionError, match="made under torch.inference_mode.*make it outside"):
            train()


def test_modes_are_as_they_were_afterwards():
    @isolated
    def fails():
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
        raise ValueError("once")

    with torch.inference_mode(), autocast():
        with pytest.raises(ValueError, match="once"):
            fails()
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
