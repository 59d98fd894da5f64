"""Structured guides beside Pyro's own on a hierarchy whose posterior is a known Gaussian, from minibatches of groups.

    mu ~ N(0, 1), beta ~ N(0, 1); theta_i ~ N(mu, 1); y_ij ~ N(theta_i + beta x_ij, 0.5^2)

Columns are the largest errors of means (in posterior sd), of sds (relative), and of the correlations between globals
and locals, over all latents; and the gap from the log evidence to the ELBO with all rows, in nats.

    python -m benchmarks.hierarchical_gaussian [--groups 100] [--batch 20] [--steps 4000] [--guides FlowVI AutoNormal]
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGaussian, AutoNormal, AutoStructured
from torch import Tensor

import pyroflows as pf
from pyroflows.models.all_rows import WithAllRows

PER_GROUP, NOISE = 5, 0.5
NUM_DRAWS = 20_000


def simulate(num_groups: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_groups, PER_GROUP, generator=generator)
    theta = 0.7 + torch.randn(num_groups, 1, generator=generator)
    return x, theta - 0.4 * x + NOISE * torch.randn(num_groups, PER_GROUP, generator=generator)


def model(x: Tensor, y: Tensor, batch: int | None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", len(x), subsample_size=batch) as groups:
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        mean = theta[..., None] + beta[..., None] * x[groups]
        pyro.sample("y", dist.Normal(mean, NOISE).to_event(1), obs=y[groups])


def exact(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and covariance of (mu, beta, theta), and the log evidence."""
    n = len(x)
    prior = torch.zeros(n + 2, n + 2).double()
    prior[0, 0], prior[1, 1], prior[2:, 2:] = 1.0, 1.0, torch.ones(n, n) + torch.eye(n)
    prior[0, 2:] = prior[2:, 0] = 1.0
    design = torch.zeros(n * PER_GROUP, n + 2).double()
    design[:, 1] = x.flatten()
    design[torch.arange(n * PER_GROUP), 2 + torch.arange(n).repeat_interleave(PER_GROUP)] = 1.0
    of_y = design @ prior @ design.T + NOISE**2 * torch.eye(n * PER_GROUP).double()
    gain = torch.linalg.solve(of_y, design @ prior).T
    target = y.double().flatten()
    law = torch.distributions.MultivariateNormal(torch.zeros_like(target), of_y)
    return gain @ target, prior - gain @ design @ prior, law.log_prob(target).item()


def draws_of(sites: dict[str, Tensor]) -> Tensor:
    return torch.cat([sites["mu"].reshape(-1, 1), sites["beta"].reshape(-1, 1), sites["theta"].flatten(1)], -1).double()


def by_flow(encoder: Any) -> Callable[..., tuple[Tensor, float]]:
    def fit(x: Tensor, y: Tensor, batch: int, steps: int | None) -> tuple[Tensor, float]:
        guide = pf.guides.AutoStructuredFlow(model, encoder=encoder)
        posterior = pf.FlowVI(model, guide, num_steps=steps, seed=0, progress_bar=False).run(x, y, batch)
        return draws_of(posterior.sample(NUM_DRAWS, seed=1)), posterior.elbo

    return fit


def by_pyro(make: Callable[..., Any]) -> Callable[..., tuple[Tensor, float]]:
    def fit(x: Tensor, y: Tensor, batch: int, steps: int | None) -> tuple[Tensor, float]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = make(model)
        num_steps = steps or 4000
        optim = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.01 ** (1 / num_steps)})
        svi = SVI(model, guide, optim, Trace_ELBO())
        for _ in range(num_steps):
            svi.step(x, y, batch)
        whole = WithAllRows(model)
        with torch.no_grad():
            elbo = -sum(Trace_ELBO().loss(whole, WithAllRows(guide), x, y, batch) for _ in range(500)) / 500
            sites = [WithAllRows(guide)(x, y, batch) for _ in range(2000)]
        return draws_of({name: torch.stack([s[name] for s in sites]) for name in ("mu", "beta", "theta")}), elbo

    return fit


GUIDES: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "FlowVI, learned rows": by_flow(None),
    "FlowVI, encoder": by_flow(lambda rows, x, y, batch: torch.cat([x[rows], y[rows]], -1)),
    "AutoNormal": by_pyro(AutoNormal),
    "AutoStructured": by_pyro(AutoStructured),
    "AutoGaussian": by_pyro(AutoGaussian),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=100)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--guides", nargs="*", default=list(GUIDES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = simulate(options.groups)
    mean, covariance, log_evidence = exact(x, y)
    sd = covariance.diagonal().sqrt()
    correlation = covariance / sd[:, None] / sd
    print("| guide | seconds | mean | sd | correlation | gap |")
    print("|---|---|---|---|---|---|")
    for name in options.guides:
        start = time.process_time()
        try:
            draws, elbo = GUIDES[name](x, y, options.batch, options.steps)
        except Exception as error:  # a guide that does not run here is a result
            print(f"| {name} | fails: {type(error).__name__}: {str(error).splitlines()[0][:80]} |")
            continue
        seconds = time.process_time() - start
        found_sd = draws.std(0)
        found = torch.corrcoef(draws.T)
        errors = (
            ((draws.mean(0) - mean) / sd).abs().max().item(),
            (found_sd / sd - 1).abs().max().item(),
            (found - correlation)[:2, 2:].abs().max().item(),
        )
        figures = " | ".join(f"{figure:.3f}" for figure in (*errors, log_evidence - elbo))
        print(f"| {name} | {seconds:.0f} | {figures} |")


if __name__ == "__main__":
    main()
