"""Tables of draws: mean, standard deviation, Monte Carlo error, quantiles and intervals of every component."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.inference.arviz import hdi
from pyroflows.inference.component_labels import NO_LABELS, ComponentLabels
from pyroflows.models.structure import ModelStructure

if TYPE_CHECKING:
    import pandas as pd

QUANTILES = (0.05, 0.5, 0.95)
# The highest-density interval holds as much as lies between the outer quantiles, so that the two can be compared.
HDI_PROB = 0.9
COLUMNS = ("mean", "sd", "mcse", *(f"{q:.0%}" for q in QUANTILES), "hdi_5%", "hdi_95%")
# A printed table leaves out sites with more components than this, and the rows in the middle beyond so many.
MAX_COMPONENTS, MAX_ROWS = 30, 60


@dataclass(frozen=True)
class Summary:
    r"""Draws, which are tabulated component by component.

    The columns are the mean; the standard deviation; ``mcse``, the Monte Carlo standard error of the mean; the
    quantiles 5 %, 50 % and 95 %; and the ends ``hdi_5%`` and ``hdi_95%`` of the shortest interval that holds 90 % of
    the draws. The error is :math:`s / \sqrt S` for S independent draws with standard deviation s, and
    :math:`\sqrt{\sum_i w_i^2 (x_i - \bar x)^2}` for draws with weights w that sum to one.

    The mean of an angle is its mean direction, and its other figures are those of the values that lie within half a
    turn of it. A categorical site has a row for each category, whose mean is the probability of it.

    Args:
        draws: tensors ``(S, *site shape)`` by site.
        structure: the structure of the model; None if there is none.
        labels: the labels of components.
        weights: weights ``(S,)`` that sum to one; None for equal weights.
        num_effective: a function from the draws ``(S,)`` of a component to the number of independent draws that their
            mean is worth; None where they are independent.
        figures: further columns by name, each by site, of the shape of the site.

    Example:
        >>> Summary({"x": torch.tensor([[1.0, 5.0], [3.0, 5.0]])}).table()[["mean", "sd", "5%"]]
              mean        sd   5%
        x[0]   2.0  1.414214  1.1
        x[1]   5.0  0.000000  5.0
    """

    draws: Mapping[str, Tensor]
    structure: ModelStructure | None = None
    labels: ComponentLabels = NO_LABELS
    weights: np.ndarray | None = None
    num_effective: Callable[[np.ndarray], float] | None = None
    figures: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)

    def table(self, var_names: Sequence[str] | None = None) -> "pd.DataFrame":
        """Tabulate every component, a row each, with pandas.

        Args:
            var_names: sites to show; None for :attr:`default_names`, and discrete latents that are not local to rows of
                data.

        Raises:
            OptionError: if there is no such site.
        """
        import pandas as pd

        names = [*self.default_names, *self._discrete_names] if var_names is None else self.checked(var_names)
        components = list(self.components(names))
        rows = [row for component in components for row in self._rows(*component)]
        labels = [label for component in components for label in self._labels(*component)]
        return pd.DataFrame(rows, labels, [*COLUMNS, *self.figures])

    def components(self, names: Sequence[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The sites and indices of components, except entries of masked latents that have no posterior."""
        kept = {} if self.structure is None else self.structure.kept
        for name in names:
            shape = self.draws[name].shape[1:]
            for index in kept.get(name, torch.tensor(True)).expand(shape).nonzero().tolist():
                yield name, tuple(index)

    @property
    def default_names(self) -> list[str]:
        """The sites that are shown by default.

        Deterministic sites in plates without latents are left out, since they have a value for each observation, and so
        are sites with ``obs_mask``, whose missing values are a latent's.
        """
        if self.structure is None:
            return list(self.draws)
        local = {plate for site in self.structure.latents for plate in site.plate_names} | {None}
        observed = {site.name for site in self.structure.observed}
        deterministic = [
            site.name
            for site in self.structure.deterministic
            if local.issuperset(site.plate_names) and f"{site.name}_observed" not in observed
        ]
        names = [*(site.name for site in self.structure.latents), *deterministic]
        return [name for name in names if name in self.draws]  # those in a subsampled plate have no draws

    def checked(self, var_names: Sequence[str]) -> list[str]:
        """The names of sites that a user gave.

        Raises:
            OptionError: if there is no such site.
        """
        names = [var_names] if isinstance(var_names, str) else list(var_names)
        if unknown := [name for name in names if name not in self.draws]:
            raise OptionError(f"there are no draws of {unknown}, only of {list(self.draws)}")
        return names

    def values(self, name: str, index: tuple[int, ...]) -> np.ndarray:
        """The draws ``(S,)`` of a component."""
        entries: Any = (slice(None), *index)
        values = self.draws[name][entries].detach().double().cpu().numpy()
        return around_mean_direction(values, self.weights_of(name, index)) if name in self._angles else values

    def weights_of(self, name: str, index: tuple[int, ...]) -> np.ndarray | None:
        """The weights ``(S,)`` of the draws of a component, which sum to one; None for equal weights."""
        return self.weights

    def __str__(self) -> str:
        """The table, with a line for each site that has too many components to show."""
        names = [*self.default_names, *self._discrete_names]
        sizes = {name: sum(1 for _ in self.components([name])) for name in names}
        short = [name for name, size in sizes.items() if size <= MAX_COMPONENTS]
        look: Any = {"float_format": "{:.3f}".format, "formatters": {"ess": "{:.0f}".format}, "max_rows": MAX_ROWS}
        lines = [self.table(short).to_string(**look)] if short else []
        return "\n".join([*lines, *(self._in_a_line(name, size) for name, size in sizes.items() if name not in short)])

    def _in_a_line(self, name: str, size: int) -> str:
        means = [np.average(self.values(*at), weights=self.weights_of(*at)) for at in self.components([name])]
        return f"{name}  {size:,} components, means from {min(means):.3g} to {max(means):.3g}: see summary(['{name}'])"

    def _rows(self, name: str, index: tuple[int, ...]) -> list[list[float]]:
        values = self.values(name, index)
        weights = self.weights_of(name, index)
        categories = self._categories.get(name)
        columns = [values] if categories is None else [(values == k).astype(float) for k in range(categories)]
        others = [figure[name][index] for figure in self.figures.values()]
        return [
            [*(self._plain_figures(v) if weights is None else weighted_figures(v, weights)), *others] for v in columns
        ]

    def _labels(self, name: str, index: tuple[int, ...]) -> list[str]:
        label = self.labels.component(name, index)
        categories = self._categories.get(name)
        return [label] if categories is None else [f"{label} = {k}" for k in range(categories)]

    @property
    def _discrete_names(self) -> list[str]:
        """The discrete latents that are shown by default."""
        if self.structure is None:
            return []
        names = [site.name for site in self.structure.enumerated if site.name not in self.structure.local]
        return [name for name in names if name in self.draws]

    @property
    def _categories(self) -> dict[str, int]:
        """The number of categories, by categorical latent."""
        sites = () if self.structure is None else self.structure.enumerated
        return {site.name: int(site.support.upper_bound) + 1 for site in sites if site.family == "Categorical"}  # type: ignore[union-attr]

    def _plain_figures(self, values: np.ndarray) -> list[float]:
        mean, sd = values.mean(), values.std(ddof=1)
        num = len(values) if self.num_effective is None else self.num_effective(values)
        return [mean, sd, sd / np.sqrt(num), *np.quantile(values, QUANTILES), *hdi(values, HDI_PROB)]

    @cached_property
    def _angles(self) -> set[str]:
        """The sites whose values are angles."""
        latents = () if self.structure is None else self.structure.latents
        return {site.name for site in latents if site.bijection is not None and site.bijection.center is not None}


