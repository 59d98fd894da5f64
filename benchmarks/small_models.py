"""Ten small Pyro models of different kinds; without data each draws its own, so that a fit can be checked.

A model takes the data y and nothing else. :func:`simulated` draws latents from the prior and y given them.
"""

from collections.abc import Callable

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyroflows.randomness import seeded

Model = Callable[..., None]

X8 = torch.linspace(-1.0, 1.0, 8)
X12 = torch.linspace(-2.0, 2.0, 12)
SCHOOL_SDS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
GROUPS = torch.arange(12) // 6


def normal_mean(y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 5):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def normal(y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("row", 8):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


def regression(y: Tensor | None = None) -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("row", 8):
        pyro.sample("y", dist.Normal(intercept + slope * X8, sigma), obs=y)


def poisson_rate(y: Tensor | None = None) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("row", 6):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def beta_binomial(y: Tensor | None = None) -> None:
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    pyro.sample("y", dist.Binomial(12, p), obs=y)


def logistic(y: Tensor | None = None) -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.5))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.5))
    with pyro.plate("row", 12):
        pyro.sample("y", dist.Bernoulli(logits=intercept + slope * X12), obs=y)


def schools(y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, SCHOOL_SDS), obs=y)


def gamma(y: Tensor | None = None) -> None:
    shape = pyro.sample("shape", dist.LogNormal(0.0, 0.5))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("row", 10):
        pyro.sample("y", dist.Gamma(shape, rate), obs=y)


def student_t(y: Tensor | None = None) -> None:
    df = pyro.sample("df", dist.Gamma(2.0, 0.1))
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("row", 15):
        pyro.sample("y", dist.StudentT(df, loc, scale), obs=y)


def two_groups(y: Tensor | None = None) -> None:
    with pyro.plate("group", 2):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("row", 12):
        pyro.sample("y", dist.Normal(mean[..., GROUPS], sigma), obs=y)


MODELS: tuple[Model, ...] = (
    *(normal_mean, normal, regression, poisson_rate, beta_binomial),
    *(logistic, schools, gamma, student_t, two_groups),
)


def simulated(model: Model, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Draw latents, by site, and data from a model."""
    with seeded(seed):
        trace = prune_subsample_sites(poutine.trace(model).get_trace())
    values = {name: node["value"] for name, node in trace.iter_stochastic_nodes()}
    y = values.pop("y")
    return values, y
