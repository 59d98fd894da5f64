"""Amortised posteriors of five simulators, by the classifier two-sample test of the public benchmark sbibm.

The simulators are Pyro models, written after Lueckmann et al. 2021, arXiv:2101.04653. Of each, one fit to draws from
its prior predictive gives posteriors of five observations, whose draws a classifier of sbibm has to tell from reference
draws: an accuracy of 0.5 says that it cannot. "corrected" are draws that importance weights of the model's likelihood
have resampled.

    pip install --no-deps --target FOLDER sbibm
    python -m benchmarks.simulators --sbibm FOLDER --seeds 0

Needs the files of sbibm 1.1.0 and scikit-learn beside the project's own requirements.
"""

import argparse
import importlib.util
import math
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyro
import torch
from pyro import distributions as dist
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.nn.functional import softplus

import pyroflows as pf

Model = Callable[[], None]


class Moon(TorchDistribution):
    """A half circle of radius about 0.1, at a place where two parameters put it: x = f(theta) + r (cos a, sin a).

    The radius r is normal, the angle a is uniform from -pi/2 to pi/2. Two thetas, of opposite sign in the first
    coordinate of f, give the same place.
    """

    arg_constraints: ClassVar = {"theta": constraints.real_vector}
    support = constraints.real_vector

    def __init__(self, theta: Tensor) -> None:
        self.theta = theta
        self.radius = dist.Normal(theta.new_tensor(0.1), theta.new_tensor(0.01))
        super().__init__(theta.shape[:-1], theta.shape[-1:], validate_args=False)

    @property
    def place(self) -> Tensor:
        first, second = self.theta.unbind(-1)
        return torch.stack([0.25 - (first + second).abs() / math.sqrt(2), (second - first) / math.sqrt(2)], -1)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "Moon":
        return Moon(self.theta.expand(*batch_shape, 2))

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        with torch.no_grad():
            place = self.place.expand(*sample_shape, *self.theta.shape)
            radius = self.radius.sample(place.shape[:-1])
            angle = math.pi * (torch.rand_like(radius) - 0.5)
            return place + radius[..., None] * torch.stack([angle.cos(), angle.sin()], -1)

    def log_prob(self, x: Tensor) -> Tensor:
        offset = x - self.place
        radius = offset.norm(dim=-1).clamp(min=1e-6)
        density = self.radius.log_prob(radius) - radius.log() - math.log(math.pi)
        return torch.where(offset[..., 0] >= 0, density, -math.inf)