def weighted_figures(values: np.ndarray, weights: np.ndarray) -> list[float]:
    """The columns of a table for draws with weights that sum to one.

    Args:
        values: the draws ``(S,)``.
        weights: their weights ``(S,)``.

    Example:
        >>> weighted_figures(np.array([1.0, 3.0, 9.0]), np.array([0.5, 0.5, 0.0]))[3:]
        [1.0, 1.0, 3.0, 1.0, 3.0]
    """
    order = np.argsort(values)
    order = order[weights[order] > 0]
    values, weights = values[order], weights[order]
    mean = np.sum(weights * values)
    squares = weights * (values - mean) ** 2
    with np.errstate(all="ignore"):  # one draw has all the weight, and no spread is known
        sd = np.sqrt(squares.sum() / (1 - np.sum(weights**2)))
    up_to = np.cumsum(weights)
    up_to /= up_to[-1]
    quantiles = values[np.searchsorted(up_to, QUANTILES)]
    # From each draw, the shortest interval that holds enough ends at the first draw up to which there is as much.
    ends = np.searchsorted(up_to, up_to - weights + HDI_PROB - 1e-9)
    starts = np.flatnonzero(ends < len(values))
    shortest = starts[np.argmin(values[ends[starts]] - values[starts])]
    columns = [mean, sd, np.sqrt(np.sum(weights * squares)), *quantiles, values[shortest], values[ends[shortest]]]
    return [float(value) for value in columns]


def around_mean_direction(angles: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Add turns to angles, so that they lie within half a turn of their mean direction.

    Args:
        angles: the angles ``(S,)``.
        weights: weights ``(S,)`` that sum to one; None for equal weights.

    Example:
        >>> around_mean_direction(np.array([3.0, -3.0])).round(2).tolist()
        [3.0, 3.28]
    """
    mean = np.arctan2(np.average(np.sin(angles), weights=weights), np.average(np.cos(angles), weights=weights))
    return mean + np.remainder(angles - mean + np.pi, 2 * np.pi) - np.pi
