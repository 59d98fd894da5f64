"""Divide rows of data into clusters, at which the components of a mixture start."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Centers are sought with this many rows at most, from this many random starts, each for so many iterations.
MAX_ROWS, NUM_STARTS, NUM_ITERATIONS = 10_000, 4, 20
# A cluster of few rows, or with a constant column, has no scale: then all rows have this share of the weight.
SHARE_OF_OTHERS = 0.1
# A component that was fitted before explains a row, unless it is unlikelier than all but this share of its own draws.
# Rows that no component explains count if they are so many times as many.
UNLIKELY, TIMES = 0.001, 10


def clusters_of(rows: Tensor, weights: Tensor, num_clusters: int) -> Tensor:
    """Divide rows into clusters by k-means, in units of the standard deviation of each column (Lloyd 1982).

    Starts are drawn from torch's global generator, as in k-means++ (Arthur and Vassilvitskii 2007), and the best of
    several is taken.

    Args:
        rows: finite rows ``(n, ...)``.
        weights: weights of the rows ``(n,)``, not negative.
        num_clusters: number K of clusters.

    Returns:
        The cluster of each row ``(n,)``, from 0 to K - 1. A cluster may be empty.

    Example:
        >>> rows = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
        >>> found = clusters_of(rows, torch.ones(4), 2)
        >>> found[0] == found[1], found[1] == found[2], found[2] == found[3]
        (tensor(True), tensor(False), tensor(True))
    """
    rows = rows.detach().flatten(1).double()
    weights = weights.detach().double()
    mean = torch.mv(rows.T, weights) / weights.sum()
    variance = torch.mv((rows - mean).T ** 2, weights) / weights.sum()
    white = (rows - mean) / variance.sqrt().clamp_min(torch.finfo(rows.dtype).tiny)
    used = weights.nonzero().flatten()
    chosen = used[torch.randperm(len(used)).to(used.device)[:MAX_ROWS]]
    starts = [_centers(white[chosen], weights[chosen], num_clusters) for _ in range(NUM_STARTS)]
    best = min(starts, key=lambda centers: _cost(white[chosen], weights[chosen], centers))
    return _nearest(white, best)


def unexplained(laws: Sequence[Any], x: Tensor, weights: Tensor) -> Tensor:
    """Return the weights of rows that none of some fitted laws explains, for a further component to start at.

    Args:
        laws: laws with as many draws as rows where their batch shape is ``(n,)``, or without a batch shape.
        x: rows ``(n, *event_shape)``.
        weights: weights of the rows ``(n,)``, not negative.

    Returns:
        The weights ``(n,)`` with zeros for rows that are explained; all weights if nearly all rows are.

    Example:
        >>> x = torch.cat([torch.randn(200, 1), 50 + torch.randn(100, 1)])
        >>> bool(unexplained([pf.flows.Gaussian(1)()], x, torch.ones(300))[200:].all())
        True
    """
    rest = weights
    for law in laws:
        draws = law.sample(() if law.batch_shape else (len(x),))
        least = law.log_prob(draws).quantile(UNLIKELY)
        # What has no density is not explained either.
        rest = torch.where(law.log_prob(x) >= least, 0.0, rest)
    return rest if rest.sum() > TIMES * UNLIKELY * weights.sum() else weights


def starting_weights(x: Tensor, is_member: Tensor, weights: Tensor) -> Tensor:
    """Return the weights of rows from which the component of a cluster learns its location and scale.

    They are those of the cluster's rows. If these are few, or a column of them is constant, so that they have no scale,
    all rows take part a little.

    Args:
        x: rows ``(n, ...)``.
        is_member: whether a row is in the cluster, ``(n,)``.
        weights: weights of the rows ``(n,)``, not negative.

    Returns:
        Weights ``(n,)``, not negative.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
        >>> starting_weights(x, x[:, 0] < 5, torch.ones(4))
        tensor([1., 1., 1., 0.])
        >>> starting_weights(x, x[:, 0] > 5, torch.ones(4))
        tensor([0.0250, 0.0250, 0.0250, 0.9250])
    """
    own = weights * is_member
    members = x[own > 0].flatten(1)
    if len(members) > 2 * members.shape[1] and (members != members[0]).any(0).all():
        return own
    if not own.sum():
        return weights
    return (1 - SHARE_OF_OTHERS) * own / own.sum() + SHARE_OF_OTHERS * weights / weights.sum()


def _centers(rows: Tensor, weights: Tensor, num_clusters: int) -> Tensor:
    centers = _spread(rows, weights, num_clusters)
    for _ in range(NUM_ITERATIONS):
        members = torch.nn.functional.one_hot(_nearest(rows, centers), num_clusters) * weights[:, None]
        sizes = members.sum(0)[:, None]
        # An empty cluster keeps its center.
        centers = torch.where(sizes > 0, members.T @ rows / sizes, centers)
    return centers


def _spread(rows: Tensor, weights: Tensor, num_clusters: int) -> Tensor:
    """Draw rows as centers, each with probability in proportion to its squared distance from those before."""
    chances = weights
    centers = rows[:0]
    for _ in range(num_clusters):
        center = torch.multinomial(chances if chances.sum() > 0 else weights, 1)
        centers = torch.cat([centers, rows[center]])
        chances = weights * torch.cdist(rows, centers).amin(1) ** 2
    return centers


def _nearest(rows: Tensor, centers: Tensor) -> Tensor:
    return torch.cdist(rows, centers).argmin(1)


def _cost(rows: Tensor, weights: Tensor, centers: Tensor) -> float:
    return torch.dot(weights, torch.cdist(rows, centers).amin(1) ** 2).item()
