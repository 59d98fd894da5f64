"""The quantities whose ranks are tested: components of latents, log-likelihood, distance from a reference point."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pyroflows.inference.calibration.fits import Draws
from pyroflows.inference.calibration.likelihood import LogLikelihood
from pyroflows.inference.calibration.simulation import Simulations
from pyroflows.models.structure import Site

LOG_LIKELIHOOD = "log-likelihood"
COVERAGE = "coverage (TARP)"


@dataclass(frozen=True, eq=False)
class Component:
    """A scalar component of a latent.

    Args:
        site: the name of the latent.
        index: its place in the site's value, empty for a scalar.
        is_angle: whether it lies on a circle.
        is_constant: whether it is the same in all draws from the prior, such as the diagonal of a correlation matrix.
    """

    site: str
    index: tuple[int, ...]
    is_angle: bool
    is_constant: bool

    @property
    def label(self) -> str:
        """Its name, such as ``"theta[0]"``."""
        return f"{self.site}[{', '.join(map(str, self.index))}]" if self.index else self.site


class Quantities:
    r"""The levels of true values among the draws of a fit, one for each quantity.

    The quantities are the components of the latents, then the log-likelihood if there is one, then the distance from a
    random reference point, whose levels are the credibility levels of TARP (Lemos et al. 2023, arXiv:2302.03026): the
    share of draws that are nearer to it than the true value is the smallest level whose region around the point holds
    the true value. The reference points are draws from the prior. Distances are Euclidean, in coordinates that are
    standardised by median and interquartile range of the prior; :math:`\operatorname{arsinh}` of them keeps priors with
    heavy tails from deciding alone, and an angle has its cosine and sine as coordinates.

    An angle is measured from the mean direction of the draws and the true value, so that "up" is counterclockwise
    from there.

    Args:
        simulations: the true values, the data and the reference points.
        log_likelihood: the log-likelihood, None to leave it out.
        rng: breaks ties at random.
    """

    def __init__(
        self, simulations: Simulations, log_likelihood: LogLikelihood | None, rng: np.random.Generator
    ) -> None:
        self._simulations, self._log_likelihood, self._rng = simulations, log_likelihood, rng
        self._true = self._flat(simulations.latents)
        self._references = self._flat(simulations.references)
        is_constant = (np.ptp(self._true, 0) == 0) & (np.ptp(self._references, 0) == 0)
        places = [(site, index) for site in simulations.structure.latents for index in np.ndindex(*site.shape)]
        self.components = [
            Component(site.name, index, _is_angle(site), bool(constant))
            for (site, index), constant in zip(places, is_constant, strict=True)
        ]
        self.others = [*([LOG_LIKELIHOOD] if log_likelihood else []), COVERAGE]

    def levels(self, number: int, draws: Draws) -> np.ndarray:
        """The level of each quantity's true value, between 0 and 1.

        Args:
            number: the number of the data set.
            draws: the draws of the fit to it.
        """
        # The true value stands in the first row, so that all is computed for it and the draws alike.
        latents = {
            name: torch.cat([value[number : number + 1].to(draws.values[name].device), draws.values[name]])
            for name, value in self._simulations.latents.items()
        }
        x = self._flat(latents)
        others = [np.linalg.norm(self._coordinates(x) - self._coordinates(self._references[number]), axis=-1)]
        if self._log_likelihood is not None:
            data = {name: value[number] for name, value in self._simulations.data.items()}
            others.insert(0, self._log_likelihood(latents, data).cpu().numpy())
        x = np.column_stack([self._unwrapped(x, draws), *others])
        return levels(x[0], x[1:], draws.weights, draws.num_effective, self._rng)

    def _flat(self, values: Mapping[str, Tensor]) -> np.ndarray:
        """Values ``(S, *site shape)`` by site as ``(S, C)``."""
        parts = [values[site.name] for site in self._simulations.structure.latents]
        return torch.cat([part.reshape(len(part), -1).cpu().double() for part in parts], -1).numpy()

    def _coordinates(self, x: np.ndarray) -> np.ndarray:
        median, scale, is_angle = self._standard
        linear = np.arcsinh((x - median) / scale)[..., ~is_angle]
        return np.concatenate([linear, np.cos(x[..., is_angle]), np.sin(x[..., is_angle])], -1)

    @cached_property
    def _standard(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        low, median, high = np.quantile(np.concatenate([self._true, self._references]), [0.25, 0.5, 0.75], axis=0)
        return median, np.where(high > low, high - low, 1.0), self._is_angle

    @cached_property
    def _is_angle(self) -> np.ndarray:
        return np.array([component.is_angle for component in self.components])

    def _unwrapped(self, x: np.ndarray, draws: Draws) -> np.ndarray:
        """Turn angles, so that the circle is cut opposite to the mean direction of all rows.

        The true value, in the first row, counts as one draw: otherwise it would have another law than the draws.
        """
        if not self._is_angle.any():
            return x
        points = np.exp(1j * x)
        mean = np.angle(points[0] + draws.num_effective * (draws.weights @ points[1:]))
        return np.where(self._is_angle, np.remainder(x - mean + np.pi, 2 * np.pi), x)


def levels(
    true: np.ndarray, draws: np.ndarray, weights: np.ndarray, num_effective: float, rng: np.random.Generator
) -> np.ndarray:
    r"""The levels of true values ``(C,)`` among weighted draws ``(S, C)``, uniform between 0 and 1 if the fit is exact.

    .. math:: u = \frac{n F + v\,(1 + n T)}{n + 1}

    with the weight F of the draws below the true value, the weight T of those equal to it, and v uniform. For n
    independent draws of equal weight, :math:`n F` is the rank of the true value, ties are broken at random, and u is
    exactly uniform. For weighted or dependent draws n is their effective number, and u is uniform up to terms of the
    order of 1/n.

    Example:
        >>> draws = np.arange(9.0)[:, None]
        >>> level = levels(np.array([2.5]), draws, np.full(9, 1 / 9), 9, np.random.default_rng(0))
        >>> bool(0.3 <= level[0] <= 0.4)  # the rank 3 of 0 to 9
        True
    """
    below, tied = weights @ (draws < true), weights @ (draws == true)
    noise = rng.uniform(size=true.shape)
    return (num_effective * below + noise * (1 + num_effective * tied)) / (num_effective + 1)


def _is_angle(site: Site) -> bool:
    return site.bijection is not None and site.bijection.center is not None
