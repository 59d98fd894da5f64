"""Models of series in time: autoregressions, hidden Markov models and differential equations.

Recurrences over hundreds of times are done in a logarithmic number of tensor operations where their algebra allows it.
"""

import math

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor

from benchmarks.posteriordb.regressions import POSITIVE, REAL_LINE, flat

LOTKA_VOLTERRA_STEP = 0.25  # years
LOG_MAX_PELTS = 10.0  # thousands; where an extreme draw would overflow
ELIMINATION_STEP = 0.1  # days
MIN_CONCENTRATION = 1e-6


def autoregression(lagged: Tensor, y: Tensor) -> None:
    """``lagged[:, k]`` holds the values k + 1 steps before those of ``y``."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([lagged.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = alpha[..., None] + beta @ lagged.T
    pyro.sample("y", dist.Normal(mean, sigma[..., None]).to_event(1), obs=y)


def autoregression_args(data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    y, order = data["y"], int(data["K"])
    return y.unfold(0, order, 1)[:-1].flip(-1), y[order:]


def garch(y: Tensor, sigma1: Tensor) -> None:
    mu = flat("mu", REAL_LINE)
    alpha0 = flat("alpha0", POSITIVE)
    # (alpha1, beta1) uniform on the triangle.
    alpha1 = pyro.sample("alpha1", dist.Beta(1.0, 2.0))
    share = pyro.sample("share", dist.Uniform(0.0, 1.0))
    beta1 = pyro.deterministic("beta1", (1 - alpha1) * share)
    first = (sigma1**2).expand((*mu.shape, 1))
    later = alpha0[..., None] + alpha1[..., None] * (y[:-1] - mu[..., None]) ** 2
    variance = linear_recurrence(beta1[..., None], torch.cat([first, later], -1))
    pyro.sample("y", dist.Normal(mu[..., None], variance.sqrt()).to_event(1), obs=y)


def linear_recurrence(a: Tensor, u: Tensor) -> Tensor:
    r"""``x_t = a x_{t-1} + u_t`` from ``x_0 = u_0``, by recursive doubling: after n rounds :math:`2^n` terms are in."""
    shift = 1
    while shift < u.shape[-1]:
        u = u + a * torch.nn.functional.pad(u[..., :-shift], (shift, 0))
        a, shift = a * a, 2 * shift
    return u


def hmm_example(y: Tensor) -> None:
    rows = [pyro.sample(name, dist.Dirichlet(torch.ones(2))) for name in ("theta1", "theta2")]
    mu = positive_ordered("mu", torch.tensor([3.0, 10.0]))
    emission = dist.Normal(mu[..., None], 1.0).log_prob(y)
    pyro.factor("y", hidden_markov_log_prob(torch.stack(rows, -2), emission))


def hmm_drive(alpha: Tensor, u: Tensor, v: Tensor) -> None:
    rows = [pyro.sample(name, dist.Dirichlet(row)) for name, row in zip(("theta1", "theta2"), alpha, strict=True)]
    phi = positive_ordered("phi", torch.tensor([0.0, 3.0]))
    rate = positive_ordered("lambda", torch.tensor([0.0, 3.0]))
    emission = dist.Exponential(phi[..., None]).log_prob(u) + dist.Exponential(rate[..., None]).log_prob(v)
    pyro.factor("uv", hidden_markov_log_prob(torch.stack(rows, -2), emission))


def positive_ordered(name: str, loc: Tensor) -> Tensor:
    """``0 < x_1 < ... < x_K``, where ``x_k ~ Normal(loc_k, 1)`` before the restriction."""
    x = pyro.sample(name, dist.ImproperUniform(constraints.positive_ordered_vector, (), loc.shape))
    pyro.factor(f"{name}_prior", dist.Normal(loc, 1.0).log_prob(x).sum(-1))
    return x


def hidden_markov_log_prob(transition: Tensor, emission: Tensor) -> Tensor:
    """Log-likelihood with the states summed out, all equally likely at first.

    The product of one K x K matrix a step is taken in pairs, a tree of depth log2(N).

    Args:
        transition: ``(..., K, K)``, from the state of a row to that of a column.
        emission: log-densities ``(..., K, N)`` of the observations in each state.
    """
    # Time is the last dimension, in which the operations are fast.
    steps = transition.log()[..., None] + emission[..., None, :, 1:]
    while (length := steps.shape[-1]) > 1:
        left, right = steps[..., : length - 1 : 2], steps[..., 1::2]
        product = torch.logsumexp(left.unsqueeze(-2) + right.unsqueeze(-4), -3)
        steps = torch.cat([product, steps[..., -1:]], -1) if length % 2 else product
    initial = emission[..., 0] - math.log(emission.shape[-2])
    return torch.logsumexp(initial[..., None] + steps[..., 0], (-2, -1))


def michaelis_menten(times: Tensor, dose: Tensor, volume: Tensor, concentration: Tensor) -> None:
    k_a, k_m, v_m, sigma = (pyro.sample(name, dist.HalfCauchy(1.0)) for name in ("k_a", "K_m", "V_m", "sigma"))
    solution = eliminated(times, dose / volume, k_a, k_m, v_m / volume)
    pyro.sample("C_hat", dist.LogNormal(solution.log(), sigma[..., None]).to_event(1), obs=concentration)


def eliminated(times: Tensor, dose: Tensor, k_a: Tensor, k_m: Tensor, v_m: Tensor) -> Tensor:
    r"""Concentrations ``(..., N)`` at evenly spaced times, from 0 at time 0, by Runge-Kutta 4.

    The state is :math:`s = C + K_m`, with :math:`ds/dt = D k_a e^{-k_a t} - V_m + V_m K_m / s`.
    """
    h = ELIMINATION_STEP
    num_steps, every = round(times[-1].item() / h), round(times[0].item() / h)
    half_steps = torch.arange(2 * num_steps + 1) * (h / 2)
    absorbed = (dose * k_a)[..., None] * torch.exp(-k_a[..., None] * half_steps)
    constant = (h * (absorbed - v_m[..., None])).unbind(-1)
    product = h * v_m * k_m
    s, found = k_m, []

    def slope(half_step: int, s: Tensor) -> Tensor:
        # A step too long for the stiff start under a tiny K_m may overshoot; elimination never exceeds V_m, nor is
        # it ever negative.
        return torch.addcdiv(constant[half_step], product, torch.maximum(s, k_m))

    for step in range(num_steps):
        k1 = slope(2 * step, s)
        k2 = slope(2 * step + 1, torch.add(s, k1, alpha=0.5))
        k3 = slope(2 * step + 1, torch.add(s, k2, alpha=0.5))
        k4 = slope(2 * step + 2, s + k3)
        s = torch.add(s, torch.add(k1 + k4, k2 + k3, alpha=2), alpha=1 / 6)
        if (step + 1) % every == 0:
            found.append(s)
    return (torch.stack(found, -1) - k_m[..., None]).clamp(min=MIN_CONCENTRATION)


def lotka_volterra(times: Tensor, y_init: Tensor, y: Tensor) -> None:
    theta = flat("theta", POSITIVE, 4)
    loc, scale = torch.tensor([1.0, 0.05, 1.0, 0.05]), torch.tensor([0.5, 0.05, 0.5, 0.05])
    pyro.factor("theta_prior", dist.Normal(loc, scale).log_prob(theta).sum(-1))
    z_init = pyro.sample("z_init", dist.LogNormal(math.log(10.0), 1.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))
    log_z = log_populations(times, theta, z_init.log())
    pyro.sample("y_init", dist.LogNormal(z_init.log(), sigma).to_event(1), obs=y_init)
    pyro.sample("y", dist.LogNormal(log_z, sigma[..., None, :]).to_event(2), obs=y)


def log_populations(times: Tensor, theta: Tensor, log_z: Tensor) -> Tensor:
    r"""``(..., N, 2)`` at the times 1 to N, by Runge-Kutta 4 in the logarithms, whose slopes are
    :math:`(\theta_1 - \theta_2 z_2, -\theta_3 + \theta_4 z_1)`."""
    h = LOTKA_VOLTERRA_STEP
    every = round(1 / h)
    constant = h * torch.stack([theta[..., 0], -theta[..., 2]], -1)
    interaction = h * torch.stack([-theta[..., 1], theta[..., 3]], -1)
    found = []

    def slope(log_z: Tensor) -> Tensor:
        return torch.addcmul(constant, interaction, log_z.flip(-1).clamp(max=LOG_MAX_PELTS).exp())

    for step in range(len(times) * every):
        k1 = slope(log_z)
        k2 = slope(torch.add(log_z, k1, alpha=0.5))
        k3 = slope(torch.add(log_z, k2, alpha=0.5))
        k4 = slope(log_z + k3)
        log_z = torch.add(log_z, torch.add(k1 + k4, k2 + k3, alpha=2), alpha=1 / 6)
        if (step + 1) % every == 0:
            found.append(log_z)
    return torch.stack(found, -2)
