"""What each family of flows can and cannot do: the usual two-dimensional shapes.

Fits flows of several families to data in the plane, and draws one picture a family: data, samples and density of each
shape. A volume-preserving flow cannot change the density along a path; an affine one cannot cut a blob in two, and
leaves threads between the pieces; a spline can. Held-out log-densities are printed beside them.

    python examples/density_2d.py
    python examples/density_2d.py --families RealNVP NSF --shapes moons spirals --max-epochs 300
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

import pyroflows as pf

LIMIT = 3.2  # of the pictures, which all shapes fill
DPI = 110


def moons(count: int, rng: Generator) -> np.ndarray:
    angle, upper = rng.uniform(0, np.pi, count), rng.random(count) < 0.5
    x = np.where(upper, np.cos(angle), 1 - np.cos(angle)) - 0.5
    y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle)) - 0.25
    return 1.6 * np.stack([x, y], -1) + 0.12 * rng.standard_normal((count, 2))


def rings(count: int, rng: Generator) -> np.ndarray:
    radius = rng.choice([0.9, 2.2], count) + 0.1 * rng.standard_normal(count)
    angle = rng.uniform(0, 2 * np.pi, count)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)


def spirals(count: int, rng: Generator) -> np.ndarray:
    turn = 3 * np.pi * np.sqrt(rng.random(count))
    arm = np.stack([np.cos(turn), np.sin(turn)], -1) * (turn[:, None] / 3.6) * rng.choice([-1, 1], count)[:, None]
    return arm + 0.08 * rng.standard_normal((count, 2))


def checkerboard(count: int, rng: Generator) -> np.ndarray:
    column, row = rng.integers(0, 4, count), rng.integers(0, 2, count)
    corner = np.stack([column, 2 * row + column % 2], -1)
    return 1.4 * (corner + rng.random((count, 2)) - 2)


def gaussians(count: int, rng: Generator) -> np.ndarray:
    angle = rng.integers(0, 8, count) * np.pi / 4
    return 2.2 * np.stack([np.cos(angle), np.sin(angle)], -1) + 0.2 * rng.standard_normal((count, 2))


SHAPES: dict[str, Callable[[int, Generator], np.ndarray]] = {
    shape.__name__: shape for shape in (moons, rings, spirals, checkerboard, gaussians)
}


def linear_with_activations() -> pf.Flow:
    """Linear layers with activations of one variable between them."""
    layers = [layer for _ in range(8) for layer in (pf.transforms.QR(2), pf.transforms.Elementwise(2, "sinh_arcsinh"))]
    return pf.Flow(layers)


FAMILIES: dict[str, Callable[[], pf.Flow]] = {
    "NICE": lambda: pf.flows.NICE(2, num_layers=8),
    "RealNVP": lambda: pf.flows.RealNVP(2, num_layers=8),
    "MAF": lambda: pf.flows.MAF(2, num_layers=6),
    "NSF": lambda: pf.flows.NSF(2, num_layers=4),
    "SOS": lambda: pf.flows.SOS(2, num_layers=4),
    "NAF": lambda: pf.flows.NAF(2, num_layers=4),
    "BNAF": lambda: pf.flows.BNAF(2, num_layers=4),
    "QR": linear_with_activations,
    "Residual": lambda: pf.flows.Residual(2, num_blocks=8),
}


def fit(make: Callable[[], pf.Flow], shape: str, args: argparse.Namespace) -> tuple[pf.Flow, Tensor, float]:
    """The flow, rows it has not seen, and its mean log-density there."""
    rng = np.random.default_rng(args.seed)
    rows = SHAPES[shape](args.num_rows, rng)
    held_out = torch.as_tensor(SHAPES[shape](5000, rng), dtype=torch.float32)
    torch.manual_seed(args.seed)
    flow = make()
    options = {"batch_size": 512, "max_epochs": args.max_epochs, "optimizer": partial(torch.optim.Adam, lr=5e-3)}
    pf.fit_density(flow, rows, seed=args.seed, progress_bar=not args.no_progress_bar, **options)
    with torch.no_grad():
        return flow, held_out, flow().log_prob(held_out).mean().item()


def draw(column: np.ndarray, flow: pf.Flow, held_out: Tensor) -> None:
    """Data, samples and density, in the three axes of a column."""
    with torch.no_grad():
        samples = flow().sample((len(held_out),))
        line = torch.linspace(-LIMIT, LIMIT, 200)
        grid = torch.cartesian_prod(line, line)
        density = flow().log_prob(grid).exp().reshape(200, 200).numpy()
    for axes, points in zip(column[:2], (held_out, samples), strict=True):
        axes.scatter(*points.T, s=1, alpha=0.35, linewidths=0, color="C0")
    # A cap, so that one bright spot does not darken all else.
    limit = np.sqrt(np.quantile(density, 0.995))
    column[2].imshow(np.sqrt(density.T), origin="lower", extent=(-LIMIT, LIMIT) * 2, vmax=limit)
    for axes in column:
        axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xticks=[], yticks=[], aspect="equal")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # the tensors are small, and more threads only wait for each other
    args.output.mkdir(parents=True, exist_ok=True)
    print(f"{'':10}" + "".join(f"{shape:>14}" for shape in args.shapes) + "   mean log-density of held-out rows, nats")
    start = time.perf_counter()
    for family in args.families:
        figure, grid = plt.subplots(3, len(args.shapes), figsize=(2.2 * len(args.shapes), 7), squeeze=False)
        scores = []
        for shape, column in zip(args.shapes, grid.T, strict=True):
            flow, held_out, score = fit(FAMILIES[family], shape, args)
            draw(column, flow, held_out)
            column[0].set_title(f"{shape}\n{score:.2f} nats", fontsize="medium")
            scores.append(score)
        for axes, label in zip(grid[:, 0], ("data", "samples", "density"), strict=True):
            axes.set_ylabel(label)
        figure.suptitle(family)
        figure.tight_layout()
        figure.savefig(args.output / f"density_2d_{family}.png", dpi=DPI)
        plt.close(figure)
        print(f"{family:10}" + "".join(f"{score:14.3f}" for score in scores), flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s; saved {args.output}/density_2d_*.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Two-dimensional densities by flows of several families")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="(default: all)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="(default: all)")
    parser.add_argument("--num-rows", type=int, default=8000, help="rows to fit to (default: 8000)")
    parser.add_argument("--max-epochs", type=int, default=150, help="passes over them at most (default: 150)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the pictures (default: output)")
    parser.add_argument("--no-progress-bar", action="store_true", help="train silently")
    main(parser.parse_args())
