"""Split the rows of a fit into those to train on and those to validate with, and shuffle them into batches."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pyroflows.errors import DataError
from pyroflows.shapes import listed, places
from pyroflows.training.data import Rows


def split(rows: Rows, validation: float, may_be_constant: bool = False) -> tuple[Tensor, Tensor]:
    """Draw the indices of training rows and of validation rows; rows of weight zero are in neither.

    Equal rows, such as those of a bootstrap or repeated measurements, are all on one side: what a flow has learned by
    heart would look good on copies of it. A row that stands in the data more often than rows are to be validated with
    is no repetition but a point mass of the law, and has copies on both sides.

    Args:
        rows: all rows.
        validation: the fraction of the rows to validate with, between 0 and 1. Rows with a wild element (see
            :class:`Rows`) are trained on, but not validated with: the log-density of a single one would outweigh that
            of all others.
        may_be_constant: whether a column may be constant, as one of a discrete law may.

    Returns:
        The indices ``(n,)`` of the training rows, and those ``(m,)`` of the validation rows.

    Raises:
        DataError: if one side has too few rows, or a column is constant in the training rows.
    """
    used = rows.weights.nonzero().flatten()
    is_wild = rows.is_wild[used]
    ordinary, wild = used[~is_wild], used[is_wild]
    num_validation = min(round(validation * len(used)), len(ordinary))
    ordinary, sizes = _shuffled_by_group(ordinary, rows.group[ordinary], num_validation)
    ends = torch.cat([sizes.new_zeros(1), sizes.flip(0).cumsum(0)])
    num_validation = int(ends[(ends - num_validation).abs().argmin()])
    num_training = len(used) - num_validation
    if num_validation < 1 or num_training < 2:
        raise DataError(
            f"validation={validation} of {len(used)} rows with a weight leaves {num_training} to train on and "
            f"{num_validation} to validate with: give more rows, or another fraction"
        )
    training, held_out = ordinary.split([len(ordinary) - num_validation, num_validation])
    training = torch.cat([training, wild])
    x = rows.x[training]
    constant = places((x == x[0]).all(0))
    if constant and not may_be_constant:
        advice = ', or give dequantization="uniform" to the fit' if torch.equal(x, x.round()) else ""
        raise DataError(
            f"columns {listed(constant)} of x are constant in all {num_training} training rows, in {x.dtype}, so that "
            f"the density is unbounded: leave them out{advice}"
        )
    return training, held_out


class ShuffledBatches(Iterator[Tensor]):
    """This iterator gives batches of an index without end. Each epoch it shuffles the index anew, and leaves out an
    incomplete last batch.

    Args:
        index: indices of rows ``(n,)``.
        size: number of rows of a batch, from 1 to n.
        weights: weights of these rows ``(n,)``, not negative: a row comes as often as its weight says, see
            :func:`resampled`. None for each row once in an epoch.

    Shapes: a batch is ``(size,)``.

    Example:
        >>> batches = ShuffledBatches(torch.arange(5), 2)
        >>> len(set(torch.cat([next(batches), next(batches)]).tolist()))
        4
    """

    def __init__(self, index: Tensor, size: int, weights: Tensor | None = None) -> None:
        self._index = index
        self._size = size
        self._weights = weights
        self._order = index[:0]
        self._place = 0

    def __next__(self) -> Tensor:
        if self._place + self._size > len(self._order):
            index = self._index if self._weights is None else resampled(self._index, self._weights)
            self._order, self._place = _shuffled(index), 0
        batch = self._order[self._place : self._place + self._size]
        self._place += self._size
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the order of rows in this epoch, and the place in it."""
        return {"order": self._order, "place": self._place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` returned."""
        self._order, self._place = state["order"].to(self._index), state["place"]


def resampled(index: Tensor, weights: Tensor) -> Tensor:
    r"""Draw as many entries of an index as it has, in proportion to weights, by systematic resampling.

    Entry i comes :math:`n w_i / \sum_j w_j` times in the mean, rounded up or down.

    Args:
        index: ``(n,)``.
        weights: ``(n,)``, not negative, with a positive sum.

    Example:
        >>> resampled(torch.arange(4), torch.tensor([1.0, 0.0, 3.0, 0.0]))
        tensor([0, 2, 2, 2])
    """
    ends = weights.double().cumsum(0)
    places = (torch.arange(len(index), device=ends.device) + torch.rand((), device=ends.device)) / len(index)
    return index[torch.searchsorted(ends, places * ends[-1], right=True).clamp(max=len(index) - 1)]


def _shuffled_by_group(index: Tensor, group: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Shuffle an index so that the members of a group stand together, where its first member comes to stand.

    Without a second member of any group this is what :func:`_shuffled` returns.

    Args:
        index: ``(n,)``.
        group: the groups ``(n,)`` of its entries; those of more than ``most`` members are taken apart.
        most: the number of members.

    Returns:
        The index ``(n,)``, and the sizes of the groups in their new order.
    """
    place = torch.randperm(len(index)).argsort().to(index.device)
    _, group, count = group.unique(return_inverse=True, return_counts=True)
    own = torch.arange(len(index), device=index.device)
    first = own.new_full(count.shape, len(index)).scatter_reduce(0, group, own, "amin")
    leader = torch.where(count[group] <= most, first[group], own)
    order = place[leader].argsort(stable=True)
    return index[order], leader[order].unique_consecutive(return_counts=True)[1]


def _shuffled(index: Tensor) -> Tensor:
    return index[torch.randperm(len(index)).to(index.device)]
