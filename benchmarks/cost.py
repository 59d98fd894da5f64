"""What a fit costs, in seconds and by step, against the number of latents and the number of rows; float32.

Latents: a centred hierarchical model, D - 2 groups of five observations each. Rows: linear regression with ten latents,
on all rows a step, and on 256 in a subsampled plate. Verdicts of the latter are on all rows. The time of a step is that
of the fit over the number of steps, set-up included. Prints a table and draws a figure.

    python -m benchmarks.cost --dims 10 100 1000 --rows 100 1000 10000 100000 --figure docs/images/vi_cost.png
"""

import argparse
import platform
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import torch
from matplotlib.ticker import LogLocator, NullFormatter
from pyro import distributions as dist
from torch import Tensor

import pyroflows as pf

NUM_OBSERVATIONS = 5
NUM_WEIGHTS = 9
SUBSAMPLE = 256


def hierarchy(y: Tensor) -> None:
    """Observations ``(5, groups)``."""
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    spread = pyro.sample("spread", dist.HalfNormal(2.0))
    with pyro.plate("group", y.shape[-1], dim=-1):
        effect = pyro.sample("effect", dist.Normal(mean, spread))
        with pyro.plate("observation", len(y), dim=-2):
            pyro.sample("y", dist.Normal(effect, 1.0), obs=y)


def hierarchy_data(num_latents: int) -> Tensor:
    effect = 1.0 + torch.randn(num_latents - 2)
    return effect + torch.randn(NUM_OBSERVATIONS, num_latents - 2)


def regression(x: Tensor, y: Tensor, subsample_size: int | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("N", len(x), subsample_size=subsample_size) as rows:
        pyro.sample("y", dist.Normal(x[rows] @ w, scale), obs=y[rows])


def regression_data(num_rows: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(num_rows, NUM_WEIGHTS)
    return x, x @ torch.randn(NUM_WEIGHTS) + 0.5 * torch.randn(num_rows)


@dataclass(frozen=True)
class Cost:
    """Of one fit."""

    size: int
    seconds: float
    steps: int
    verdict: str

    @property
    def ms_a_step(self) -> float:
        return 1e3 * self.seconds / self.steps


def cost(size: int, num_steps: int | None, model: Any, *args: Any, full: tuple | None = None) -> Cost:
    """Of a fit to ``args``; the verdict is on ``full``, where those hold only a part of the data."""
    vi = pf.FlowVI(model, num_steps=num_steps, gate=False, seed=0, progress_bar=False)
    start = time.perf_counter()
    posterior = vi.run(*args)
    seconds = time.perf_counter() - start
    judged = posterior if full is None else posterior.with_data(*full)
    return Cost(size, seconds, posterior.history.num_steps, judged.diagnose().verdict)


def show(name: str, costs: list[Cost]) -> None:
    c = costs[-1]
    print(f"| {name} | {c.size:,} | {c.seconds:.1f} | {c.steps} | {c.ms_a_step:.1f} | {c.verdict} |", flush=True)


def measure(args: argparse.Namespace) -> tuple[list[Cost], list[Cost], list[Cost]]:
    cost(10, 5, hierarchy, hierarchy_data(10))  # the first fit of a process pays for what is loaded late
    print("| model | size | s | steps | ms a step | verdict |\n|---|---|---|---|---|---|")
    by_latents: list[Cost] = []
    for size in args.dims:
        torch.manual_seed(size)
        by_latents.append(cost(size, args.steps, hierarchy, hierarchy_data(size)))
        show("hierarchy, latents", by_latents)
    by_rows: list[Cost] = []
    subsampled: list[Cost] = []
    for size in args.rows:
        torch.manual_seed(size)
        data = regression_data(size)
        by_rows.append(cost(size, args.steps, regression, *data))
        show("regression, rows", by_rows)
        if size > SUBSAMPLE:
            subsampled.append(cost(size, args.steps, regression, *data, SUBSAMPLE, full=data))
            show(f"regression, rows, {SUBSAMPLE} a step", subsampled)
    return by_latents, by_rows, subsampled


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def plot(axis: plt.Axes, costs: list[Cost], color: str, label: str | None = None, above: bool = True) -> None:
    axis.plot([c.size for c in costs], [c.seconds for c in costs], "o-", color=color, label=label)
    for c in costs:
        axis.annotate(
            f"{short(c.seconds)} s\n{c.steps:,} × {short(c.ms_a_step)} ms",
            (c.size, c.seconds),
            (2, 6) if above else (0, -8),
            textcoords="offset points",
            ha="right" if above else "left",
            va="bottom" if above else "top",
            fontsize="small",
            color=color,
        )


def draw(by_latents: list[Cost], by_rows: list[Cost], subsampled: list[Cost], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    plot(left, by_latents, "C0")
    plot(right, by_rows, "C0", "all rows a step")
    plot(right, subsampled, "C1", f"{SUBSAMPLE} rows a step", above=False)
    for axis, costs in ((left, by_latents), (right, by_rows)):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks([c.size for c in costs], [f"{c.size:,}" for c in costs])
        axis.xaxis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.32, y=0.2)
        axis.grid(alpha=0.3)
    left.set_xlabel("latents (hierarchical model, 5 observations a group)")
    right.set_xlabel("rows (linear regression, 10 latents)")
    left.set_ylabel("seconds to fit: steps × time of a step")
    right.legend(loc="upper left", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {args.threads} thread(s)\n")
    draw(*measure(args), args.figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[10, 100, 1000], help="numbers of latents")
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--steps", type=int, help="of a fit; as many as it takes where left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", type=Path, default=Path("output/vi_cost.png"))
    warnings.filterwarnings("ignore", category=UserWarning, module="pyro")
    main(parser.parse_args())
