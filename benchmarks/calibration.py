"""Whether FlowVI is calibrated on three models, whether planted errors are found, and how often an exact fit is blamed.

    python -m benchmarks.calibration fits --model eight_schools regression mixture
    python -m benchmarks.calibration exact --repeats 2000
    python -m benchmarks.calibration picture docs/images/calibration.png

"fits" calibrates FlowVI at its defaults, and then its draws with an error planted into the unconstrained space: the
distance of each component from its mean times 1.3 or divided by it, or the mean off by 0.3 sd; in all components, or in
the first alone. "exact" calibrates draws from exact Gaussian posteriors, without and with the same errors, many times.
"""

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.inference.calibration.quantities import COVERAGE, LOG_LIKELIHOOD, Component, levels
from pyroflows.inference.calibration.result import Calibration

SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
NUM_DATASETS, NUM_SAMPLES, NUM_EXACT = 100, 1000, 200


def eight_schools(sigma: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def regression(x: Tensor, y: Tensor | None = None) -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    slopes = pyro.sample("slopes", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("row", len(x)):
        pyro.sample(
            "y", dist.Normal(intercept[..., None] + (x * slopes[..., None, :]).sum(-1), sigma[..., None]), obs=y
        )


def mixture(num_rows: int, y: Tensor | None = None) -> None:
    share = pyro.sample("share", dist.Beta(3.0, 3.0))
    low = pyro.sample("low", dist.Normal(0.0, 2.0))
    gap = pyro.sample("gap", dist.LogNormal(1.0, 0.5))
    sigma = pyro.sample("sigma", dist.LogNormal(-0.5, 0.3))
    means = torch.stack([low, low + gap], -1)[..., None, :]
    shares = torch.stack([share, 1 - share], -1)[..., None, :]
    with pyro.plate("row", num_rows):
        parts = dist.Normal(means, sigma[..., None, None])
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(shares), parts), obs=y)


def covariates() -> Tensor:
    return torch.randn(30, 3, generator=torch.Generator().manual_seed(0))


MODELS = {"eight_schools": (eight_schools, SIGMA), "regression": (regression, covariates()), "mixture": (mixture, 60)}
Change = Callable[[Tensor], Tensor]


def planted(scale: float = 1.0, shift: float = 0.0, columns: slice = slice(None)) -> Change:
    def change(u: Tensor) -> Tensor:
        mean, sd = u.mean(0), u.std(0)
        moved = u.clone()
        moved[:, columns] = (mean + scale * (u - mean) + shift * sd)[:, columns]
        return moved

    return change


ERRORS: dict[str, Change] = {
    "none": lambda u: u,
    "sd times 1.3": planted(scale=1.3),
    "sd divided by 1.3": planted(scale=1 / 1.3),
    "mean off by 0.3 sd": planted(shift=0.3),
    "first component: sd times 1.3": planted(scale=1.3, columns=slice(1)),
    "first component: mean off by 0.3 sd": planted(shift=0.3, columns=slice(1)),
}


def calibrate_flow_vi(name: str, seed: int, picture: str | None) -> None:
    model, argument = MODELS[name]
    vi = pf.FlowVI(model, progress_bar=False)
    posteriors = []

    def fit(conditioned: Callable[..., None]) -> pf.Posterior:
        vi.model, vi.seed = conditioned, seed
        posteriors.append(vi.run(argument))
        return posteriors[-1]

    options = {"num_datasets": NUM_DATASETS, "num_samples": NUM_SAMPLES, "seed": seed}
    start = time.process_time()
    calibration = pf.sbc(model, fit, argument, **options)
    minutes = (time.process_time() - start) / 60
    gaussian = f"{sum(posterior.is_gaussian for posterior in posteriors)} of {len(posteriors)} posteriors are Gaussian"
    print(f"\n{name}, seed {seed}: {minutes:.1f} minutes of processor time; {gaussian}")
    print(calibration, flush=True)
    if picture:
        calibration.plot().savefig(f"{picture}.png", dpi=110)
        calibration.plot_coverage().savefig(f"{picture}_coverage.png", dpi=110)
    for error, change in list(ERRORS.items())[1:]:
        remaining = iter(posteriors)

        def changed(_: object, change: Change = change, remaining=remaining) -> dict[str, Tensor]:
            layout = (posterior := next(remaining)).layout
            return layout.constrain(change(layout.unconstrain(posterior.sample(NUM_SAMPLES))))[0]

        print(f"  {error}: {pf.sbc(model, changed, argument, **options, progress_bar=False).verdict}", flush=True)


