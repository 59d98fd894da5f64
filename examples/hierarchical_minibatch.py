"""Varying intercepts and slopes of 2,000 groups and 200,000 rows, fitted from 200 groups at a time.

Each group has an intercept and a slope of its own, which are correlated over the groups. One flow has the law of the
globals. Another, which all groups share, has that of a group's two coefficients given the globals and what an encoder
makes of the rows of the group. The data are simulated, so that the truth is known. The script compares the globals with
the truth; with chains of a model of all rows from which the coefficients are integrated out by hand; and groups that
were never seen with the exact law of their coefficients given the globals. It saves a picture.

    python examples/hierarchical_minibatch.py
    python examples/hierarchical_minibatch.py --groups 500 --batch 100 --output pictures
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyroflows as pf

NAMES = ["mean[0]", "mean[1]", "spread[0]", "spread[1]", "corr", "sigma"]
MEAN, SPREAD, CORRELATION, SIGMA = torch.tensor([1.0, -0.5]), torch.tensor([0.8, 0.4]), 0.5, 1.5
TRUTH = torch.tensor([*MEAN, *SPREAD, CORRELATION, SIGMA])
NUM_DRAWS = 4000
DPI = 180


class Groups(NamedTuple):
    """Rows x and y, ``(groups, rows)``, and the true coefficients, ``(groups, 2)``."""

    x: Tensor
    y: Tensor
    coefficients: Tensor


def simulate(num_groups: int, num_rows: int) -> Groups:
    covariance = torch.diag(SPREAD**2)
    covariance[0, 1] = covariance[1, 0] = CORRELATION * SPREAD.prod()
    coefficients = dist.MultivariateNormal(MEAN, covariance).sample((num_groups,))
    x = torch.randn(num_groups, num_rows) + 0.5 * torch.randn(num_groups, 1)
    y = coefficients[:, :1] + coefficients[:, 1:] * x + SIGMA * torch.randn(num_groups, num_rows)
    return Groups(x, y, coefficients)


def sample_globals() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(1.0).expand([2]).to_event(1))
    corr = pyro.sample("corr", dist.Uniform(-1.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    return mean, spread, corr, sigma


def model(x: Tensor, y: Tensor, size: int | None = None) -> None:
    mean, spread, corr, sigma = sample_globals()
    with pyro.plate("group", len(x), subsample_size=size, dim=-2) as groups:
        intercept = pyro.sample("intercept", dist.Normal(mean[..., 0], spread[..., 0]))
        along = corr * (intercept - mean[..., 0]) / spread[..., 0]
        slope = pyro.sample(
            "slope", dist.Normal(mean[..., 1] + spread[..., 1] * along, spread[..., 1] * (1 - corr**2).sqrt())
        )
        with pyro.plate("row", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(intercept + slope * x[groups], sigma), obs=y[groups])


def encoder(groups: Tensor, x: Tensor, y: Tensor, size: int | None = None) -> Tensor:
    """The least squares of a group, and the mean and sd of its x: with sigma they suffice for its coefficients."""
    x, y = x[groups], y[groups]
    sd, mean = torch.std_mean(x, 1, correction=0)
    slope = ((x - mean[:, None]) * y).mean(1) / sd**2
    return torch.stack([y.mean(1) - slope * mean, slope, mean, sd], -1)


def without_coefficients(x: Tensor, y: Tensor) -> Callable[[], None]:
    """The model of all rows with its coefficients integrated out, by way of the least squares of the groups.

    Mean and slope of the y of a group are normal, and the squares that the line leaves have a gamma law. These suffice.
    """
    num_rows = x.shape[1]
    intercept, slope, at, sd = encoder(torch.arange(len(x)), x, y).T
    squares = (y - intercept[:, None] - slope[:, None] * x).square().sum(1)

    def marginal() -> None:
        mean, spread, corr, sigma = sample_globals()
        of_intercept, of_slope = spread[..., :1] ** 2, spread[..., 1:] ** 2
        both, noise = corr[..., None] * spread.prod(-1, keepdim=True), sigma[..., None] ** 2 / num_rows
        # Variances and covariance of slope and mean of y, where intercept and slope vary over groups.
        of_slopes = of_slope + noise / sd**2
        of_means = of_intercept + 2 * both * at + of_slope * at**2 + noise
        along = (both + of_slope * at) / of_slopes
        expected = mean[..., :1] + mean[..., 1:] * at + along * (slope - mean[..., 1:])
        given_slope = dist.Normal(expected, (of_means - along**2 * of_slopes).sqrt())
        pyro.sample("slopes", dist.Normal(mean[..., 1:], of_slopes.sqrt()).to_event(1), obs=slope)
        pyro.sample("means", given_slope.to_event(1), obs=intercept + slope * at)
        gamma = dist.Gamma((num_rows - 2) / 2, 1 / (2 * num_rows * noise.expand(*noise.shape[:-1], len(x))))
        pyro.sample("squares", gamma.to_event(1), obs=squares)

    return marginal


def globals_of(draws: dict[str, Tensor]) -> Tensor:
    """The globals in the order of ``NAMES``, ``(S, 6)``."""
    corr, sigma = (draws[name].reshape(-1, 1) for name in ("corr", "sigma"))
    return torch.cat([draws["mean"].reshape(-1, 2), draws["spread"].reshape(-1, 2), corr, sigma], -1)


def coefficients_of(draws: dict[str, Tensor]) -> Tensor:
    """The coefficients of groups, ``(S, groups, 2)``."""
    return torch.cat([draws["intercept"], draws["slope"]], -1)


def exact_law(draws: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sd of the coefficients of groups, exact given each draw of the globals, ``(groups, 2)``."""
    sigma = draws["sigma"].reshape(-1, 1, 1)
    mean, spread, corr = draws["mean"].reshape(-1, 2), draws["spread"].reshape(-1, 2), draws["corr"].reshape(-1)
    prior = torch.diag_embed(spread**2)
    prior[:, 0, 1] = prior[:, 1, 0] = corr * spread.prod(-1)
    of_prior = torch.linalg.inv(prior)[:, None]
    design = torch.stack([torch.ones_like(x), x], -1)
    covariance = torch.linalg.inv(of_prior + design.mT @ design / sigma[..., None] ** 2)
    of_data = (design.mT @ y[..., None])[..., 0] / sigma**2
    means = (covariance @ (of_data + (of_prior @ mean[:, None, :, None])[..., 0])[..., None])[..., 0]
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean(0) + means.var(0)
    return means.mean(0), variance.sqrt()


