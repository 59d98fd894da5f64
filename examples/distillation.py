"""Distillation: a density that is quick to score teaches one that is quick to sample.

Sixteen measurements of the cell nuclei of 556 breast tumours (Street et al. 1993, from scikit-learn). A masked
autoregressive flow learns their density, in logarithms, since all are positive and skewed; noise of a tenth of a
standard deviation, fresh at every reading, keeps it smooth between so few rows. An inverse autoregressive flow of the
same sizes is then distilled from it, without the data. Prints how near the student comes and what it gains, and saves
two pictures.

    python examples/distillation.py
    python examples/distillation.py --layers 3 --width 32 --num-steps 500 --seed 1
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch.utils.data import Dataset

import pyroflows as pf

NUM_HELD_OUT = 100
NOISE = 0.1  # in standard deviations
BATCHES = (1, 64, 1024)

# Labels, and the numbers written on the axes.
SHOWN = {
    "mean radius": ("mean radius\n(pixels)", (8, 16, 32)),
    "mean texture": ("mean texture\n(grey levels)", (10, 20, 40)),
    "mean concavity": ("mean\nconcavity", (0.001, 0.01, 0.1)),
    "mean fractal dimension": ("mean fractal\ndimension - 1", (0.05, 0.07, 0.1)),
    "worst symmetry": ("worst\nsymmetry", (0.2, 0.3, 0.5)),
}
NUM_SHOWN_DRAWS = 50_000
MASSES = (0.95, 0.5)  # inside the contours
SHADES = (("C0", 0.3), ("C0", 0.6))
DPI = 100


class Noisy(Dataset):
    """Rows with normal noise, drawn anew at every access."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.scale = x, NOISE * x.std(0)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index] + self.scale * torch.randn(self.scale.shape)


def measurements() -> tuple[Tensor, list[str]]:
    """Logarithms ``(556, 16)`` and names of the measurements: mean and worst of the nuclei of each tumour."""
    data = load_breast_cancer()
    # Perimeter and area are the radius over again.
    is_kept = [not any(word in name for word in ("error", "perimeter", "area")) for name in data.feature_names]
    x = data.data[:, is_kept]
    # In thirteen tumours no concavity was seen, and zero has no logarithm.
    x = x[(x > 0).all(1)]
    return torch.as_tensor(np.log(x), dtype=torch.float32), list(data.feature_names[is_kept])


