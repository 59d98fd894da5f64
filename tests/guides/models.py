"""Guides, models and hand-computed densities that the tests of guides share. Module-level, so that they pickle."""

from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO

from pyroflows.guides import AutoFlow, AutoIAF, AutoPlanar, AutoRadial, AutoRealNVP, AutoSpline, AutoSylvester

GUIDES = {
    "AutoFlow": AutoFlow,
    "AutoPlanar": partial(AutoPlanar, num_layers=4),
    "AutoRadial": partial(AutoRadial, num_layers=4),
    "AutoSylvester": partial(AutoSylvester, num_layers=2),
    "AutoIAF": partial(AutoIAF, num_layers=2, hidden_dims=(8, 8)),
    "AutoRealNVP": partial(AutoRealNVP, num_layers=2, hidden_dims=(8, 8)),
    "AutoSpline": partial(AutoSpline, num_layers=2, hidden_dims=(8, 8), bins=4),
}

all_guides = pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)


def guides_of_which_quick(*names):
    """All guides, of which the quick run tries those of these names."""
    marks = {name: () if name in names else pytest.mark.slow for name in GUIDES}
    return pytest.mark.parametrize("make", [pytest.param(GUIDES[name], id=name, marks=marks[name]) for name in GUIDES])


# The flow of AutoFlow is a larger one of AutoIAF's.
distinct_guides = guides_of_which_quick(*(name for name in GUIDES if name != "AutoFlow"))

Y = torch.tensor([1.3, 0.2, 2.1, 0.7])


def gaussian(y=Y):
    """A conjugate model: its posterior and evidence are known, see ``gaussian_posterior``."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def gaussian_posterior(y=Y):
    precision = 1 / 4 + len(y)
    return dist.Normal(y.sum() / precision, precision**-0.5)


def regression(y=Y):
    """Two latents, one of them positive, with no more batch dimensions than a batch of draws leaves free."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


def regression_log_joint(u, y=Y):
    """Of unconstrained vectors ``(..., 2)``: the log joint of ``regression`` with the log-determinant, by hand."""
    mu, log_sigma = u.unbind(-1)
    sigma = log_sigma.exp()
    likelihood = dist.Normal(mu[..., None], sigma[..., None]).log_prob(y).sum(-1)
    return dist.Normal(0.0, 2.0).log_prob(mu) + dist.LogNormal(0.0, 1.0).log_prob(sigma) + log_sigma + likelihood


def groups(y=None):
    """Several constrained sites, plain, plated, and in nested plates; float64; right for batches of draws too."""
    zero = torch.zeros((), dtype=torch.float64)
    scale = pyro.sample("scale", dist.HalfNormal(zero + 1.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 2.0, dtype=torch.float64)))
    columns = pyro.plate("columns", 2, dim=-1)
    with columns:
        rate = pyro.sample("rate", dist.Beta(zero + 2.0, zero + 3.0))
        vector = pyro.sample("vector", dist.Normal(zero.expand(3), scale[..., None]).to_event(1))
    with pyro.plate("rows", 4, dim=-2), columns:
        local = pyro.sample("local", dist.LogNormal(zero, zero + 0.5))
        loc = local * rate + (weights * vector).sum(-1)
        return pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.zeros(4, 2, dtype=torch.float64) if y is None else y)


def perturb(guide, scale=0.3):
    """Away from the start, where most layers are the identity: noise on every parameter, less where there are many."""
    with torch.no_grad():
        for parameter in guide.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            parameter.add_(scale * fan_in**-0.5 * torch.randn_like(parameter))
    return guide


def built(make, model, *args, **options):
    """A guide that has been called once, with perturbed parameters."""
    guide = make(model, **options)
    guide(*args)
    return perturb(guide)


def fit(model, guide, *args, steps=3, lr=0.02, elbo=None, **kwargs):
    """SVI for some steps; the losses."""
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), elbo or Trace_ELBO())
    return [svi.step(*args, **kwargs) for _ in range(steps)]


def parameters(guide):
    """A copy of their values."""
    return {name: parameter.detach().clone() for name, parameter in guide.named_parameters()}


def changed(guide, before):
    """The names of the parameters that are no longer what ``parameters`` gave."""
    return {name for name, parameter in guide.named_parameters() if not torch.equal(parameter, before[name])}


def draws_under_seed(guide, *args, seed=7):
    """What one call of a guide returns under a fixed seed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return guide(*args)


def assert_same_draws(a, b, *args):
    first, second = draws_under_seed(a, *args), draws_under_seed(b, *args)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0)
