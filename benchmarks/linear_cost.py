"""What linear layers cost in each direction, with their log-determinants, against the dimension; float32, one thread.

Beside them stand the product with a dense matrix and ``torch.linalg.solve``. Calls take turns, and the figure of each
is its median time on the processor. Prints a table and draws a figure.

    python -m benchmarks.linear_cost --figure docs/images/linear_cost.png
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import FixedLocator, NullFormatter

from pyroflows.transforms import LU, QR, FlowTransform, LowRank, Orthogonal

BATCH = 256
RANK = 16
DIMS = (16, 32, 64, 128, 256, 512, 1024)
LAYERS: dict[str, Callable[[int], FlowTransform]] = {
    "LU": LU,
    "QR": QR,
    "Orthogonal": Orthogonal,
    f"LowRank, rank {RANK}": lambda dim: LowRank(dim, RANK),
}
MULTIPLY, SOLVE = "dense product", "torch.linalg.solve"
Times = dict[tuple[str, str], float]


def calls_of(dim: int) -> dict[tuple[str, str], Callable[[], object]]:
    """Calls by name and direction."""
    rows = torch.randn(BATCH, dim)
    dense = torch.eye(dim) + torch.randn(dim, dim) / 4 / dim**0.5
    calls: dict[tuple[str, str], Callable[[], object]] = {
        (MULTIPLY, "forward"): lambda: rows @ dense.T,
        (SOLVE, "inverse"): lambda: torch.linalg.solve(dense, rows.T).T,
    }
    for name, layer in LAYERS.items():
        t = layer(dim)
        for parameter in t.parameters():
            parameter.data += torch.randn_like(parameter) / dim
        calls[name, "forward"] = lambda t=t: t.forward_and_ladj(rows)
        calls[name, "inverse"] = lambda t=t: t.inverse_and_ladj(rows)
    return calls


@torch.no_grad()
def milliseconds(dim: int, rounds: int) -> Times:
    calls = calls_of(dim)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            start = time.process_time_ns()
            call()
            times[key].append((time.process_time_ns() - start) / 1e6)
    return {key: statistics.median(values) for key, values in times.items()}


def show(dim: int, times: Times) -> None:
    inverses = {name: times[name, "inverse"] for name in LAYERS}
    cells = [f"{times[name, 'forward']:.2f} / {inverse:.2f}" for name, inverse in inverses.items()]
    ratios = [f"{times[SOLVE, 'inverse'] / inverse:.1f}" for inverse in inverses.values()]
    dense = f"{times[MULTIPLY, 'forward']:.2f} / {times[SOLVE, 'inverse']:.2f}"
    print(f"| {dim} | {' | '.join(cells)} | {dense} | {', '.join(ratios)} |", flush=True)


def draw(times: dict[int, Times], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharey=True)
    for axis, direction, dense in zip(axes, ("forward", "inverse"), (MULTIPLY, SOLVE), strict=True):
        for i, name in enumerate((*LAYERS, dense)):
            style = {"color": "0.4", "linestyle": "--"} if name == dense else {"color": f"C{i}"}
            values = [times[dim][name, direction] for dim in times]
            axis.plot(list(times), values, "o-" if name != dense else "s", label=name, markersize=4, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(FixedLocator(list(times)))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.set_xlabel("dimension")
        axis.set_title(f"{direction}, with log-determinant")
        axis.legend()
    axes[0].set_ylabel(f"ms for {BATCH} vectors")
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, batch {BATCH}; ms forward / inverse")
    print(f"| D | {' | '.join(LAYERS)} | dense | inverse of the dense one over those |\n|{'---|' * (len(LAYERS) + 3)}")
    times = {}
    for dim in args.dims:
        times[dim] = milliseconds(dim, args.rounds)
        show(dim, times[dim])
    if args.figure:
        draw(times, args.figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS)
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--figure", type=Path)
    main(parser.parse_args())
