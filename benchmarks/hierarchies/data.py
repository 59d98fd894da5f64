"""Simulated data of the hierarchies, by NumPy with fixed seeds, so that both environments have the same."""

from collections.abc import Callable
from functools import partial

import numpy as np

Data = dict[str, np.ndarray]

NUM_COUNTIES, NUM_HOUSES = 40, 430
NUM_DAYS = 150
NUM_PERSONS, NUM_ITEMS = 200, 16
NUM_BINS = 40
OBSERVATIONS_A_GROUP = 5
SIZES = (1000, 3000, 10_000)


def radon() -> Data:
    """Log radon of houses in counties, which hold few houses or many; floor is 1 where the basement is not measured."""
    rng = np.random.default_rng(1)
    uranium = rng.normal(0.0, 0.4, NUM_COUNTIES)
    intercept = rng.normal(1.5 + 0.7 * uranium, 0.3)
    slope = rng.normal(-0.7, 0.3, NUM_COUNTIES)
    sizes = rng.dirichlet(np.full(NUM_COUNTIES, 0.8))
    # Each county has a house.
    county = np.sort(
        np.concatenate([np.arange(NUM_COUNTIES), rng.choice(NUM_COUNTIES, NUM_HOUSES - NUM_COUNTIES, p=sizes)])
    )
    floor = (rng.random(NUM_HOUSES) < 0.2).astype(float)
    y = rng.normal(intercept[county] + slope[county] * floor, 0.75)
    return {"county": county, "floor": floor, "uranium": uranium, "y": y}


def volatility() -> Data:
    """Returns whose log-volatility is an autoregression, with the values of Stan's manual."""
    rng = np.random.default_rng(2)
    mu, phi, sigma = -1.02, 0.95, 0.25
    h = np.empty(NUM_DAYS)
    h[0] = rng.normal(mu, sigma / np.sqrt(1 - phi**2))
    for t in range(1, NUM_DAYS):
        h[t] = rng.normal(mu + phi * (h[t - 1] - mu), sigma)
    return {"y": rng.normal(0.0, np.exp(h / 2))}


def items() -> Data:
    """Answers of persons to items, ``(persons, items)``."""
    rng = np.random.default_rng(3)
    ability = rng.normal(0.0, 1.0, NUM_PERSONS)
    discrimination = rng.lognormal(0.0, 0.5, NUM_ITEMS)
    difficulty = rng.normal(0.0, 1.0, NUM_ITEMS)
    logits = discrimination * (ability[:, None] - difficulty)
    return {"y": (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float)}


def cox_process() -> Data:
    """Counts of events in bins between 0 and 1, whose log intensity is smooth."""
    rng = np.random.default_rng(4)
    x = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
    covariance = 0.8**2 * np.exp(-0.5 * ((x[:, None] - x) / 0.15) ** 2) + 1e-6 * np.eye(NUM_BINS)
    f = 1.2 + np.linalg.cholesky(covariance) @ rng.normal(size=NUM_BINS)
    return {"x": x, "y": rng.poisson(np.exp(f)).astype(float)}


def schools() -> Data:
    """The coaching effects of Rubin (1981) and their standard errors."""
    return {
        "y": np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
        "sigma": np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
    }


def funnel() -> Data:
    """There are no data."""
    return {}


def _rows(rng: np.random.Generator, num_groups: int) -> np.ndarray:
    """The group of each row, with 3 to 7 rows a group."""
    sizes = rng.integers(OBSERVATIONS_A_GROUP - 2, OBSERVATIONS_A_GROUP + 3, num_groups)
    return np.repeat(np.arange(num_groups), sizes)


def gaussian_groups(num_groups: int) -> Data:
    rng = np.random.default_rng(5)
    group = _rows(rng, num_groups)
    mean = rng.normal(1.0, 0.7, num_groups)
    return {"group": group, "y": rng.normal(mean[group], 1.0)}


def poisson_groups(num_groups: int) -> Data:
    rng = np.random.default_rng(6)
    group = _rows(rng, num_groups)
    rate = rng.lognormal(0.5, 0.6, num_groups)
    return {"group": group, "y": rng.poisson(rate[group]).astype(float)}


DATA: dict[str, Callable[[], Data]] = {
    "radon": radon,
    "volatility": volatility,
    "volatility_loop": volatility,
    "items": items,
    "cox_process": cox_process,
    "schools": schools,
    "funnel": funnel,
    **{f"gaussian_{n}": partial(gaussian_groups, n) for n in SIZES},
    **{f"poisson_{n}": partial(poisson_groups, n) for n in SIZES},
}
# In float32 the covariance of the Gaussian process is singular.
IN_FLOAT64 = ("cox_process",)
