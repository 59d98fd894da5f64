"""NumPyro's NUTS on the same posteriors: four vectorised chains, each of 1000 draws after 1000 of warm-up.

    python -m pip install numpyro            # in an environment of its own: neither Pyro nor torch is needed
    python -m benchmarks.posteriordb.numpyro_nuts --path FOLDER [names...] [--json FILE]

Times include compilation; they are counted and limited as in :mod:`.nuts`. The models, their parametrisation and
their dtypes are those of the Pyro models beside this file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS

from benchmarks.posteriordb import reference
from benchmarks.posteriordb.metrics import accuracy
from benchmarks.posteriordb.samplers import NUM_DRAWS, NUM_WARMUP, main, timed

NUM_CHAINS = 4
ORDERED = constraints.ordered_vector
Data = dict[str, Any]


def flat(name: str, support: Any = constraints.real, *shape: int) -> jax.Array:
    return numpyro.sample(name, dist.ImproperUniform(support, (), shape))


def positive_ordered(name: str, loc: list[float]) -> jax.Array:
    # NumPyro has no such constraint: exponentials of an ordered vector, flat in themselves by the Jacobian.
    log_x = numpyro.sample(f"log_{name}", dist.ImproperUniform(ORDERED, (), (len(loc),)))
    x = numpyro.deterministic(name, jnp.exp(log_x))
    numpyro.factor(f"{name}_prior", (log_x + dist.Normal(jnp.array(loc), 1.0).log_prob(x)).sum())
    return x


def eight_schools(d: Data) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    theta_trans = numpyro.sample("theta_trans", dist.Normal(jnp.zeros(8), 1.0))
    theta = numpyro.deterministic("theta", mu + tau * theta_trans)
    numpyro.sample("y", dist.Normal(theta, d["sigma"]), obs=d["y"])


def autoregression(d: Data) -> None:
    order, y = int(d["K"]), d["y"]
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(order), 10.0))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    lagged = np.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], -1)
    numpyro.sample("y", dist.Normal(alpha + lagged @ beta, sigma), obs=y[order:])


def garch(d: Data) -> None:
    y = d["y"]
    mu, alpha0 = flat("mu"), flat("alpha0", constraints.positive)
    alpha1 = numpyro.sample("alpha1", dist.Beta(1.0, 2.0))
    share = numpyro.sample("share", dist.Uniform(0.0, 1.0))
    beta1 = numpyro.deterministic("beta1", (1 - alpha1) * share)

    def step(variance: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        return alpha0 + alpha1 * residual**2 + beta1 * variance, variance

    _, variance = jax.lax.scan(step, d["sigma1"] ** 2 + 0.0 * mu, y - mu)
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variance)), obs=y)


def gp_pois_regr(d: Data) -> None:
    x = d["x"]
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    f_tilde = numpyro.sample("f_tilde", dist.Normal(jnp.zeros(len(x)), 1.0))
    correlation = jnp.exp(-0.5 * ((x[:, None] - x) / rho) ** 2) + 1e-8 * jnp.eye(len(x))
    f = numpyro.deterministic("f", alpha * (jnp.linalg.cholesky(correlation) @ f_tilde))
    numpyro.sample("k", dist.Poisson(jnp.exp(f)), obs=d["k"])


def hidden_markov_log_prob(rows: list[jax.Array], emission: jax.Array) -> jax.Array:
    """Forward algorithm, for log-densities ``(N, K)`` of the observations in each state."""
    transition = jnp.log(jnp.stack(rows))

    def step(forward: jax.Array, emitted: jax.Array) -> tuple[jax.Array, None]:
        return jax.nn.logsumexp(forward[:, None] + transition, 0) + emitted, None

    forward, _ = jax.lax.scan(step, emission[0] - jnp.log(2.0), emission[1:])
    return jax.nn.logsumexp(forward)


def hmm_example(d: Data) -> None:
    rows = [numpyro.sample(name, dist.Dirichlet(jnp.ones(2))) for name in ("theta1", "theta2")]
    mu = positive_ordered("mu", [3.0, 10.0])
    numpyro.factor("y", hidden_markov_log_prob(rows, dist.Normal(mu, 1.0).log_prob(d["y"][:, None])))


def hmm_drive(d: Data) -> None:
    rows = [numpyro.sample(f"theta{k + 1}", dist.Dirichlet(d["alpha"][k])) for k in range(2)]
    phi, rate = positive_ordered("phi", [0.0, 3.0]), positive_ordered("lambda", [0.0, 3.0])
    emission = dist.Exponential(phi).log_prob(d["u"][:, None]) + dist.Exponential(rate).log_prob(d["v"][:, None])
    numpyro.factor("uv", hidden_markov_log_prob(rows, emission))


def diamonds(d: Data) -> None:
    x = d["X"][:, 1:] - d["X"][:, 1:].mean(0)
    b = numpyro.sample("b", dist.Normal(jnp.zeros(24), 1.0))
    intercept = numpyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = flat("sigma", constraints.positive)
    numpyro.factor("sigma_prior", dist.StudentT(3.0, 0.0, 10.0).log_prob(sigma))
    numpyro.sample("y", dist.Normal(intercept + x @ b, sigma), obs=d["Y"])


def blr(d: Data) -> None:
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(5), 10.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    numpyro.sample("y", dist.Normal(d["X"] @ beta, sigma), obs=d["y"])


def kilpisjarvi(d: Data) -> None:
    alpha = numpyro.sample("alpha", dist.Normal(d["pmualpha"], d["psalpha"]))
    beta = numpyro.sample("beta", dist.Normal(d["pmubeta"], d["psbeta"]))
    sigma = flat("sigma", constraints.positive)
    numpyro.sample("y", dist.Normal(alpha + beta * d["x"], sigma), obs=d["y"])


def regression(columns: Callable[[Data], tuple[list[np.ndarray], np.ndarray]]) -> Callable[[Data], None]:
    """Flat priors; the columns beside the intercept, and the response, are functions of the data."""

    def model(d: Data) -> None:
        predictors, y = columns(d)
        x = np.stack([np.ones_like(y), *predictors], -1)
        beta, sigma = flat("beta", constraints.real, x.shape[1]), flat("sigma", constraints.positive)
        numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)

    return model


def nes_columns(d: Data) -> tuple[list[np.ndarray], np.ndarray]:
    groups = [(d["age_discrete"] == k).astype(d["income"].dtype) for k in (2, 3, 4)]
    return [d["real_ideo"], d["race_adj"], *groups, d["educ1"], d["gender"], d["income"]], d["partyid7"]


def mesquite_columns(d: Data) -> tuple[list[np.ndarray], np.ndarray]:
    diam1, diam2, height, total, weight = (
        np.log(d[name]) for name in ("diam1", "diam2", "canopy_height", "total_height", "weight")
    )
    return [diam1 + diam2 + height, diam1 + diam2, diam1 - diam2, total, d["group"]], weight


def logearn_columns(d: Data) -> tuple[list[np.ndarray], np.ndarray]:
    return [d["height"], d["male"], d["height"] * d["male"]], np.log(d["earn"])


def kidscore_interaction(d: Data) -> None:
    x = np.stack([np.ones_like(d["mom_iq"]), d["mom_hs"], d["mom_iq"], d["mom_hs"] * d["mom_iq"]], -1)
    beta = flat("beta", constraints.real, 4)
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=d["kid_score"])


def gauss_mix(d: Data) -> None:
    mu = flat("mu", ORDERED, 2)
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0 * jnp.ones(2)))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.CategoricalProbs(jnp.stack([theta, 1 - theta]))
    numpyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=d["y"])


def runge_kutta(slope: Callable[[Any, Any], Any], state: Any, step: float, num_steps: int) -> Any:
    """States after each step, the first dimension."""

    def advance(x: Any, t: Any) -> tuple[Any, Any]:
        k1 = slope(t, x)
        k2 = slope(t + step / 2, x + step / 2 * k1)
        k3 = slope(t + step / 2, x + step / 2 * k2)
        k4 = slope(t + step, x + step * k3)
        x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x, x

    return jax.lax.scan(advance, state, step * jnp.arange(num_steps))[1]


def michaelis_menten(d: Data) -> None:
    k_a, k_m, v_m, sigma = (numpyro.sample(name, dist.HalfCauchy(1.0)) for name in ("k_a", "K_m", "V_m", "sigma"))

    def slope(t: jax.Array, c: jax.Array) -> jax.Array:
        c = jnp.maximum(c, 0.0)
        return d["D"] * k_a / d["V"] * jnp.exp(-k_a * t) - v_m / d["V"] * c / (k_m + c)

    solution = jnp.maximum(runge_kutta(slope, 0.0 * k_a, 0.1, 100)[4::5], 1e-6)
    numpyro.sample("C_hat", dist.LogNormal(jnp.log(solution), sigma), obs=d["C_hat"])


def lotka_volterra(d: Data) -> None:
    theta = flat("theta", constraints.positive, 4)
    loc, scale = jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05])
    numpyro.factor("theta_prior", dist.Normal(loc, scale).log_prob(theta).sum())
    z_init = numpyro.sample("z_init", dist.LogNormal(jnp.full(2, jnp.log(10.0)), 1.0))
    sigma = numpyro.sample("sigma", dist.LogNormal(-jnp.ones(2), 1.0))

    def slope(t: jax.Array, log_z: jax.Array) -> jax.Array:
        hare, lynx = jnp.exp(jnp.minimum(log_z, 10.0))
        return jnp.stack([theta[0] - theta[1] * lynx, -theta[2] + theta[3] * hare])

    log_z = runge_kutta(slope, jnp.log(z_init), 0.25, 80)[3::4]
    numpyro.sample("y_init", dist.LogNormal(jnp.log(z_init), sigma), obs=d["y_init"])
    numpyro.sample("y", dist.LogNormal(log_z, sigma), obs=d["y"])


# Model, and whether it runs in float64.
MODELS: dict[str, tuple[Callable[[Data], None], bool]] = {
    "eight_schools-eight_schools_noncentered": (eight_schools, False),
    "arK-arK": (autoregression, False),
    "garch-garch11": (garch, False),
    "gp_pois_regr-gp_pois_regr": (gp_pois_regr, True),
    "bball_drive_event_0-hmm_drive_0": (hmm_drive, True),
    "hmm_example-hmm_example": (hmm_example, False),
    "diamonds-diamonds": (diamonds, True),
    "nes1980-nes": (regression(nes_columns), True),
    "sblrc-blr": (blr, True),
    "mesquite-logmesquite_logvash": (regression(mesquite_columns), False),
    "kidiq-kidscore_interaction": (kidscore_interaction, True),
    "earnings-logearn_interaction": (regression(logearn_columns), True),
    "kilpisjarvi_mod-kilpisjarvi": (kilpisjarvi, True),
    "low_dim_gauss_mix-low_dim_gauss_mix": (gauss_mix, True),
    "one_comp_mm_elim_abs-one_comp_mm_elim_abs": (michaelis_menten, False),
    "hudson_lynx_hare-lotka_volterra": (lotka_volterra, False),
}


def nuts(folder: Path, name: str) -> dict[str, Any]:
    """Seconds, compilation included, and accuracy."""
    model, double = MODELS[name]
    jax.config.update("jax_enable_x64", double)
    ref = reference.load(folder, name)
    data = {k: np.array(v, np.float64 if double else np.float32) for k, v in ref.data.items()}
    chains = MCMC(
        NUTS(model),
        num_warmup=NUM_WARMUP,
        num_samples=NUM_DRAWS,
        num_chains=NUM_CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )

    def run() -> None:
        chains.run(jax.random.PRNGKey(0), data)
        jax.block_until_ready(chains.get_samples())

    seconds = timed(run)
    draws = {key: np.asarray(value) for key, value in chains.get_samples().items()}
    quantiles = ("K_m", "V_m") if model is michaelis_menten else ()
    divergences = int(chains.get_extra_fields()["diverging"].sum())
    found = accuracy(draws, ref.draws, quantiles)
    return {**seconds, "divergences": divergences, **vars(found)}


if __name__ == "__main__":
    main(nuts, MODELS, __doc__)
