"""Weighted draws by pf.importance_sample beside Pyro's two ways to them, on eight schools with a trained AutoNormal.

Pyro's ``vectorized_importance_weights`` runs model and guide once under a plate and gives raw log weights, nothing
more; ``Importance`` runs them once a draw, so its time is that of a few draws, multiplied. ``pf.importance_sample``
verifies its way of running, and smooths the weights. All run in turn in one process.

    python -m benchmarks.importance_speed --rounds 7 --draws 100000 --threads 1
"""

import argparse
import platform
import statistics
import time
import warnings

import pyro
import torch
from pyro import distributions as dist
from pyro.infer import SVI, Importance, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.importance import vectorized_importance_weights

import pyroflows as pf

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
FEW = 500
OURS = "pf.importance_sample"


def model(sigma: torch.Tensor, y: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def trained(guide):
    elbo = Trace_ELBO(num_particles=16, max_plate_nesting=1, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    for _ in range(1000):
        svi.step(SIGMA, Y)
    return guide


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def contenders(guide, num_draws: int) -> dict:
    def vectorized() -> None:
        with torch.no_grad():
            vectorized_importance_weights(model, guide, SIGMA, Y, num_samples=num_draws, max_plate_nesting=1)

    def one_by_one() -> None:
        with torch.no_grad():
            Importance(model, guide, num_samples=FEW).run(SIGMA, Y)

    def ours() -> None:
        pf.importance_sample(model, guide, SIGMA, Y, num_samples=num_draws, progress_bar=False)

    return {
        OURS: lambda: seconds(ours),
        "vectorized_importance_weights": lambda: seconds(vectorized),
        "Importance, extrapolated": lambda: seconds(one_by_one) * num_draws / FEW,
    }


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    pyro.set_rng_seed(0)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, pyro {pyro.__version__}")
    print(f"{args.threads} thread(s), {args.draws} draws, {args.rounds} rounds in turn")
    for make in (AutoNormal, AutoMultivariateNormal):
        runs = contenders(trained(make(model)), args.draws)
        times = {name: [] for name in runs}
        for run in runs.values():
            run()
        for _ in range(args.rounds):
            for name, run in runs.items():
                times[name].append(run())
        print(f"\n{make.__name__:32}{'seconds':>10}{'of ours':>10}   (medians; ratio from the pairs of each round)")
        for name, values in times.items():
            ratio = statistics.median(v / ours for v, ours in zip(values, times[OURS], strict=True))
            print(f"{name:32}{statistics.median(values):10.3f}{ratio:10.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--draws", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=1)
    warnings.filterwarnings("ignore", category=UserWarning, module="pyro")
    main(parser.parse_args())
