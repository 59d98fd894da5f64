"""Log evidence against its exact value, on conjugate models, by importance sampling and by bridge sampling.

Models: a Gaussian mean, mu ~ N(0, 10^2), 20 values y ~ N(mu, 1); and linear regression, five weights ~ N(0, 1), 50
values y ~ N(x.w, 0.5^2). Each seed makes data and a fit. An estimate counts as right within 3 of its own standard
errors, or 1e-4 where that is more. Closed forms are checked first: by quadrature, and by the dense density of y.

    python -m benchmarks.evidence --seeds 20 --methods importance bridge
"""

import argparse
import math
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

import pyroflows as pf

NUM_BRIDGE_DRAWS = 10_000
MAX_Z = 3.0
FLOOR = 1e-4
LOG_2PI = math.log(2 * math.pi)
PRIOR_SD = 10.0
NOISE = 0.5


def mean_model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, PRIOR_SD))
    with pyro.plate("N", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def mean_data() -> tuple[Tensor, ...]:
    return (PRIOR_SD * torch.randn(()) + torch.randn(20),)


def mean_evidence(y: Tensor) -> float:
    """The quadratic in mu, completed."""
    y = y.double()
    precision = len(y) + PRIOR_SD**-2
    exponent = (y**2).sum() - y.sum() ** 2 / precision
    return (-0.5 * (len(y) * LOG_2PI + math.log(PRIOR_SD**2 * precision) + exponent)).item()


def mean_evidence_by_quadrature(y: Tensor) -> float:
    """Trapezoidal rule over mu."""
    grid = torch.linspace(-60, 60, 120_001, dtype=torch.float64)
    prior = dist.Normal(grid.new_zeros(()), PRIOR_SD).log_prob(grid)
    likelihood = dist.Normal(grid[:, None], 1.0).log_prob(y.double()).sum(-1)
    return (torch.logsumexp(prior + likelihood, 0) + math.log(1e-3)).item()


def regression_model(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    with pyro.plate("N", len(x)):
        pyro.sample("y", dist.Normal((x * w[..., None, :]).sum(-1), NOISE), obs=y)


def regression_data() -> tuple[Tensor, ...]:
    x = torch.randn(50, 5)
    x[:, 1] += 2 * x[:, 0]
    return x, x @ torch.randn(5) + NOISE * torch.randn(50)


def regression_evidence(x: Tensor, y: Tensor) -> float:
    r"""With precision :math:`P = I + X^T X / s^2` and mean :math:`m = P^{-1} X^T y / s^2` of the posterior,
    :math:`-\frac12 (n \log 2 \pi s^2 + \log|P| + y^T y / s^2 - m^T P m)`.
    """
    x, y = x.double() / NOISE, y.double() / NOISE
    precision = torch.eye(x.shape[-1]) + x.T @ x
    mean = torch.linalg.solve(precision, x.T @ y)
    exponent = y @ y - mean @ precision @ mean
    return (-0.5 * (len(y) * (LOG_2PI + math.log(NOISE**2)) + torch.logdet(precision) + exponent)).item()


def regression_evidence_by_dense_density(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    covariance = NOISE**2 * torch.eye(len(y)) + x @ x.T
    return dist.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y).item()


@dataclass(frozen=True)
class Conjugate:
    """A model, data for it, and its log evidence in two ways."""

    model: Callable[..., None]
    data: Callable[[], tuple[Tensor, ...]]
    log_evidence: Callable[..., float]
    check: Callable[..., float]


MODELS = {
    "Gaussian mean": Conjugate(mean_model, mean_data, mean_evidence, mean_evidence_by_quadrature),
    "linear regression": Conjugate(
        regression_model, regression_data, regression_evidence, regression_evidence_by_dense_density
    ),
}
METHODS: dict[str, Callable[[pf.Posterior], tuple[float, float]]] = {
    "importance": lambda posterior: (posterior.log_evidence, posterior.log_evidence_se),
    "bridge": lambda posterior: _of_bridge(posterior.bridge_sample(NUM_BRIDGE_DRAWS)),
}


def _of_bridge(bridge) -> tuple[float, float]:
    return bridge.log_evidence, bridge.log_evidence_se


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {args.seeds} seeds\n")
    print("| model | method | right | median error | largest error | median standard error | largest error / se |")
    print("|---|---|---|---|---|---|---|")
    for name, conjugate in MODELS.items():
        errors: dict[str, list[tuple[float, float]]] = {method: [] for method in args.methods}
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            data = conjugate.data()
            exact = conjugate.log_evidence(*data)
            assert math.isclose(exact, conjugate.check(*data), rel_tol=1e-9), (exact, conjugate.check(*data))
            posterior = pf.FlowVI(conjugate.model, seed=seed, progress_bar=False).run(*data)
            for method in args.methods:
                estimate, se = METHODS[method](posterior)
                errors[method].append((abs(estimate - exact), se))
        for method, pairs in errors.items():
            num_right = sum(error <= max(MAX_Z * se, FLOOR) for error, se in pairs)
            sizes, ses = zip(*pairs, strict=True)
            worst = max(error / se for error, se in pairs)
            print(
                f"| {name} | {method} | {num_right} of {len(pairs)} | {statistics.median(sizes):.1e} "
                f"| {max(sizes):.1e} | {statistics.median(ses):.1e} | {worst:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())
