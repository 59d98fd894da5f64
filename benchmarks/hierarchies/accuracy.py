"""How far draws are from the means and standard deviations of a long run, by their worst scalar component."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Moments = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Accuracy:
    """The worst over all scalar components.

    Args:
        mean_error: of ``abs(mean - reference mean) / reference sd``.
        mean_at: the component where it is, such as ``theta[3]``.
        sd_ratio: sd / reference sd, the one farthest from 1.
        sd_at: the component where it is.
    """

    mean_error: float
    mean_at: str
    sd_ratio: float
    sd_at: str


def moments(draws: Mapping[str, np.ndarray], weights: np.ndarray | None = None) -> Moments:
    """Mean and sd, by site, of draws ``(S, *shape)`` with weights ``(S,)`` that sum to one, or equal ones."""
    found = {}
    for name, values in draws.items():
        x = values.reshape(len(values), -1).astype(np.float64)
        mean = np.average(x, 0, weights)
        found[name] = (mean, np.average((x - mean) ** 2, 0, weights) ** 0.5)
    return found


def accuracy(found: Moments, reference: Moments) -> Accuracy:
    """Compare all sites of the reference."""
    labels = [f"{name}[{i}]" for name, (mean, _) in reference.items() for i in range(mean.size)]
    mean, sd = (np.concatenate([found[name][i] for name in reference]) for i in (0, 1))
    ref_mean, ref_sd = (np.concatenate([reference[name][i] for name in reference]) for i in (0, 1))
    errors, ratios = np.abs(mean - ref_mean) / ref_sd, sd / ref_sd
    worst_mean = int(errors.argmax())
    worst_sd = int(np.abs(np.log(np.maximum(ratios, 1e-9))).argmax())
    return Accuracy(float(errors[worst_mean]), labels[worst_mean], float(ratios[worst_sd]), labels[worst_sd])


def save(folder: Path, name: str, found: Moments) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"{site}/{kind}": a for site, pair in found.items() for kind, a in zip(("mean", "sd"), pair, strict=True)}
    np.savez(folder / f"{name}.npz", **arrays)


def load(folder: Path, name: str) -> Moments | None:
    """Means and standard deviations of a long run; None if there is none."""
    path = folder / f"{name}.npz"
    if not path.exists():
        return None
    with np.load(path) as arrays:
        sites = dict.fromkeys(key.rpartition("/")[0] for key in arrays)
        return {site: (arrays[f"{site}/mean"], arrays[f"{site}/sd"]) for site in sites}
