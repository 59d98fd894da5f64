"""One training step of FlowVI beside one of Pyro's SVI with AutoIAFNormal, on eight schools.

Both: affine IAF of 4 layers with hidden widths (64, 64), 64 particles at once, Adam. The two run in turn in one
process; a step of FlowVI is the difference of a longer and a shorter fit, so it holds everything that its training
loop does.

    python tests/benchmarks/step_time.py --rounds 7 --threads 1
"""

import argparse
import logging
import platform
import statistics
import time
import warnings

import pyro
import torch
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal

import pyroflows as pf

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
NUM_PARTICLES = 64
HIDDEN_DIMS = (64, 64)


def model(sigma: torch.Tensor, y: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def seconds(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def fit(num_steps: int, estimator: str) -> None:
    vi = pf.FlowVI(
        model,
        lambda dim: pf.flows.IAF(dim, num_layers=4, hidden_dims=HIDDEN_DIMS),
        num_steps=num_steps,
        num_particles=NUM_PARTICLES,
        estimator=estimator,
        seed=0,
        progress_bar=False,
    )
    vi.run(SIGMA, Y)


def flow_vi_step(num_steps: int, estimator: str) -> float:
    short = num_steps // 5
    return (seconds(fit, num_steps + short, estimator) - seconds(fit, short, estimator)) / num_steps


def pyro_svi() -> SVI:
    guide = AutoIAFNormal(model, hidden_dim=list(HIDDEN_DIMS), num_transforms=4)
    elbo = Trace_ELBO(num_particles=NUM_PARTICLES, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    svi.step(SIGMA, Y)
    return svi


def svi_step(svi: SVI, num_steps: int) -> float:
    def run() -> None:
        for _ in range(num_steps):
            svi.step(SIGMA, Y)

    return seconds(run) / num_steps


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    logging.getLogger().setLevel(logging.ERROR)
    svi = pyro_svi()
    contenders = {
        "Pyro SVI, AutoIAFNormal": lambda: svi_step(svi, args.steps),
        "FlowVI, total gradient": lambda: flow_vi_step(args.steps, "total"),
        "FlowVI, path gradient": lambda: flow_vi_step(args.steps, "path"),
    }
    times = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, run in contenders.items():
            times[name].append(run())
    baseline = times["Pyro SVI, AutoIAFNormal"]
    print(f"Python {platform.python_version()}, torch {torch.__version__}, pyro {pyro.__version__}")
    print(f"{args.threads} thread(s), {args.rounds} rounds of {args.steps} steps, in turn\n")
    print(f"{'':26}{'ms a step':>10}{'speed-up':>10}   (medians; speed-up from the pairs of each round)")
    for name, values in times.items():
        ratio = statistics.median(b / v for b, v in zip(baseline, values, strict=True))
        print(f"{name:26}{statistics.median(values) * 1e3:10.2f}{ratio:10.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    warnings.filterwarnings("ignore", category=UserWarning, module="pyro")
    main(parser.parse_args())