def fit(groups: Groups, size: int, args: argparse.Namespace) -> pf.Posterior:
    guide = pf.guides.AutoStructuredFlow(model, encoder=encoder)
    vi = pf.FlowVI(model, guide, num_steps=args.num_steps, progress_bar=not args.no_progress_bar)
    posterior = vi.run(groups.x, groups.y, size)
    print(f"{len(groups.x)} groups, {size} a step: {posterior.history.num_steps} steps in", end=" ")
    print(f"{posterior.outcome.seconds:.0f} s")
    return posterior


def print_globals(draws: Tensor, reference: Tensor, reference_sd: Tensor | None, name: str) -> None:
    """Means and sds of the globals, and their distance from a reference in sds of the reference or their own."""
    mean, sd = draws.mean(0), draws.std(0)
    columns = {"mean": mean, "sd": sd, name: reference}
    if reference_sd is not None:
        columns["its sd"] = reference_sd
    columns["diff/sd"] = (mean - reference) / (sd if reference_sd is None else reference_sd)
    table = pd.DataFrame({title: values.numpy() for title, values in columns.items()}, index=NAMES)
    print(table.to_string(float_format="{:.4f}".format), "\n")


def chains_of_all(groups: Groups, args: argparse.Namespace) -> Tensor:
    """Draws of the globals given all rows, by chains in the space of a fit of six latents."""
    shown = not args.no_progress_bar
    posterior = pf.FlowVI(without_coefficients(groups.x, groups.y), progress_bar=shown).run()
    chains = posterior.mcmc(args.num_chain_draws, 8, progress_bar=shown)
    print(f"chains of all rows: R-hat {max(values.max() for values in chains.rhat.values()):.3f}")
    return globals_of(chains.draws)


