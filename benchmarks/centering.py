"""Hierarchies written centred and non-centred: what a fit with default settings finds, and what it costs.

    python -m benchmarks.centering [names...] [--seeds 0 1 2 3 4]

A row of the table is a fit: c, the mean centredness that it has learned; steps, seconds of the processor with the
verdict, the verdict, the effective sample size as a share of the draws, the variance of the log weights, and the
largest errors of 100,000 draws, in standard deviations: of means, and of sds. They are against the truth for the
funnel, whose sites are v and x / exp(v / 2), and against ten chains of 1000 draws of posteriordb for eight schools.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

import pyroflows as pf
from pyroflows.guides.centering import centerings

NUM_DRAWS = 100_000
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
# mu, tau and theta in the reference draws of eight_schools-eight_schools_noncentered of posteriordb.
MEANS = torch.tensor([4.4105, 3.6021, 6.1505, 4.9396, 3.9059, 4.7960, 3.6144, 4.0511, 6.3172, 4.8840])
SDS = torch.tensor([3.3093, 3.1985, 5.6159, 4.6456, 5.2807, 4.7709, 4.6147, 4.7962, 5.0029, 5.3177])

Model = Callable[..., None]


def schools() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, SIGMA), obs=Y)


def schools_non_centred() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.deterministic("theta", mu + tau * pyro.sample("e", dist.Normal(0.0, 1.0)))
        pyro.sample("y", dist.Normal(theta, SIGMA), obs=Y)


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("component", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def counties(num_counties: int, num_rows: int) -> Model:
    """Varying intercepts and slopes of simulated rows."""
    generator = torch.Generator().manual_seed(5)
    county = torch.randint(num_counties, (num_rows,), generator=generator)
    floor = torch.randint(2, (num_rows,), generator=generator).float()
    a, b = torch.tensor([[1.3], [-0.6]]) + torch.tensor([[0.35], [0.25]]) * torch.randn(
        2, num_counties, generator=generator
    )
    y = a[county] + b[county] * floor + 0.7 * torch.randn(num_rows, generator=generator)

    def model() -> None:
        mu_a, mu_b = (pyro.sample(name, dist.Normal(0.0, 2.0)) for name in ("mu_a", "mu_b"))
        s_a, s_b = (pyro.sample(name, dist.HalfNormal(1.0)) for name in ("s_a", "s_b"))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("county", num_counties):
            a, b = pyro.sample("a", dist.Normal(mu_a, s_a)), pyro.sample("b", dist.Normal(mu_b, s_b))
        with pyro.plate("row", num_rows):
            pyro.sample("y", dist.Normal(a[county] + b[county] * floor, sigma), obs=y)

    return model


MODELS: dict[str, Model] = {
    "schools": schools,
    "schools_non_centred": schools_non_centred,
    "funnel": funnel,
    "counties_of_5_rows": counties(20, 100),
    "counties_of_100_rows": counties(20, 2000),
}


def errors(name: str, posterior: pf.Posterior) -> tuple[float, float] | None:
    """The largest errors of means and sds, in sds; None where there is nothing to compare with."""
    draws = posterior.sample(NUM_DRAWS, seed=1)
    if name.startswith("schools"):
        found = torch.cat([draws["mu"][:, None], draws["tau"][:, None], draws["theta"]], -1)
        return _largest(found, MEANS, SDS)
    if name == "funnel":
        found = torch.cat([draws["v"][:, None], draws["x"] / (draws["v"] / 2).exp()[:, None]], -1)
        return _largest(found, torch.zeros(10), torch.tensor([3.0] + [1.0] * 9))
    return None


def _largest(draws: Tensor, means: Tensor, sds: Tensor) -> tuple[float, float]:
    return ((draws.mean(0) - means) / sds).abs().max().item(), (draws.std(0) / sds - 1).abs().max().item()


def row(name: str, seed: int) -> str:
    """A row of the Markdown table."""
    start = time.process_time()
    posterior = pf.FlowVI(MODELS[name], seed=seed, progress_bar=False).run()
    diagnosis = posterior.diagnose()
    seconds = time.process_time() - start
    assert posterior.guide.flow is not None
    c = [layer.centredness[layer.changed].mean().item() for layer in centerings(posterior.guide.flow)]
    largest = errors(name, posterior)
    cells: list[Any] = [
        *(name, seed, f"{c[0]:.2f}" if c else "", posterior.history.num_steps, f"{seconds:.1f}", diagnosis.verdict),
        f"{posterior.importance_sample(10_000, seed=1).ess / 10_000:.3f}",
        f"{diagnosis.log_weight_variance:.4f}",
        ", ".join(f"{error:.3f}" for error in largest) if largest else "",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="names", help="all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    options = parser.parse_args()
    torch.set_num_threads(1)
    pf.FlowVI(funnel, seed=0, progress_bar=False).run().diagnose()  # loads what is loaded late
    print("| model | seed | c | steps | s | verdict | ESS | variance | errors |\n|" + "---|" * 9, flush=True)
    for name in options.names:
        for seed in options.seeds:
            print(row(name, seed), flush=True)


if __name__ == "__main__":
    main()
