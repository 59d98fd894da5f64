"""Compare flows as densities of the same data, on rows that none of them was fitted to."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch

from pyroflows.arrays import ArrayLike
from pyroflows.errors import OptionError
from pyroflows.fitting.density import DensityFit, fit_density
from pyroflows.flows import Flow
from pyroflows.randomness import seeded
from pyroflows.training.data import load, split


@dataclass(frozen=True)
class DensityComparison:
    """A comparison is what :func:`compare_densities` returns; it prints as a table, the best flow first.

    Args:
        fits: the fit of each flow by name.
        log_probs: the log-densities ``(m,)`` of the test rows by name, in the same order of rows.
        weights: the weights ``(m,)`` of the test rows.

    Example:
        >>> flows = {"MAF": pf.flows.MAF(2, num_layers=2), "Gaussian": pf.flows.Gaussian(2)}
        >>> pf.compare_densities(flows, torch.randn(500, 2), max_epochs=5, seed=0, progress_bar=False)
        flow       test log-density   below the best    epochs
        ...
    """

    fits: dict[str, DensityFit]
    log_probs: dict[str, np.ndarray]
    weights: np.ndarray

    def log_prob(self, name: str) -> float:
        """Return the weighted mean log-density of the test rows under a flow, in nats a row."""
        return float(np.average(self.log_probs[name], weights=self.weights))

    @property
    def best(self) -> str:
        """The name of the flow with the highest mean log-density of the test rows."""
        return max(self.log_probs, key=self.log_prob)

    def lead(self, name: str, other: str) -> tuple[float, float]:
        """Return by how much one flow is better than another: the mean difference over test rows, and its error.

        The standard error is that of paired differences, since all flows score the same rows. It does not contain the
        luck of an initial state, of a split or of batches, which other seeds show.
        """
        shares = self.weights / self.weights.sum()
        difference = self.log_probs[name] - self.log_probs[other]
        mean = float(shares @ difference)
        return mean, math.sqrt(shares**2 @ (difference - mean) ** 2)

    def __repr__(self) -> str:
        width = max(10, *(len(name) for name in self.fits))
        lines = [f"{'flow':{width}} test log-density   below the best    epochs"]
        for name in sorted(self.fits, key=self.log_prob, reverse=True):
            lead, error = self.lead(self.best, name)
            below = "" if name == self.best else f"{lead:.3f} ± {error:.3f}"
            epochs = f"{self.fits[name].history.num_steps}{'+' if self.fits[name].still_improving else ''}"
            lines.append(f"{name:{width}} {self.log_prob(name):16.3f}   {below:16} {epochs:>7}")
        if any(fit.still_improving for fit in self.fits.values()):
            lines.append("+ was still improving where max_epochs ended the fit")
        return "\n".join(lines)


def compare_densities(
    flows: Mapping[str, Flow],
    x: ArrayLike,
    context: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    test: float = 0.2,
    seed: int | None = None,
    **options: Any,
) -> DensityComparison:
    """Fit several flows to the same rows, and score all of them on rows that none has seen.

    Each flow is fitted in place by :func:`pyroflows.fit_density`, all with the same training and validation rows.

    Args:
        flows: the flows by name, of one event size.
        x: rows ``(n, *event_shape)``.
        context: rows ``(n, *context_shape)``, if the flows take a context.
        weights: weights of the rows ``(n,)``, not negative; None for equal weights.
        test: fraction of the rows that is set aside for the comparison, between 0 and 1.
        seed: as for :func:`pyroflows.fit_density`; None to draw one.
        options: options of :func:`pyroflows.fit_density`.

    Raises:
        OptionError: if there is no flow, or an option is outside its range.
        ShapeError: if numbers of rows or columns of the data do not fit.
        DataError: if values cannot be used; the message names the row or the columns.
        DivergedError: if log-densities stay non-finite.

    Example:
        >>> flows = {"MAF": pf.flows.MAF(2, num_layers=2), "NSF": pf.flows.NSF(2, num_layers=2)}
        >>> found = pf.compare_densities(flows, torch.randn(500, 2), max_epochs=5, seed=0, progress_bar=False)
        >>> found.best in flows, found.lead("MAF", "MAF")
        (True, (0.0, 0.0))
    """
    if not flows:
        raise OptionError("compare_densities needs at least one flow")
    if not 0 < test < 1:
        raise OptionError(f"test must be a fraction of the rows, between 0 and 1, got {test}")
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    fits, log_probs, held_out_weights = {}, {}, np.empty(0)
    for name, flow in flows.items():
        with seeded(seed):
            rows = load(flow, x, context, weights).rows
            training, held_out = (rows[index] for index in split(rows, test))
        fits[name] = fit_density(flow, training.x, training.context, training.weights, seed=seed, **options)
        with torch.no_grad(), pyro.validation_enabled(False):
            log_prob = flow(held_out.context).log_prob(held_out.x)
        log_probs[name] = log_prob.double().cpu().numpy()
        held_out_weights = held_out.weights.double().cpu().numpy()
    return DensityComparison(fits, log_probs, held_out_weights)
