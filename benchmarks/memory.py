"""Measure by how much the resident memory of a process grows from its tenth call to its last.

A model and a flow are made afresh for each call, as by a cell of a notebook that is run again, and sizes differ from
call to call. Each kind of call needs a process of its own. The figures come from ``/proc``, which only Linux has.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import distributions as dist

import pyroflows as pf

NUM_FIRST = 10
QUIET = {"seed": 0, "progress_bar": False}
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SCALES = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def make_eight_schools(num: int) -> Callable[..., None]:
    """Make a new model of the first few schools, whose number is 5 to 8."""
    effects, scales = EFFECTS[: 5 + num % 4].clone(), SCALES[: 5 + num % 4].clone()

    def eight_schools() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(effects)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, scales), obs=effects)

    return eight_schools


def fit(num: int) -> pf.Posterior:
    """Fit eight schools."""
    return pf.FlowVI(make_eight_schools(num), num_steps=60, num_starts=2, **QUIET).run()


def rows(num: int) -> torch.Tensor:
    """Draw a new data set."""
    return torch.randn(200 + 10 * (num % 4), 2 + num % 3)


def distill(num: int) -> None:
    """Distill a new flow into a new one."""
    dim = 2 + num % 3
    teacher, student = pf.flows.MAF(dim, num_layers=2), pf.flows.IAF(dim, num_layers=2)
    pf.distill(student, teacher, num_steps=40, warm_start=20, **QUIET)


def fit_density(num: int) -> None:
    """Fit a density; "trace" records a program however short the fit."""
    x = rows(num)
    pf.fit_density(pf.flows.NSF(x.shape[1], num_layers=2), x, max_epochs=4, compile="trace", **QUIET)


def fit_flow_matching(num: int) -> None:
    """Fit a continuous flow."""
    x = rows(num)
    pf.fit_flow_matching(pf.flows.CNF(x.shape[1], hidden_dims=(16,)), x, max_epochs=4, **QUIET)


def fit_amortized(num: int) -> None:
    """Fit an amortised posterior, and judge it at one value of the data."""

    def model(y: Any = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2 + num % 3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    amortized = pf.fit_amortized(model, num_simulations=200, num_flows=1, max_epochs=2, **QUIET)
    amortized.posterior(torch.zeros(2 + num % 3)).diagnose()


def importance_sample(num: int) -> None:
    """Weight draws of a new guide of Pyro's, whose parameters stay in Pyro's store."""
    pyro.clear_param_store()
    model = make_eight_schools(num)
    pf.importance_sample(model, pyro.infer.autoguide.AutoNormal(model), num_samples=2000, progress_bar=False)


CALLS: dict[str, Callable[[int], Any]] = {
    "fit": fit,
    "diagnose": lambda num: fit(num).diagnose(),
    "mcmc": lambda num: fit(num).mcmc(20, num_chains=16, num_warmup=20, **QUIET),
    "independence": lambda num: fit(num).mcmc(20, num_chains=16, num_warmup=20, method="independence", **QUIET),
    "nuts": lambda num: fit(num).mcmc(4, num_chains=1, num_warmup=4, method="nuts", **QUIET),
    "to_arviz": lambda num: fit(num).to_arviz(100),
    "posterior.distill": lambda num: fit(num).distill(num_steps=20, warm_start=10, **QUIET),
    "distill": distill,
    "fit_density": fit_density,
    "fit_flow_matching": fit_flow_matching,
    "fit_amortized": fit_amortized,
    "importance_sample": importance_sample,
}


def resident_megabytes() -> float:
    """Return the resident memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def growth(call: Callable[[int], Any], num_calls: int) -> float:
    """Return by how many MB the resident memory grows from the tenth call to the last."""
    for num in range(NUM_FIRST):
        call(num)
    before = resident_megabytes()
    for num in range(num_calls - NUM_FIRST):
        call(num)
    return resident_megabytes() - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("call", choices=CALLS)
    parser.add_argument("--num-calls", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    grown = growth(CALLS[options.call], options.num_calls)
    print(f"{options.call}: {grown:+.1f} MB over {options.num_calls} calls, {time.perf_counter() - begin:.0f} s")
