"""What a training step of a density model costs, in time and memory, against dimension, layers and bins.

Memory is what a step keeps for its backward pass, counted exactly, with parameters, gradients and Adam's moments.

    python -m benchmarks.density_cost --figure docs/images/density_cost.png
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import pyroflows as pf

BATCH = 512
HIDDEN_DIMS = (128, 128)
DIM, NUM_LAYERS, BINS = 43, 5, 8
AXES = {"dimension": (6, 43, 128, 512), "layers": (1, 2, 5, 10), "bins": (4, 8, 16, 32)}
FAMILIES = ("RealNVP", "MAF", "NSF, coupling", "NSF, autoregressive")


def flow_of(family: str, dimension: int = DIM, layers: int = NUM_LAYERS, bins: int = BINS) -> pf.Flow:
    options = {"num_layers": layers, "hidden_dims": HIDDEN_DIMS}
    if family.startswith("NSF"):
        return pf.flows.NSF(dimension, bins=bins, autoregressive="autoregressive" in family, **options)
    return getattr(pf.flows, family)(dimension, **options)


def step_of(flow: pf.Flow, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (-flow().log_prob(x).mean()).backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None], rounds: int) -> float:
    step()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def megabytes(flow: pf.Flow, x: Tensor) -> float:
    """Storages kept for the backward pass, each counted once, and four numbers a parameter."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = -flow().log_prob(x).mean()
    parameters = {p.untyped_storage().data_ptr(): p.nbytes for p in flow.parameters()}
    total = sum(size for pointer, size in kept.items() if pointer not in parameters) + 4 * sum(parameters.values())
    del loss
    return total / 2**20


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {args.threads} thread(s), batch {BATCH}\n")
    print("| model | varied | value | ms a step | MiB |\n|---|---|---|---|---|")
    figure, grid = plt.subplots(2, 3, figsize=(10, 5.6), sharey="row", sharex="col", layout="constrained")
    for (column, (axis, values)), family in product(enumerate(AXES.items()), FAMILIES):
        if axis == "bins" and not family.startswith("NSF"):
            continue
        times, sizes = [], []
        for value in values:
            flow = flow_of(family, **{axis: value})
            x = torch.randn(BATCH, flow.dim)
            times.append(1e3 * seconds(step_of(flow, x), args.rounds))
            sizes.append(megabytes(flow, x))
            print(f"| {family} | {axis} | {value} | {times[-1]:.1f} | {sizes[-1]:.0f} |", flush=True)
        for row, y in enumerate((times, sizes)):
            color = f"C{FAMILIES.index(family)}"
            grid[row, column].plot(values, y, "o-", color=color, label=family, markersize=4)
        grid[1, column].set_xlabel(axis)
        grid[1, column].set_xscale("log")
        grid[1, column].set_xticks(values, map(str, values))
        grid[1, column].minorticks_off()
    for axes in grid.flat:
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("ms a training step")
    grid[1, 0].set_ylabel("MiB kept for a step")
    grid[0, 0].legend(fontsize="small")
    for axes, others in zip(
        grid[0], ("5 layers, 8 bins", "43 dimensions, 8 bins", "43 dimensions, 5 layers"), strict=True
    ):
        axes.set_title(others, fontsize="medium")
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--figure", type=Path, default=Path("output/density_cost.png"))
    main(parser.parse_args())