def compare_new_groups(posterior: pf.Posterior, new: Groups) -> None:
    local = posterior.local(new.x, new.y, num_samples=NUM_DRAWS)
    mean, sd = exact_law(local.draws, new.x, new.y)
    found = coefficients_of(local.draws)
    inside = (found.quantile(0.05, 0) < new.coefficients) & (new.coefficients < found.quantile(0.95, 0))
    print(f"{len(new.x)} groups that were never seen: {local.count('good')} verdicts are good; their means are")
    print(f"within {((found.mean(0) - mean) / sd).abs().max():.3f} sd of the exact ones given the globals, their sds")
    print(f"within {(found.std(0) / sd - 1).abs().max():.1%}; {inside.float().mean():.0%} of the true coefficients lie")
    print("in their 90 % intervals\n")


def save_picture(found: Tensor, reference: Tensor, posterior: pf.Posterior, groups: Groups, folder: Path) -> Path:
    """The globals beside chains and the truth, and how far coefficients shrink from the least squares of groups."""
    folder.mkdir(parents=True, exist_ok=True)
    draws = posterior.sample(NUM_DRAWS)
    figure = plt.figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[3, 2])
    columns = zip(left.subplots(2, 3).flat, NAMES, found.T, reference.T, TRUTH, strict=True)
    for axis, name, values, of_chains, truth in columns:
        axis.hist(values.numpy(), 40, density=True, color="C0", alpha=0.7)
        axis.hist(of_chains.numpy(), 40, density=True, histtype="step", color="black")
        axis.axvline(truth, color="C3", linestyle="--")
        axis.set(title=name, yticks=[])
        axis.locator_params(axis="x", nbins=3)
    left.suptitle("Globals from minibatches, by chains (outline), truth (dashed)")
    chosen = slice(min(40, len(groups.x)))
    own = encoder(torch.arange(len(groups.x)), groups.x, groups.y)[chosen, :2]
    shrunk = coefficients_of(draws).mean(0)[chosen]
    axis = right.subplots()
    for start, end in zip(own, shrunk, strict=True):
        axis.annotate("", xy=end.tolist(), xytext=start.tolist(), arrowprops={"arrowstyle": "->", "color": "gray"})
    axis.plot(*own.T, "o", color="C1", markersize=4, label="least squares of the group")
    axis.plot(*shrunk.T, "o", color="C0", markersize=4, label="posterior mean")
    axis.plot(*found.mean(0)[:2], "k+", markersize=14, label="mean of all groups")
    axis.set(xlabel="intercept", ylabel="slope")
    axis.legend(loc="upper left")
    right.suptitle(f"{len(shrunk)} of {len(groups.x)} groups")
    path = folder / "hierarchical_minibatch.png"
    figure.savefig(path, dpi=DPI)
    return path


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # the tensors are small, and more threads only wait for each other
    pyro.set_rng_seed(args.seed)
    groups = simulate(args.groups, args.rows)
    print(f"{args.groups} groups of {args.rows} rows\n")
    posterior = fit(groups, args.batch, args)
    draws = globals_of(posterior.sample(NUM_DRAWS))
    print_globals(draws, TRUTH, None, "truth")
    reference = chains_of_all(groups, args)
    print_globals(draws, reference.mean(0), reference.std(0), "chains")
    compare_new_groups(posterior, simulate(200, args.rows))
    print(f"saved {save_picture(draws, reference, posterior, groups, args.output)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Varying intercepts and slopes from minibatches of groups")
    parser.add_argument("--groups", type=int, default=2000, help="number of groups (default: 2000)")
    parser.add_argument("--rows", type=int, default=100, help="rows of each group (default: 100)")
    parser.add_argument("--batch", type=int, default=200, help="groups that a step sees (default: 200)")
    parser.add_argument("-n", "--num-steps", type=int, help="training steps (default: as many as it takes)")
    parser.add_argument("--num-chain-draws", type=int, default=200, help="draws of each chain (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the picture (default: output)")
    parser.add_argument("--no-progress-bar", action="store_true", help="train silently")
    main(parser.parse_args())
