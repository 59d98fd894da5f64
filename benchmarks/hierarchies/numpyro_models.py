"""The hierarchies of :mod:`.models` in NumPyro, for an environment without Pyro."""

from collections.abc import Callable

import jax.numpy as jnp
import numpyro
from jax import Array
from numpyro import distributions as dist
from numpyro.infer.reparam import LocScaleReparam

FUNNEL_DIM = 10


def radon(county: Array, floor: Array, uranium: Array, y: Array) -> None:
    mu_a = numpyro.sample("mu_a", dist.Normal(0.0, 5.0))
    gamma = numpyro.sample("gamma", dist.Normal(0.0, 5.0))
    mu_b = numpyro.sample("mu_b", dist.Normal(0.0, 5.0))
    sigma_a = numpyro.sample("sigma_a", dist.HalfNormal(1.0))
    sigma_b = numpyro.sample("sigma_b", dist.HalfNormal(1.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("counties", len(uranium)):
        a = numpyro.sample("a", dist.Normal(mu_a + gamma * uranium, sigma_a))
        b = numpyro.sample("b", dist.Normal(mu_b, sigma_b))
    with numpyro.plate("houses", len(y)):
        numpyro.sample("y", dist.Normal(a[county] + b[county] * floor, sigma), obs=y)


def volatility(y: Array) -> None:
    mu = numpyro.sample("mu", dist.Cauchy(0.0, 10.0))
    phi = numpyro.sample("phi", dist.Uniform(-1.0, 1.0))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(5.0))
    h = numpyro.sample("h", dist.ImproperUniform(dist.constraints.real, (), (len(y),)))
    numpyro.factor("h_first", dist.Normal(mu, sigma / jnp.sqrt(1 - phi**2)).log_prob(h[0]))
    numpyro.factor("h_next", dist.Normal(mu + phi * (h[:-1] - mu), sigma).log_prob(h[1:]).sum())
    numpyro.sample("y", dist.Normal(0.0, jnp.exp(h / 2)).to_event(1), obs=y)


def volatility_non_centred(y: Array) -> None:
    """Stan's manual calls this form reparametrised; a product with a matrix takes the place of the loop over days."""
    mu = numpyro.sample("mu", dist.Cauchy(0.0, 10.0))
    phi = numpyro.sample("phi", dist.Uniform(-1.0, 1.0))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(5.0))
    z = numpyro.sample("z", dist.Normal(jnp.zeros(len(y)), 1.0))
    days = jnp.arange(len(y))
    lag = days[:, None] - days
    powers = jnp.where(lag >= 0, phi ** jnp.maximum(lag, 0), 0.0)
    h = numpyro.deterministic("h", mu + sigma * powers @ z.at[0].divide(jnp.sqrt(1 - phi**2)))
    numpyro.sample("y", dist.Normal(0.0, jnp.exp(h / 2)).to_event(1), obs=y)


def items(y: Array) -> None:
    num_persons, num_items = y.shape
    sigma_b = numpyro.sample("sigma_b", dist.HalfNormal(2.0))
    with numpyro.plate("items", num_items, dim=-1):
        discrimination = numpyro.sample("discrimination", dist.LogNormal(0.0, 0.5))
        difficulty = numpyro.sample("difficulty", dist.Normal(0.0, sigma_b))
    with numpyro.plate("persons", num_persons, dim=-2):
        ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
        with numpyro.plate("items_again", num_items, dim=-1):
            numpyro.sample("y", dist.Bernoulli(logits=discrimination * (ability - difficulty)), obs=y)


def _gaussian_process(x: Array) -> tuple[Array, Array]:
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    length = numpyro.sample("length", dist.InverseGamma(3.0, 0.5))
    covariance = scale**2 * jnp.exp(-0.5 * ((x[:, None] - x) / length) ** 2) + 1e-6 * jnp.eye(len(x))
    return mean * jnp.ones_like(x), covariance


def cox_process(x: Array, y: Array) -> None:
    f = numpyro.sample("f", dist.MultivariateNormal(*_gaussian_process(x)))
    numpyro.sample("y", dist.Poisson(jnp.exp(f)).to_event(1), obs=y)


def cox_process_non_centred(x: Array, y: Array) -> None:
    mean, covariance = _gaussian_process(x)
    z = numpyro.sample("z", dist.Normal(jnp.zeros_like(x), 1.0).to_event(1))
    f = numpyro.deterministic("f", mean + jnp.linalg.cholesky(covariance) @ z)
    numpyro.sample("y", dist.Poisson(jnp.exp(f)).to_event(1), obs=y)


def schools(y: Array, sigma: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def funnel() -> None:
    v = numpyro.sample("v", dist.Normal(0.0, 3.0))
    with numpyro.plate("components", FUNNEL_DIM - 1):
        numpyro.sample("x", dist.Normal(0.0, jnp.exp(v / 2)))


def gaussian_groups(group: Array, y: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    with numpyro.plate("groups", int(group[-1]) + 1):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(theta[group], sigma), obs=y)


def poisson_groups(group: Array, y: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("groups", int(group[-1]) + 1):
        rate = numpyro.sample("rate", dist.LogNormal(mu, tau))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Poisson(rate[group]), obs=y)


def non_centred(model: Callable[..., None], *sites: str) -> Callable[..., None]:
    """The model with draws of these sites around zero, with sd one, which are shifted and scaled."""
    return numpyro.handlers.reparam(model, {site: LocScaleReparam(0) for site in sites})


GROUPS = {"gaussian": gaussian_groups, "poisson": poisson_groups}
# The form that long runs sample, where the centred one mixes badly.
MIXING: dict[str, Callable[..., None]] = {
    "radon": non_centred(radon, "b"),
    "volatility": volatility_non_centred,
    "cox_process": cox_process_non_centred,
    "schools": non_centred(schools, "theta"),
    "funnel": non_centred(funnel, "x"),
}


def model(name: str, mixes: bool = False) -> Callable[..., None]:
    """The model of a set of data, centred, or in the form that mixes."""
    name = name.removesuffix("_loop")
    if mixes and name in MIXING:
        return MIXING[name]
    kind = name.split("_")[0]
    return GROUPS[kind] if kind in GROUPS else globals()[name]
