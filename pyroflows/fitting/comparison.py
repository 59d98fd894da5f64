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
from pyroflows.fitting.maximum_likelihood import log_probs
from pyroflows.flows import Flow
from pyroflows.grad_mode import isolated
from pyroflows.interruption import keeping
from pyroflows.options import checked_fraction, kind
from pyroflows.randomness import seeded
from pyroflows.training.data import load
from pyroflows.training.objective import trained_parameters
from pyroflows.training.shuffling import split
from pyroflows.transforms.normalization import Standardize


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


@isolated
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
        flows: the flows by name, of one event size. They must be new: one that was fitted or adapted before may have
            seen the rows that are set aside.
        x: rows ``(n, *event_shape)``.
        context: rows ``(n, *context_shape)``, if the flows take a context.
        weights: weights of the rows ``(n,)``, not negative; None for equal weights.
        test: fraction of the rows that is set aside for the comparison, between 0 and 1.
        seed: as for :func:`pyroflows.fit_density`; None to draw one.
        options: options of :func:`pyroflows.fit_density`. Of integers, ``dequantization="uniform"`` gives the test rows
            the same noise under all flows.

    Raises:
        OptionError: if there is no flow, or one is not new, or stands under two names; or if an option is outside its
            range.
        ShapeError: if numbers of rows or columns of the data do not fit.
        DataError: if values cannot be used; the message names the row or the columns.
        DivergedError: if log-densities stay non-finite.
        FitInterrupted: if the fits are interrupted, such as by Ctrl-C; its ``result`` compares the flows that were
            fitted by then.

    Example:
        >>> flows = {"MAF": pf.flows.MAF(2, num_layers=2), "NSF": pf.flows.NSF(2, num_layers=2)}
        >>> found = pf.compare_densities(flows, torch.randn(500, 2), max_epochs=5, seed=0, progress_bar=False)
        >>> found.best in flows, found.lead("MAF", "MAF")
        (True, (0.0, 0.0))
    """
    _check_flows(flows)
    checked_fraction("test", test)
    are_integers = _checked_dequantization(options.get("dequantization")) is not None
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    fits: dict[str, DensityFit] = {}
    scores: dict[str, np.ndarray] = {}
    held_out_weights = np.empty(0)

    def found(_: Any = None) -> DensityComparison | None:
        return DensityComparison({name: fits[name] for name in scores}, scores, held_out_weights) if scores else None

    with keeping("the comparison", found, least="a fit"):
        for name, flow in flows.items():
            with seeded(seed):
                rows = load(flow, x, context, weights, are_integers).rows
                training, held_out = (rows[index] for index in split(rows, test))
            # A fit adds noise of its own to integers.
            given = training.x.floor() if are_integers else training.x
            fits[name] = fit_density(flow, given, training.context, training.weights, seed=seed, **options)
            with pyro.validation_enabled(False):
                held_out_weights = held_out.weights.double().cpu().numpy()
                scores[name] = log_probs(flow, held_out).double().cpu().numpy()
    return DensityComparison(fits, scores, held_out_weights)


def _checked_dequantization(dequantization: Any) -> Any:
    """Return the option if it is the same for each flow; a flow that draws noise is trained for one density alone."""
    if isinstance(dequantization, Flow):
        raise OptionError(
            'compare_densities compares flows under the same noise, dequantization="uniform": of fits with a noise of '
            "their own, compare pf.bits_per_dim on rows that none of them has seen"
        )
    return dequantization


def _check_flows(flows: Mapping[str, Flow]) -> None:
    """Raise if these are no flows by name, or one has learned from rows before, or shares parameters with another."""
    if not isinstance(flows, Mapping):
        raise OptionError(f'compare_densities takes flows by name, such as {{"NSF": flow}}, but got {kind(flows)}')
    if not flows:
        raise OptionError("compare_densities needs at least one flow")
    owners: dict[int, str] = {}
    for name, flow in flows.items():
        if not isinstance(name, str):
            raise OptionError(f"names of flows must be strings, got {name!r}")
        if not isinstance(flow, Flow):
            raise OptionError(f"compare_densities takes pyroflows.Flow objects by name, but {name!r} is {kind(flow)}")
        if _has_learned(flow):
            raise OptionError(
                f"flow {name!r} was fitted or adapted to rows before, which may be among those that the comparison "
                "sets aside to test with: give a new one"
            )
        for parameter in trained_parameters(flow):
            if (other := owners.setdefault(id(parameter), name)) != name:
                raise OptionError(
                    f"flows {other!r} and {name!r} have parameters in common, so that the second fit would change the "
                    "first flow: make a flow for each name"
                )
    if len({flow.support.is_discrete for flow in flows.values()}) > 1:
        raise OptionError(
            "compare_densities compares densities of real numbers, or probabilities of categories, but not one with "
            "the other: of integers, compare pf.bits_per_dim on rows that none of the flows has seen"
        )


def _has_learned(flow: Flow) -> bool:
    """Tell whether a layer holds what it learned from rows, such as location and scale, which a first fit gives it.

    A user may have given a ``Standardize`` its location and scale. A flow without layers that learn from rows before
    training, such as one of angles alone, does not show whether it was fitted.
    """
    added = [part.standardization for part in flow.modules() if isinstance(part, Flow)]
    learners = [part for part in flow.modules() if type(part) is not Standardize or part in added]
    return any(bool(part._buffers.get("adapted")) for part in learners)
