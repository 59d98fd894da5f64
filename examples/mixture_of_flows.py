"""A mixture of flows: a Pyro program with a latent class, whose components are flows, told apart by a few labels.

Points of the plane lie along two interleaved moons and a ring; the class is known for two in a hundred. One flow with
the class as its context is the components. Where the class is unknown it is summed out (``TraceEnum_ELBO``), and the
weights of the classes get a posterior. The script compares log-likelihood and classification of fresh points with what
the truth itself reaches, and with a single flow of equal size, which must join the three shapes by bridges.

    python examples/mixture_of_flows.py
    python examples/mixture_of_flows.py --num-labelled 50 --seed 1 --output pictures
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from matplotlib.colors import PowerNorm
from pyro import poutine
from pyro.infer import ELBO, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, pyro_method
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm import trange

import pyroflows as pf

CLASSES = ["upper moon", "lower moon", "ring"]
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
NOISE = 0.12
NUM_ROWS = 5000
BATCH_SIZE = 500
LEARNING_RATE = 5e-3
NUM_STEPS_LABELLED = 100
LIMITS = (-3.4, 3.8), (-2.6, 2.4)
MAX_DENSITY = 0.5
LEGEND: dict[str, Any] = {"loc": "upper left", "frameon": False, "fontsize": "small", "handletextpad": 0.1}
DPI = 150


def curves(t: Tensor) -> Tensor:
    """Points ``(3, *t.shape, 2)`` of the three curves at times t from 0 to pi."""
    upper = torch.stack([1.5 * t.cos(), 1.5 * t.sin()], -1)
    lower = torch.stack([1.5 - 1.5 * t.cos(), 0.5 - 1.5 * t.sin()], -1)
    ring = torch.stack([0.8 * (2 * t).cos() - 2.1, 0.8 * (2 * t).sin() - 1.2], -1)
    return torch.stack([upper, lower, ring])


def draw_data(num_rows: int) -> tuple[Tensor, Tensor]:
    """Points ``(n, 2)`` and their classes ``(n,)``."""
    z = dist.Categorical(WEIGHTS).sample((num_rows,))
    x = curves(math.pi * torch.rand(num_rows))[z, torch.arange(num_rows)]
    return x + NOISE * torch.randn(num_rows, 2), z


def true_log_joint(x: Tensor) -> Tensor:
    """Log-density of every row with every class, ``(n, 3)``, by quadrature along the curves."""
    points = curves(math.pi * (torch.arange(500) + 0.5) / 500)
    along = dist.Normal(points, NOISE).to_event(1).log_prob(x[:, None, None])
    return along.logsumexp(-1) - math.log(500) + WEIGHTS.log()


def make_flow(context_dim: int = 0) -> pf.Flow:
    return pf.flows.NSF(2, num_layers=4, hidden_dims=(32, 32), context_dim=context_dim)


class MixtureOfFlows(PyroModule):
    """Class z by the weights, then x by the flow at the code of z."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.flow = make_flow(context_dim=num_classes)

    def forward(self, x: Tensor, z: Tensor, x_unlabelled: Tensor | None = None) -> None:
        weights = self.weights()
        with pyro.plate("labelled", len(x)):
            self.row("labelled", weights, x, z)
        if x_unlabelled is not None:
            with pyro.plate("unlabelled", len(x_unlabelled), BATCH_SIZE) as index:
                self.row("unlabelled", weights, x_unlabelled[index])

    @pyro_method
    def generate(self, num_rows: int) -> None:
        weights = self.weights()
        with pyro.plate("rows", num_rows):
            self.row("drawn", weights)

    def weights(self) -> Tensor:
        return pyro.sample("weights", dist.Dirichlet(torch.ones(self.num_classes)))

    def row(self, name: str, weights: Tensor, x: Tensor | None = None, z: Tensor | None = None) -> None:
        z = pyro.sample(f"{name} z", dist.Categorical(weights), obs=z, infer={"enumerate": "parallel"})
        pyro.sample(f"{name} x", self.component(z), obs=x)

    def component(self, z: Tensor) -> pf.flows.FlowDistribution:
        return self.flow(one_hot(z, self.num_classes).float())

    def log_joint(self, x: Tensor, weights: Tensor) -> Tensor:
        """Log-density of every row with every class, ``(n, num_classes)``."""
        return self.component(torch.arange(self.num_classes)).log_prob(x[:, None]) + weights.log()


def single(flow: pf.Flow, x: Tensor) -> None:
    pyro.module("single", flow)
    with pyro.plate("rows", len(x), BATCH_SIZE) as index:
        pyro.sample("x", flow(), obs=x[index])


def no_latents(*args: Any) -> None:
    """The guide of a program without latents."""


def train(model: Any, guide: Any, elbo: ELBO, *args: Any, num_steps: int, show_progress: bool) -> None:
    """SVI with a learning rate that falls to a tenth."""
    decay = 0.1 ** (1 / num_steps)
    # The loss is a sum over all rows, so its gradients are large: the default clips nearly all of them.
    optimizer = pyro.optim.ClippedAdam({"lr": LEARNING_RATE, "lrd": decay, "clip_norm": 10.0 * NUM_ROWS})
    svi = SVI(model, guide, optimizer, elbo)
    for _ in trange(num_steps, disable=not show_progress):
        svi.step(*args)


