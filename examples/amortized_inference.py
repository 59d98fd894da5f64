"""An epidemic whose posterior is learned once, and then known at once for any outbreak.

A Pyro program simulates an outbreak in a town: an SIR model, of whose new infections a part is reported each day, with
noise. One flow is trained on simulations of the program. It then gives the posterior of fifty outbreaks of seven weeks
without further training: how infectious the disease is, how long one can pass it on, how much of it is reported. The
likelihood of the program judges these posteriors, and corrects them by importance weights. Simulation-based calibration
tests all of them, without weights and with them, and forecasts show what the corrected posteriors know about the
weeks to come.

    python examples/amortized_inference.py
    python examples/amortized_inference.py --num-simulations 100000 --seed 1 --output pictures
"""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from pyro.infer import Predictive
from torch import Tensor, nn
from tqdm import tqdm

import pyroflows as pf

POPULATION = 100_000.0
NUM_DAYS, NUM_FORECAST_DAYS = 49, 98
NUM_DRAWS, NUM_WEIGHTED = 2000, 20_000
NUM_SHOWN_OUTBREAKS = 6
LATENTS = {
    "reproduction": "basic reproduction number",
    "duration": "infectious period (days)",
    "reported": "share of infections reported",
    "first_cases": "infected before day 1",
    "dispersion": "dispersion of the counts",
}
QUANTILES = torch.tensor([0.05, 0.25, 0.75, 0.95])
DPI = 130


def epidemic(num_days: int = NUM_DAYS, cases: Tensor | None = None) -> None:
    """An SIR model whose new infections are reported as negative-binomial counts."""
    reproduction = pyro.sample("reproduction", dist.LogNormal(0.7, 0.4))
    duration = pyro.sample("duration", dist.LogNormal(1.8, 0.4))
    reported = pyro.sample("reported", dist.Beta(2.0, 4.0))
    first_cases = pyro.sample("first_cases", dist.LogNormal(4.0, 0.7))
    dispersion = pyro.sample("dispersion", dist.LogNormal(2.5, 0.6))
    mean = reported[..., None] * new_infections(reproduction, duration, first_cases, num_days) + 0.1
    counts = dist.GammaPoisson(dispersion[..., None], dispersion[..., None] / mean)
    pyro.sample("cases", counts.to_event(1), obs=cases)


def new_infections(reproduction: Tensor, duration: Tensor, first_cases: Tensor, num_days: int) -> Tensor:
    """The new infections of each day, ``(..., num_days)``, in expectation."""
    susceptible, infected = POPULATION - first_cases, first_cases
    recovering = -torch.expm1(-1 / duration)  # the share of the infected who do so within a day
    found = []
    for _ in range(num_days):
        # Among susceptible people, someone infected infects as many as the reproduction number says, over all days.
        catching = -torch.expm1(-reproduction * recovering * infected / POPULATION)
        new = susceptible * catching
        infected = infected * (1 - recovering) + new
        susceptible = susceptible - new
        found.append(new)
    return torch.stack(found, -1)