def blame_exact(num_components: int, error: str, repeats: int) -> None:
    """Count how often Gaussian posteriors, exact or with an error, are not calibrated.

    Posteriors of all data sets are alike, with correlations of 0.3 between components. The prior is ten times as wide,
    and flat where they are, so that their log-density is the log-likelihood.
    """
    rng = np.random.default_rng(0)
    law = np.linalg.cholesky(0.7 * np.eye(num_components) + 0.3)
    inverse, change = np.linalg.inv(law), ERRORS[error]
    components = [Component("x", (i,), is_angle=False, is_constant=False) for i in range(num_components)]

    def quantities(x: np.ndarray, reference: np.ndarray) -> np.ndarray:
        likelihood = -0.5 * ((x @ inverse.T) ** 2).sum(-1)
        return np.column_stack([x, likelihood, np.linalg.norm(x - reference, axis=-1)])

    def is_blamed() -> bool:
        found = []
        for _ in range(NUM_DATASETS):
            true, draws = (rng.normal(size=(n, num_components)) @ law.T for n in (1, NUM_EXACT))
            changed = change(torch.from_numpy(draws)).numpy()
            reference = 10 * rng.normal(size=num_components)
            values = quantities(np.concatenate([true, changed]), reference)
            found.append(levels(values[0], values[1:], np.full(NUM_EXACT, 1 / NUM_EXACT), NUM_EXACT, rng))
        others = [LOG_LIKELIHOOD, COVERAGE]
        shapes = {"x": (num_components,)}
        return not Calibration(components, others, np.array(found), shapes, [NUM_EXACT], {}, "").is_calibrated

    share = sum(is_blamed() for _ in range(repeats)) / repeats
    se = (share * (1 - share) / repeats) ** 0.5
    print(f"{num_components} components, error {error}: not calibrated in {share:.1%} +- {se:.1%}", flush=True)


def linear(x: Tensor, y: Tensor | None = None) -> None:
    slopes = pyro.sample("slopes", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(offset[..., None] + (x * slopes[..., None, :]).sum(-1), 1.0), obs=y)


def picture_of_errors(path: str) -> None:
    """Draw the picture of the docs: exact draws of a regression, one slope too narrow and the offset shifted up."""
    x = torch.cat([covariates(), torch.ones(30, 1)], -1)
    covariance = torch.linalg.inv(x.T @ x + torch.eye(4))

    def fit(model: Callable[..., None]) -> dict[str, Tensor]:
        mean = covariance @ x.T @ model.data["y"]
        draws = dist.MultivariateNormal(mean, covariance).sample((NUM_SAMPLES,))
        draws = planted(scale=0.5, columns=slice(1, 2))(planted(shift=0.6, columns=slice(3, 4))(draws))
        return {"slopes": draws[:, :3], "offset": draws[:, 3]}

    calibration = pf.sbc(linear, fit, covariates(), num_datasets=NUM_DATASETS, seed=0, progress_bar=False)
    calibration.plot().savefig(path, dpi=110)
    print(calibration)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    fits = commands.add_parser("fits")
    fits.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    fits.add_argument("--seed", type=int, default=0)
    fits.add_argument("--picture", help="path of pictures, without ending; the model's name is added")
    exact = commands.add_parser("exact")
    exact.add_argument("--components", type=int, nargs="+", default=[1, 3, 10])
    exact.add_argument("--error", nargs="+", choices=ERRORS, default=list(ERRORS))
    exact.add_argument("--repeats", type=int, default=400)
    picture = commands.add_parser("picture")
    picture.add_argument("path")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, one thread")
    if options.command == "fits":
        for name in options.model:
            calibrate_flow_vi(name, options.seed, options.picture and f"{options.picture}_{name}")
    elif options.command == "picture":
        picture_of_errors(options.path)
    else:
        for num_components in options.components:
            for error in options.error:
                blame_exact(num_components, error, options.repeats)


if __name__ == "__main__":
    main()
