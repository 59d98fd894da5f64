"""One training step of FlowVI, traced, compiled and eager, beside one of Pyro's SVI with AutoIAFNormal.

All: eight schools, affine IAF of 4 layers with hidden widths (64, 64), 64 particles at once, Adam. They run in turn in
one process. Steps of FlowVI are told apart by its optimizer, which notes the time at each call; so a step holds
everything that the training loop does, and what comes before the first one, tracing and compilation among it, is told
on its own.

    python -m benchmarks.step_time --rounds 7 --compile auto none --estimators total path
"""

import argparse
import logging
import platform
import statistics
import time
import warnings
from functools import partial
from itertools import product

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
PYRO = "Pyro SVI, AutoIAFNormal"
MODES = ["auto", "trace", "inductor", "none"]


def model(sigma: torch.Tensor, y: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


class ClockedAdam(torch.optim.Adam):
    """Notes when it is called."""

    def __init__(self, parameters, times: list[float]) -> None:
        super().__init__(parameters, lr=1e-3, fused=True)
        self.times = times

    def step(self, closure=None):
        self.times.append(time.perf_counter())
        return super().step(closure)


def flow_vi(num_steps: int, mode: str, estimator: str) -> tuple[float, float]:
    """Seconds a step, and seconds before the first step."""
    times: list[float] = []
    vi = pf.FlowVI(
        model,
        lambda dim: pf.flows.IAF(dim, num_layers=4, hidden_dims=HIDDEN_DIMS),
        num_steps=num_steps,
        num_particles=NUM_PARTICLES,
        estimator=estimator,
        optimizer=lambda parameters: ClockedAdam(parameters, times),
        seed=0,
        progress_bar=False,
        compile=mode,
    )
    start = time.perf_counter()
    vi.run(SIGMA, Y)
    first = -(num_steps // 2) - 1
    return (times[-1] - times[first]) / (num_steps // 2), times[0] - start


def pyro_svi() -> SVI:
    guide = AutoIAFNormal(model, hidden_dim=list(HIDDEN_DIMS), num_transforms=4)
    elbo = Trace_ELBO(num_particles=NUM_PARTICLES, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    svi.step(SIGMA, Y)
    return svi


def svi_step(svi: SVI, num_steps: int) -> tuple[float, float]:
    start = time.perf_counter()
    for _ in range(num_steps):
        svi.step(SIGMA, Y)
    return (time.perf_counter() - start) / num_steps, 0.0


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    logging.getLogger().setLevel(logging.ERROR)
    contenders = {PYRO: partial(svi_step, pyro_svi(), args.steps)}
    for mode, estimator in product(args.compile, args.estimators):
        contenders[f"FlowVI, compile={mode}, {estimator} gradient"] = partial(flow_vi, args.steps, mode, estimator)
    found = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, run in contenders.items():
            found[name].append(run())
    print(f"Python {platform.python_version()}, torch {torch.__version__}, pyro {pyro.__version__};")
    print(f"{args.threads} thread(s), {args.rounds} rounds of {args.steps} steps, in turn; medians, the speed-up from")
    print("the pairs of each round\n")
    print("| | ms a step | speed-up | s before the first step |\n|---|---|---|---|")
    for name, rounds in found.items():
        steps, waits = zip(*rounds, strict=True)
        speed_up = statistics.median(pyro / ours for (pyro, _), ours in zip(found[PYRO], steps, strict=True))
        wait = f"{statistics.median(waits):.1f}" if name != PYRO else ""
        print(f"| {name} | {statistics.median(steps) * 1e3:.2f} | {speed_up:.2f} | {wait} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", nargs="+", choices=MODES, default=["auto", "none"], help="of FlowVI")
    parser.add_argument("--estimators", nargs="+", default=["total", "path"], help="of FlowVI")
    warnings.filterwarnings("ignore", category=UserWarning, module="pyro")
    main(parser.parse_args())