class CurveEmbedding(nn.Module):
    """What the flow gets to see of daily counts: 32 numbers, by convolutions over their logarithms."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv1d(1, 16, kernel_size=5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv1d(16, 32, kernel_size=5, stride=2, padding=2),
            nn.SiLU(),
            nn.Flatten(),
        )
        self.dense = nn.Sequential(nn.Linear(32 * (-(-NUM_DAYS // 4)), 64), nn.SiLU(), nn.Linear(64, 32))

    def forward(self, cases: Tensor) -> Tensor:
        return self.dense(self.convolutions((cases.log1p().unsqueeze(1) - 4) / 2))


def make_flow(dim: int, context_dim: int) -> pf.Flow:
    return pf.flows.NSF(dim, num_layers=5, hidden_dims=(64, 64), context_dim=context_dim)


def scalars(draws: dict[str, Tensor]) -> Tensor:
    """The latents as columns."""
    return torch.stack([draws[name] for name in LATENTS], -1)


def print_errors(truth: Tensor, draws: Tensor, prior: Tensor) -> None:
    """How far posterior means are off, and how often an interval holds the truth, over all outbreaks."""
    low, high = draws.quantile(QUANTILES[[0, -1]], dim=1)
    table = {
        "prior sd": prior.std(0),
        "posterior sd": draws.var(1).mean(0).sqrt(),
        "rms error of the mean": (draws.mean(1) - truth).square().mean(0).sqrt(),
        "in 90 % interval": ((low < truth) & (truth < high)).float().mean(0),
    }
    print(pd.DataFrame(table, index=list(LATENTS.values())).to_string(float_format="{:.3g}".format), end="\n\n")


def judged(amortized: pf.Amortized, outbreaks: Tensor, show_progress: bool) -> list[pf.Posterior]:
    """The posteriors of outbreaks, after each has taken its verdict."""
    posteriors = [amortized.posterior(cases) for cases in outbreaks]
    for posterior in tqdm(posteriors, disable=not show_progress, unit="verdict"):
        posterior.diagnose()
    return posteriors


def print_correction(truth: Tensor, draws: Tensor, weighted: Tensor) -> None:
    """Mean and sd of the draws of the flow and of the weighted ones, beside the truth."""
    table = {
        "truth": truth,
        "flow mean": draws.mean(0),
        "sd": draws.std(0),
        "corrected mean": weighted.mean(0),
        "sd ": weighted.std(0),
    }
    print(pd.DataFrame(table, index=list(LATENTS.values())).to_string(float_format="{:.3g}".format), end="\n\n")


def plot_recovery(truth: Tensor, draws: Tensor) -> Figure:
    """Posterior means and intervals of all outbreaks against the truth, a panel for each latent."""
    figure, grid = plt.subplots(2, 3, figsize=(10.5, 6.8), layout="constrained")
    quantiles = draws.quantile(QUANTILES[[0, -1]], dim=1)
    for k, (axes, name) in enumerate(zip(grid.flat, LATENTS, strict=False)):
        x, mean, (low, high) = truth[:, k], draws[:, :, k].mean(1), quantiles[..., k]
        is_held = (low < x) & (x < high)
        for held, color in ((is_held, "C0"), (~is_held, "C3")):
            axes.vlines(x[held], low[held], high[held], color=color, alpha=0.4, linewidth=2)
            axes.plot(x[held], mean[held], "o", color=color, markersize=4)
        ends = [min(x.min(), low.min()).item(), max(x.max(), high.max()).item()]
        axes.plot(ends, ends, color="black", linewidth=0.8, linestyle="--")
        if name != "reported":
            axes.set(xscale="log", yscale="log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter(NullFormatter())
        axes.set(title=LATENTS[name], xlabel="truth")
        axes.grid(alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel("posterior")
    note = (
        "Posterior mean and 90 % interval\nof each outbreak, by one flow\n\nRed: the interval misses the truth,\n"
        "as one in ten should."
    )
    grid[1, 2].set_axis_off()
    grid[1, 2].text(0.05, 0.9, note, va="top", linespacing=1.4, transform=grid[1, 2].transAxes)
    return figure


def plot_forecasts(cases: Tensor, draws: Sequence[dict[str, Tensor]]) -> Figure:
    """Counts of several outbreaks, and what posteriors of the first weeks say about all weeks."""
    figure, grid = plt.subplots(2, 3, figsize=(12, 6.4), sharex=True, layout="constrained")
    days = torch.arange(1, NUM_FORECAST_DAYS + 1)
    is_seen = days <= NUM_DAYS
    for axes, counts, sites in zip(grid.flat, cases, draws, strict=False):
        predicted = Predictive(epidemic, sites, parallel=True)(NUM_FORECAST_DAYS)["cases"]
        low, lower, upper, high = predicted.quantile(QUANTILES, dim=0)
        axes.fill_between(days, low, high, color="C0", alpha=0.18, linewidth=0, label="90 %")
        axes.fill_between(days, lower, upper, color="C0", alpha=0.35, linewidth=0, label="50 %")
        axes.plot(days[is_seen], counts[is_seen], ".", color="black", markersize=4, label="seen")
        axes.plot(days[~is_seen], counts[~is_seen], ".", color="C1", markersize=4, label="came later")
        axes.axvline(NUM_DAYS + 0.5, color="black", linewidth=0.8, linestyle=":")
        axes.set(xlim=(0, NUM_FORECAST_DAYS), ylim=(0, 1.15 * max(high.max().item(), counts.max().item())))
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("day")
    for axes in grid[:, 0]:
        axes.set_ylabel("reported cases")
    grid[0, 0].legend(frameon=False)
    return figure


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # the tensors are small, and more threads only wait for each other
    pyro.set_rng_seed(args.seed)
    shared = {"seed": args.seed, "progress_bar": not args.no_progress_bar}

    start = time.perf_counter()
    amortized = pf.fit_amortized(
        epidemic,
        "cases",
        num_simulations=args.num_simulations,
        flow=make_flow,
        embedding=CurveEmbedding(),
        max_epochs=args.max_epochs,
        **shared,
    )
    print(f"{amortized}\nsimulated and trained in {time.perf_counter() - start:.0f} s\n")

    drawn = Predictive(epidemic, num_samples=args.num_outbreaks, parallel=True)(NUM_FORECAST_DAYS)
    truth, cases = scalars(drawn), drawn["cases"]
    outbreaks = cases[:, :NUM_DAYS]
    start = time.perf_counter()
    draws = scalars(amortized.sample(outbreaks, NUM_DRAWS))
    print(f"{len(draws)} outbreaks of {NUM_DAYS} days, {NUM_DRAWS} draws of the posterior of each", end=" ")
    print(f"in {time.perf_counter() - start:.1f} s")
    prior = scalars(Predictive(epidemic, num_samples=NUM_DRAWS, parallel=True)())
    print_errors(truth, draws, prior)

    start = time.perf_counter()
    posteriors = judged(amortized, outbreaks, not args.no_progress_bar)
    verdicts = Counter(posterior.diagnose().verdict for posterior in posteriors)
    counts = ", ".join(f"'{verdict}' {count}" for verdict, count in verdicts.most_common())
    print(f"verdicts by the likelihood: {counts} ({time.perf_counter() - start:.0f} s)")
    usable = [k for k, posterior in enumerate(posteriors) if posterior.diagnose().verdict != "do not use"]
    usable = usable or list(range(len(posteriors)))  # after a training that was too short
    worst = min(usable, key=lambda k: posteriors[k].ess)
    weighted = posteriors[worst].importance_sample(NUM_WEIGHTED)
    print(f"\noutbreak {worst + 1} needs its weights most, of those whose weights can be used:\n{weighted}")
    print_correction(truth[worst], draws[worst], scalars(weighted.resample(NUM_WEIGHTED)))

    def corrected(model: Any) -> pf.inference.WeightedDraws:
        return amortized.posterior(model.data["cases"]).importance_sample(NUM_DRAWS)

    calibrations = {}
    # Their data sets are none of those that the flow has seen.
    shared["seed"] += 1
    for name, fit in {"flow": amortized, "corrected": corrected}.items():
        start = time.perf_counter()
        found = pf.sbc(epidemic, fit, observed="cases", num_datasets=args.num_datasets, **shared)
        print(f"calibration of the {name} posteriors, {time.perf_counter() - start:.0f} s\n{found}\n")
        calibrations[f"calibration_{name}"] = found.plot()

    # Those with most cases in the last week have something left to forecast.
    shown = sorted(usable, key=lambda k: outbreaks[k, -7:].sum().item(), reverse=True)[:NUM_SHOWN_OUTBREAKS]
    forecasting = [posteriors[k].importance_sample(NUM_WEIGHTED).resample(NUM_DRAWS) for k in shown]
    pictures = {
        "recovery": plot_recovery(truth, draws),
        "forecasts": plot_forecasts(cases[shown], forecasting),
        **calibrations,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        path = args.output / f"amortized_inference_{name}.png"
        figure.savefig(path, dpi=DPI)
        print(f"saved {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Posteriors of many outbreaks by one training")
    parser.add_argument("--num-simulations", type=int, default=30_000, help="to train on (default: 30000)")
    parser.add_argument("--max-epochs", type=int, default=60, help="passes over them at most (default: 60)")
    parser.add_argument("--num-outbreaks", type=int, default=50, help="to infer (default: 50)")
    parser.add_argument("--num-datasets", type=int, default=100, help="of each calibration (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the pictures (default: output)")
    parser.add_argument("--no-progress-bar", action="store_true", help="train silently")
    main(parser.parse_args())