def seconds(function: Callable[[], object], rounds: int = 9) -> float:
    """The median time of a call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def print_likelihoods(teacher: pf.Flow, student: pf.Flow, held_out: Tensor) -> None:
    scores = {"teacher": teacher().log_prob(held_out), "student": student().log_prob(held_out)}
    print(f"\nmean log-likelihood of {len(held_out)} held-out tumours, nats")
    for (name, values), flow in zip(scores.items(), (teacher, student), strict=True):
        score = partial(flow().log_prob, held_out)
        print(f"  {name}  {values.mean():7.3f}, scored in {1e3 * seconds(score):6.2f} ms")
    change = scores["student"] - scores["teacher"]
    print(f"  student - teacher {change.mean():.3f} +- {change.std() / len(change) ** 0.5:.3f}")
    print("The student is the slower to score: it has to go back dimension by dimension.")


@torch.no_grad()
def print_speeds(teacher: pf.Flow, student: pf.Flow) -> None:
    print("\nms to draw   batch   teacher   student   times as fast")
    for batch in BATCHES:
        ms = [1e3 * seconds(partial(flow().sample, (batch,))) for flow in (teacher, student)]
        print(f"{batch:18}{ms[0]:10.2f}{ms[1]:10.2f}{ms[0] / ms[1]:16.1f}")
    print("The teacher computes each hidden unit once: what the student saves is overhead, most in small batches.")


def plot_pairs(draws: dict[str, Tensor], data: Tensor, names: list[str]) -> plt.Figure:
    """Marginals, and pairs with contours that hold half and 95 % of the draws, in the units of the measurements."""
    columns, (labels, ticks) = [names.index(name) for name in SHOWN], zip(*SHOWN.values(), strict=True)
    tumours = data[:, columns].exp().numpy()
    shown = {name: x[:, columns].exp().numpy() for name, x in draws.items()}
    edges = [np.geomspace(0.8 * low, 1.25 * high, 61) for low, high in zip(tumours.min(0), tumours.max(0), strict=True)]
    count = len(columns)
    figure, grid = plt.subplots(count, count, figsize=(9, 9), layout="constrained")
    for (i, j), axes in np.ndenumerate(grid):
        if i < j:
            axes.set_axis_off()
            continue
        _scale(axes.xaxis, edges[j], ticks[j], labels[j] if i == count - 1 else None)
        if i == j:
            _draw_marginal(axes, shown, edges[j], j)
            continue
        axes.plot(tumours[:, j], tumours[:, i], ".", color="black", markersize=2.5, alpha=0.6, markeredgewidth=0)
        _draw_contours(axes, shown, edges, i, j)
        _scale(axes.yaxis, edges[i], ticks[i], labels[i] if j == 0 else None)
    keys = [
        Patch(color=SHADES[1], label="teacher (MAF)"),
        Line2D([], [], color="C3", label="student (IAF)"),
        Line2D([], [], color="black", marker=".", linestyle="", label="tumours"),
    ]
    figure.legend(
        handles=keys, loc="upper right", bbox_to_anchor=(0.95, 0.95), title="contours hold 50 % and 95 % of the draws"
    )
    return figure


def _draw_marginal(axes: plt.Axes, shown: dict[str, np.ndarray], edges: np.ndarray, j: int) -> None:
    axes.hist(shown["teacher"][:, j], edges, histtype="stepfilled", color=SHADES[1])
    axes.hist(shown["student"][:, j], edges, histtype="step", color="C3")
    axes.set_yticks([])


def _draw_contours(axes: plt.Axes, shown: dict[str, np.ndarray], edges: list[np.ndarray], i: int, j: int) -> None:
    centers = [np.sqrt(edge[1:] * edge[:-1]) for edge in (edges[j], edges[i])]
    for name, x in shown.items():
        counts = np.histogram2d(x[:, j], x[:, i], (edges[j], edges[i]))[0].T
        smooth = gaussian_filter(counts, 1.0)
        ranked = np.sort(smooth.ravel())[::-1]
        levels = [ranked[np.searchsorted(ranked.cumsum(), mass * ranked.sum())] for mass in MASSES]
        if name == "teacher":
            axes.contourf(*centers, smooth, [*levels, smooth.max()], colors=SHADES)
        else:
            axes.contour(*centers, smooth, levels, colors="C3", linewidths=1.0)


def _scale(axis: Axis, edges: np.ndarray, ticks: Sequence[float], label: str | None) -> None:
    """A logarithmic axis, with numbers and label only if it has one."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (edges[0], edges[-1])})
    axis.set_major_locator(plt.FixedLocator(ticks))
    axis.set_major_formatter("{x:g}" if label else "")
    axis.set_minor_locator(plt.NullLocator())
    axis.set_label_text(label or "")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # the tensors are small, and more threads only wait for each other
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    x, names = measurements()
    order = torch.randperm(len(x))
    held_out, kept = x[order[:NUM_HELD_OUT]], x[order[NUM_HELD_OUT:]]
    dim, sizes = x.shape[1], {"num_layers": args.layers, "hidden_dims": (args.width, args.width)}
    shared = {"seed": args.seed, "progress_bar": not args.no_progress_bar}

    teacher = pf.flows.MAF(dim, **sizes)
    taught = pf.fit_density(teacher, Noisy(kept), batch_size=64, max_epochs=args.max_epochs, **shared)
    print(f"teacher, a MAF of {dim} dimensions, {time.perf_counter() - start:.0f} s: {taught}")

    student = pf.flows.IAF(dim, **sizes)
    start = time.perf_counter()
    fit = pf.distill(student, teacher, num_steps=args.num_steps, **shared)
    print(f"student, an IAF of the same sizes, {time.perf_counter() - start:.0f} s: {fit}")
    print(f"KL(student || teacher) {fit.kl:.4f} +- {fit.kl_se:.4f} nats, {fit.kl / dim:.4f} a dimension")

    print_likelihoods(teacher, student, held_out)
    print_speeds(teacher, student)

    args.output.mkdir(parents=True, exist_ok=True)
    pairs, training = args.output / "distillation_pairs.png", args.output / "distillation_training.png"
    with torch.no_grad():
        draws = {name: flow().sample((NUM_SHOWN_DRAWS,)) for name, flow in (("teacher", teacher), ("student", student))}
    plot_pairs(draws, x, names).savefig(pairs, dpi=DPI)
    fit.plot().savefig(training, dpi=DPI)
    print(f"\nsaved {pairs}\nsaved {training}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A student that is quick to sample, distilled from a density of data")
    parser.add_argument("--layers", type=int, default=5, help="of each flow (default: 5)")
    parser.add_argument("--width", type=int, default=64, help="of both hidden layers of a conditioner (default: 64)")
    parser.add_argument("--max-epochs", type=int, default=200, help="of the teacher at most (default: 200)")
    parser.add_argument("--num-steps", type=int, help="of the distillation (default: as many as it takes)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the pictures (default: output)")
    parser.add_argument("--no-progress-bar", action="store_true", help="train silently")
    main(parser.parse_args())
