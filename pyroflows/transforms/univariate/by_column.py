"""A univariate map of its own for each column."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.transforms.univariate.base import Pair, Univariate


class ByColumn:
    r"""Univariate maps :math:`x_j = T_j(z_j; \theta_j)`, a kind of its own for each column, such as splines for real
    numbers and circular splines for angles.

    A list of maps as ``univariate`` of a structure becomes one. Neighbours of one kind are computed together.

    Args:
        maps: the map of each column.

    Shapes: z and x are ``(..., D)``, theta is ``(..., D, P)`` with P the largest number of parameters of a map; a map
    with fewer uses the first.

    Raises:
        OptionError: if there is no map.

    Example:
        >>> from pyroflows.transforms.univariate import Affine, Spline
        >>> maps = ByColumn([Affine(), Spline(bins=4)])
        >>> x, ladj = maps.forward_and_ladj(torch.zeros(5, 2), torch.zeros(5, 2, maps.num_params))
        >>> x.shape, ladj.shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    def __init__(self, maps: Sequence[Univariate]) -> None:
        if not maps:
            raise OptionError("a list of univariate maps needs one for each column, but is empty")
        self.maps = list(maps)
        self.num_params = max(univariate.num_params for univariate in maps)
        self._runs = [(run[0], len(run)) for run in (list(same) for _, same in groupby(maps, key=repr))]

    def forward_and_ladj(self, z: Tensor, theta: Tensor) -> Pair:
        return self._in_runs("forward_and_ladj", z, theta)

    def inverse_and_ladj(self, x: Tensor, theta: Tensor) -> Pair:
        return self._in_runs("inverse_and_ladj", x, theta)

    def _in_runs(self, method: str, value: Tensor, theta: Tensor) -> Pair:
        lengths = [length for _, length in self._runs]
        parts = zip(self._runs, value.split(lengths, -1), theta.split(lengths, -2), strict=True)
        pairs = [getattr(univariate, method)(v, t[..., : univariate.num_params]) for (univariate, _), v, t in parts]
        results, ladjs = zip(*pairs, strict=True)
        return torch.cat(results, -1), torch.cat(ladjs, -1)

    def __repr__(self) -> str:
        return f"ByColumn({self.maps})"


class _OneOf:
    """The map of one column, which takes as many parameters as the widest of all columns."""

    def __init__(self, univariate: Univariate, num_params: int) -> None:
        self.univariate = univariate
        self.num_params = num_params

    def forward_and_ladj(self, z: Tensor, theta: Tensor) -> Pair:
        return self.univariate.forward_and_ladj(z, theta[..., : self.univariate.num_params])

    def inverse_and_ladj(self, x: Tensor, theta: Tensor) -> Pair:
        return self.univariate.inverse_and_ladj(x, theta[..., : self.univariate.num_params])


def of_column(univariate: Univariate, column: int) -> Univariate:
    """Return the map of one column, on tensors that lack the axis of columns."""
    return _OneOf(univariate.maps[column], univariate.num_params) if isinstance(univariate, ByColumn) else univariate


def of_columns(univariate: Univariate, columns: Sequence[int]) -> Univariate:
    """Return the map of some columns."""
    return ByColumn([univariate.maps[j] for j in columns]) if isinstance(univariate, ByColumn) else univariate


def checked_columns(univariate: Univariate, event_shape: torch.Size, layer: str) -> list[bool]:
    """Return which indices along the last axis of an event are angles.

    Raises:
        OptionError: if there are maps by column, but not one for each element of a vector.
    """
    if not isinstance(univariate, ByColumn):
        return [getattr(univariate, "is_circular", False)] * event_shape[-1]
    if event_shape != (len(univariate.maps),):
        raise OptionError(
            f"{layer} has {len(univariate.maps)} univariate maps for events of shape {tuple(event_shape)}: give one "
            "for each element of a vector, or one for all"
        )
    return [getattr(part, "is_circular", False) for part in univariate.maps]