class SpikeStatistics(TorchDistribution):
    """The sufficient statistics x = D'y of a logistic regression, y_i ~ Bernoulli(sigmoid(D_i . theta)).

    Their log-density is known up to a term that does not depend on theta, the logarithm of the number of y with equal
    statistics, which is left out here: log-evidences lack it, posteriors do not need it.
    """

    arg_constraints: ClassVar = {"theta": constraints.real_vector}
    support = constraints.real_vector

    def __init__(self, theta: Tensor, design: Tensor) -> None:
        self.theta, self.design = theta, design
        super().__init__(theta.shape[:-1], theta.shape[-1:], validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "SpikeStatistics":
        return SpikeStatistics(self.theta.expand(*batch_shape, self.theta.shape[-1]), self.design)

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        with torch.no_grad():
            logits = (self.theta @ self.design.mT).expand(*sample_shape, *self.batch_shape, len(self.design))
            return dist.Bernoulli(logits=logits).sample() @ self.design

    def log_prob(self, x: Tensor) -> Tensor:
        return (x * self.theta).sum(-1) - softplus(self.theta @ self.design.mT).sum(-1)


def two_moons() -> None:
    theta = pyro.sample("theta", dist.Uniform(-torch.ones(2), torch.ones(2)).to_event(1))
    pyro.sample("x", Moon(theta))


def gaussian_linear() -> None:
    theta = pyro.sample("theta", dist.Normal(torch.zeros(10), math.sqrt(0.1)).to_event(1))
    pyro.sample("x", dist.Normal(theta, math.sqrt(0.1)).to_event(1))


def gaussian_linear_uniform() -> None:
    theta = pyro.sample("theta", dist.Uniform(-torch.ones(10), torch.ones(10)).to_event(1))
    pyro.sample("x", dist.Normal(theta, math.sqrt(0.1)).to_event(1))


def bernoulli_glm(design: Tensor) -> Model:
    """An offset and a filter of nine lags, smooth in the prior, drive the spikes of a neuron."""
    lags = design.shape[1] - 1
    differences = torch.eye(lags) - torch.diag(torch.ones(lags - 1), -1)
    root = differences @ differences + torch.diag(torch.arange(lags) / lags).sqrt()
    precision = torch.block_diag(torch.tensor([[0.5]]), root.mT @ root)

    def model() -> None:
        theta = pyro.sample("theta", dist.MultivariateNormal(torch.zeros(lags + 1), precision_matrix=precision))
        pyro.sample("x", SpikeStatistics(theta, design))

    return model


def slcp() -> None:
    """Four points of a Gaussian in the plane: a simple likelihood, a complex posterior."""
    theta = pyro.sample("theta", dist.Uniform(-3 * torch.ones(5), 3 * torch.ones(5)).to_event(1))
    first, second = theta[..., 2] ** 2, theta[..., 3] ** 2
    scale = torch.sqrt(first**2 + 1e-6)
    slope = theta[..., 4].tanh() * first * second / scale
    rest = torch.sqrt(second**2 + 1e-6 - slope**2)
    rows = [torch.stack([scale, torch.zeros_like(scale)], -1), torch.stack([slope, rest], -1)]
    point = dist.MultivariateNormal(theta[..., None, :2], scale_tril=torch.stack(rows, -2)[..., None, :, :])
    pyro.sample("x", point.expand((*theta.shape[:-1], 4)).to_event(1))


class Reference:
    """Observations, reference draws and the classifier test of an unpacked sbibm wheel.

    Its files are read one by one, since importing the whole of it needs packages that have no part in this.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "sbibm"
        if not self.folder.is_dir():
            raise SystemExit(f"{folder} has no sbibm: run pip install --no-deps --target {folder} sbibm")
        spec = importlib.util.spec_from_file_location("c2st", self.folder / "metrics" / "c2st.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.c2st = module.c2st

    def table(self, task: str, number: int, name: str) -> Tensor:
        path = self.folder / "tasks" / task / "files" / f"num_observation_{number}" / name
        return torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.float32))

    def accuracy(self, task: str, number: int, draws: Tensor) -> float:
        """Return the accuracy of the classifier, in five-fold cross-validation, between draws and reference draws."""
        reference = self.table(task, number, "reference_posterior_samples.csv.bz2")
        return self.c2st(reference[: len(draws)], draws).item()

    def models(self) -> dict[str, Model]:
        design = torch.load(self.folder / "tasks" / "bernoulli_glm" / "files" / "design_matrix.pt")
        return {
            "two_moons": two_moons,
            "gaussian_linear": gaussian_linear,
            "gaussian_linear_uniform": gaussian_linear_uniform,
            "bernoulli_glm": bernoulli_glm(design),
            "slcp": slcp,
        }


def adam(precision: float, num_rows: int) -> Callable[..., torch.optim.Optimizer]:
    """Adam with a normal prior on the parameters; its precision is 10 in ``fit_amortized``, 3 in ``fit_density``."""
    return partial(torch.optim.Adam, lr=2e-3, weight_decay=precision / num_rows)


def fits(num_simulations: int) -> dict[str, dict[str, object]]:
    """Options of ``fit_amortized`` by name."""
    return {
        "default": {},
        "one flow": {"num_flows": 1},
        "precision 3": {"optimizer": adam(3.0, num_simulations)},
        "precision 30": {"optimizer": adam(30.0, num_simulations)},
        "couplings": {"flow": lambda dim, context_dim: pf.flows.NSF(dim, context_dim=context_dim)},
        "MAF": {"flow": lambda dim, context_dim: pf.flows.MAF(dim, context_dim=context_dim)},
        "CNF": {"flow": lambda dim, context_dim: pf.flows.CNF(dim, (128, 128, 128), context_dim=context_dim)},
    }


def measure(reference: Reference, task: str, model: Model, fit: str, args: argparse.Namespace, seed: int) -> None:
    """Print lines of the table: one fit, the accuracy at each observation, and the mean."""
    pyro.set_rng_seed(seed)
    start = time.perf_counter()
    options = fits(args.simulations)[fit]
    amortized = pf.fit_amortized(model, "x", num_simulations=args.simulations, seed=seed, progress_bar=False, **options)
    seconds = time.perf_counter() - start
    plain, corrected = [], []
    for number in args.observations:
        x = reference.table(task, number, "observation.csv")
        posterior = amortized.posterior(x.reshape(4, 2) if task == "slcp" else x)
        plain.append(reference.accuracy(task, number, posterior.sample(args.draws)["theta"]))
        print(f"| {task} | {fit} | {seed} | {number} | {plain[-1]:.3f} |", end="", flush=True)
        if args.no_correction:
            print(" - | - | - |", end="")
        else:
            weighted = posterior.importance_sample(args.proposals)
            corrected.append(reference.accuracy(task, number, weighted.resample(args.draws)["theta"]))
            weights = weighted.weights
            print(f" {corrected[-1]:.3f} | {weights.khat:.2f} | {weights.ess:.0f} |", end="")
        print(f" {seconds:.0f} |", flush=True)
    means = [f"{statistics.mean(values):.3f}" if values else "-" for values in (plain, corrected)]
    print(f"| {task} | {fit} | {seed} | mean | {' | '.join(means)} | | | |", flush=True)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    reference = Reference(args.sbibm)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {args.threads} thread(s)\n")
    print("| task | fit | seed | observation | C2ST | corrected | k-hat | effective sample size | seconds of the fit |")
    print("|---|---|---|---|---|---|---|---|---|")
    for task, model in reference.models().items():
        if task not in args.tasks:
            continue
        for fit in args.fits:
            for seed in args.seeds:
                measure(reference, task, model, fit, args, seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sbibm", type=Path, required=True, help="the folder into which sbibm was installed")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["two_moons", "gaussian_linear", "gaussian_linear_uniform", "bernoulli_glm", "slcp"],
    )
    parser.add_argument("--fits", nargs="+", default=["default"], choices=list(fits(1)))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--observations", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--draws", type=int, default=10_000, help="number of draws for the classifier, at most 10,000")
    parser.add_argument("--proposals", type=int, default=1_000_000, help="number of weighted draws for the correction")
    parser.add_argument("--no-correction", action="store_true", help="leave out the test of corrected draws")
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())
