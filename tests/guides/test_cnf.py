"""AutoCNF where Pyro runs it: plain SVI, Predictive, AutoGuideList, NeuTra, dtypes and numbers of latents."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList
from pyro.infer.reparam import NeuTraReparam

import pyroflows as pf
from pyroflows.guides import AutoCNF

SMALL = {"hidden_dims": (16, 16), "num_steps": 2}


def model(dim=2, dtype=torch.float32):
    x = pyro.sample("x", dist.Normal(torch.full((dim,), 1.0, dtype=dtype), 0.5).to_event(1))
    return pyro.sample("scale", dist.LogNormal(x[0], 0.3))


def trained(guide, num_steps, elbo=Trace_ELBO):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo())
    losses = [svi.step() for _ in range(num_steps)]
    return sum(losses[-30:]) / 30


@pytest.mark.slow
def test_plain_svi_trains_it():
    pyro.set_rng_seed(0)
    guide = AutoCNF(model, **SMALL)
    trained(guide, 1, TraceGraph_ELBO)
    assert trained(guide, 120) < 0.7  # the evidence is 1, and the guide starts at 3
    draws = Predictive(model, guide=guide, num_samples=100)()
    assert abs(draws["x"].mean() - 1.0) < 0.3
    assert draws["scale"].shape == (100,)


def test_a_triangular_layer_takes_correlations():
    """Without it they take a steep field, by whose equal steps training gains what is not there."""
    guide, other = AutoCNF(model, **SMALL), AutoCNF(model, **SMALL)
    guide()
    other.load_state_dict(guide.state_dict())
    torch.testing.assert_close(other.flow().log_prob(torch.ones(3)), guide.flow().log_prob(torch.ones(3)))
    assert isinstance(other.flow.layers[-1], pf.transforms.Triangular)


def test_training_takes_few_steps_and_reports_are_exact():
    """With gradients the guide is that of its two steps, and without them it solves adaptively."""
    pyro.set_rng_seed(0)
    guide = AutoCNF(model, **SMALL)
    guide()
    site = f"_{guide._pyro_name}_latent"
    with torch.no_grad():
        for parameter in guide.flow.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    trace = pyro.poutine.trace(guide).get_trace()
    with torch.no_grad():
        exact = pyro.poutine.trace(guide).get_trace()
    assert not trace.nodes[site]["fn"].is_exact
    assert exact.nodes[site]["fn"].is_exact


@pytest.mark.parametrize(("dim", "dtype"), [(1, torch.float32), (50, torch.float32), (3, torch.float64)])
def test_latents_and_dtypes(dim, dtype):
    guide = AutoCNF(partial(model, dim, dtype), hidden_dims=(8,), num_steps=2)
    SVI(partial(model, dim, dtype), guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert guide.latent_dim == dim + 1
    assert guide()["x"].dtype == dtype
    assert next(guide.flow.parameters()).dtype == dtype


def test_a_list_of_guides():
    guide = AutoGuideList(model)
    guide.append(AutoCNF(pyro.poutine.block(model, hide=["scale"]), **SMALL))
    guide.append(AutoDelta(pyro.poutine.block(model, expose=["scale"])))
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert set(guide()) == {"x", "scale"}


def test_neutra():
    pyro.set_rng_seed(0)
    guide = AutoCNF(model, **SMALL)
    trained(guide, 10)
    neutra = NeuTraReparam(guide.requires_grad_(False))
    chain = MCMC(NUTS(neutra.reparam(model), max_tree_depth=2), num_samples=4, warmup_steps=2, disable_progbar=True)
    chain.run()
    (latent,) = chain.get_samples().values()
    assert neutra.transform_sample(latent)["x"].shape == (4, 2)
