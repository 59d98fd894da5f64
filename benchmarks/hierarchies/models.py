"""Hierarchies in Pyro, centred, as textbooks write them."""

from collections.abc import Callable

import numpy as np
import pyro
import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import constraints

from benchmarks.hierarchies.data import DATA, IN_FLOAT64

FUNNEL_DIM = 10


def radon(county: Tensor, floor: Tensor, uranium: Tensor, y: Tensor) -> None:
    """Varying intercepts and slopes (Gelman and Hill 2007, chapters 12 and 13)."""
    mu_a = pyro.sample("mu_a", dist.Normal(0.0, 5.0))
    gamma = pyro.sample("gamma", dist.Normal(0.0, 5.0))
    mu_b = pyro.sample("mu_b", dist.Normal(0.0, 5.0))
    sigma_a = pyro.sample("sigma_a", dist.HalfNormal(1.0))
    sigma_b = pyro.sample("sigma_b", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("counties", len(uranium)):
        a = pyro.sample("a", dist.Normal(mu_a + gamma * uranium, sigma_a))
        b = pyro.sample("b", dist.Normal(mu_b, sigma_b))
    with pyro.plate("houses", len(y)):
        pyro.sample("y", dist.Normal(a[county] + b[county] * floor, sigma), obs=y)


def volatility(y: Tensor) -> None:
    """Stochastic volatility (Stan's manual; Kim, Shephard and Chib 1998)."""
    mu = pyro.sample("mu", dist.Cauchy(0.0, 10.0))
    phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(5.0))
    h = pyro.sample("h", dist.ImproperUniform(constraints.real, (), (len(y),)))
    pyro.factor("h_first", dist.Normal(mu, sigma / (1 - phi**2).sqrt()).log_prob(h[0]))
    pyro.factor("h_next", dist.Normal(mu + phi * (h[:-1] - mu), sigma).log_prob(h[1:]).sum())
    pyro.sample("y", dist.Normal(0.0, (h / 2).exp()).to_event(1), obs=y)


def volatility_loop(y: Tensor) -> None:
    """The same with a site for each day."""
    mu = pyro.sample("mu", dist.Cauchy(0.0, 10.0))
    phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(5.0))
    h = [pyro.sample("h_0", dist.Normal(mu, sigma / (1 - phi**2).sqrt()))]
    for t in range(1, len(y)):
        h.append(pyro.sample(f"h_{t}", dist.Normal(mu + phi * (h[-1] - mu), sigma)))
    stacked = pyro.deterministic("h", torch.stack(h), event_dim=1)
    pyro.sample("y", dist.Normal(0.0, (stacked / 2).exp()).to_event(1), obs=y)


def items(y: Tensor) -> None:
    """Item response with two parameters an item."""
    num_persons, num_items = y.shape
    sigma_b = pyro.sample("sigma_b", dist.HalfNormal(2.0))
    with pyro.plate("items", num_items, dim=-1):
        discrimination = pyro.sample("discrimination", dist.LogNormal(0.0, 0.5))
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, sigma_b))
    with pyro.plate("persons", num_persons, dim=-2):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with pyro.plate("items_again", num_items, dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=discrimination * (ability - difficulty)), obs=y)


def cox_process(x: Tensor, y: Tensor) -> None:
    """A log-Gaussian Cox process in bins, whose log intensity is a Gaussian process."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    length = pyro.sample("length", dist.InverseGamma(3.0, 0.5))
    covariance = scale**2 * (-0.5 * ((x[:, None] - x) / length) ** 2).exp() + 1e-6 * torch.eye(len(x)).to(x)
    f = pyro.sample("f", dist.MultivariateNormal(mean * torch.ones_like(x), covariance))
    pyro.sample("y", dist.Poisson(f.exp()).to_event(1), obs=y)


def schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def funnel() -> None:
    """Neal's funnel (Neal 2003)."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("components", FUNNEL_DIM - 1):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def gaussian_groups(group: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("groups", int(group[-1]) + 1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(theta[group], sigma), obs=y)


def poisson_groups(group: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", int(group[-1]) + 1):
        rate = pyro.sample("rate", dist.LogNormal(mu, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(rate[group]), obs=y)


def model(name: str) -> Callable[..., None]:
    """The model of a set of data."""
    kind = name.split("_")[0]
    groups = {"gaussian": gaussian_groups, "poisson": poisson_groups}
    return groups[kind] if kind in groups else globals()[name]


def arguments(name: str) -> dict[str, Tensor]:
    """The data as the model's arguments, in float32, or float64 where the model needs it."""
    dtype = np.float64 if name in IN_FLOAT64 else np.float32
    data = {key: value if value.dtype == np.int64 else value.astype(dtype) for key, value in DATA[name]().items()}
    return {key: torch.from_numpy(value) for key, value in data.items()}