def scores(log_joint: Tensor, z: Tensor) -> dict[str, float]:
    """Of fresh points of classes z: how likely they are, and how often their likeliest class is the right one."""
    return {
        "log-likelihood": log_joint.logsumexp(-1).mean().item(),
        "accuracy": (log_joint.argmax(-1) == z).float().mean().item(),
    }


def print_weights(draws: Tensor) -> None:
    print("Weights of the classes: posterior mean and 90% interval, and the truth")
    low, high = draws.quantile(torch.tensor([0.05, 0.95]), dim=0)
    for k, name in enumerate(CLASSES):
        print(f"{name:<12}{draws[:, k].mean():.3f} ({low[k]:.3f} to {high[k]:.3f})  {WEIGHTS[k]:.3f}")


def plot_data(axis: Any, x: Tensor, z: Tensor, num_labelled: int) -> None:
    axis.scatter(*x[num_labelled:].T, s=3, color="lightgray", label="unknown class")
    for k, name in enumerate(CLASSES):
        known = x[:num_labelled][z[:num_labelled] == k]
        axis.scatter(*known.T, s=18, color=f"C{k}", edgecolor="black", linewidth=0.5, label=name)
    axis.legend(**LEGEND)
    axis.set_title(f"Data: {len(x)} points, {num_labelled} of known class")


def plot_draws(axis: Any, x: Tensor, z: Tensor) -> None:
    for k, name in enumerate(CLASSES):
        axis.scatter(*x[z == k].T, s=3, color=f"C{k}", label=name)
    axis.legend(markerscale=3, **LEGEND)
    axis.set_title(f"Mixture of flows: {len(x)} draws")


@torch.no_grad()
def plot_density(axis: Any, log_prob: Callable[[Tensor], Tensor], name: str) -> Any:
    x1, x2 = (torch.linspace(*limits, 300) for limits in LIMITS)
    density = log_prob(torch.cartesian_prod(x1, x2)).exp().reshape(300, 300)
    axis.set_title(f"{name}: density")
    # The square root lets faint bridges be seen.
    norm = PowerNorm(0.5, 0, MAX_DENSITY)
    return axis.imshow(density.T.numpy(), origin="lower", extent=(*LIMITS[0], *LIMITS[1]), norm=norm, cmap="magma")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # the tensors are small, and more threads only wait for each other
    pyro.set_rng_seed(args.seed)
    n = args.num_labelled
    x, z = draw_data(NUM_ROWS)
    x_test, z_test = draw_data(NUM_ROWS)
    print(f"{NUM_ROWS} points on two moons and a ring, the class known for {n} of them\n")
    fit = partial(train, show_progress=not args.no_progress_bar)
    start = time.perf_counter()

    mixture = MixtureOfFlows(len(CLASSES))
    guide = AutoNormal(poutine.block(mixture, expose=["weights"]))
    # The labelled points alone bring each component near its class, where the others then keep it.
    fit(mixture, guide, Trace_ELBO(), x[:n], z[:n], num_steps=NUM_STEPS_LABELLED)
    by_labels = scores(mixture.log_joint(x_test, guide.median()["weights"]), z_test)
    fit(mixture, guide, TraceEnum_ELBO(max_plate_nesting=1), x[:n], z[:n], x[n:], num_steps=args.num_steps)
    flow = make_flow()
    fit(single, no_latents, Trace_ELBO(), flow, x, num_steps=args.num_steps)
    print(f"Fitted in {time.perf_counter() - start:.1f} s.\n")

    weights = Predictive(guide, num_samples=NUM_ROWS)()["weights"]
    # One point to each draw of the weights, which stand in a dimension of their own beside that of the rows.
    drawn = Predictive(mixture.generate, {"weights": weights[:, None]}, parallel=True)(1)
    table = {
        "mixture, labelled points alone": by_labels,
        "mixture, all points": scores(mixture.log_joint(x_test, weights.mean(0)), z_test),
        "single flow, all points": {"log-likelihood": flow().log_prob(x_test).mean().item()},
        "the truth": scores(true_log_joint(x_test), z_test),
    }
    print(f"{NUM_ROWS} fresh points: log-likelihood a point, and the fraction put into the right class")
    print(pd.DataFrame.from_dict(table, orient="index").to_string(float_format="{:.3f}".format, na_rep=""), end="\n\n")
    print_weights(weights)

    figure, axes = plt.subplots(2, 2, figsize=(9.5, 6.6), sharex=True, sharey=True, layout="constrained")
    plot_data(axes[0, 0], x, z, n)
    plot_draws(axes[0, 1], drawn["drawn x"].squeeze(1), drawn["drawn z"].squeeze(1))
    plot_density(axes[1, 0], lambda x: mixture.log_joint(x, weights.mean(0)).logsumexp(-1), "Mixture of flows")
    image = plot_density(axes[1, 1], flow().log_prob, "Single flow of equal size")
    figure.colorbar(image, ax=axes[1], extend="max")
    for axis in axes.flat:
        axis.set(aspect="equal", xlim=LIMITS[0], ylim=LIMITS[1])
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "mixture_of_flows.png"
    figure.savefig(path, dpi=DPI)
    print(f"\nsaved {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A mixture of flows, told apart by a few labels")
    parser.add_argument("-n", "--num-steps", type=int, default=1000, help="training steps of each fit (default: 1000)")
    parser.add_argument("--num-labelled", type=int, default=100, help="points of known class (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers and the data (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the picture (default: output)")
    parser.add_argument("--no-progress-bar", action="store_true", help="train silently")
    main(parser.parse_args())
