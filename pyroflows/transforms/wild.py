"""Location and scale of data, without the few elements that are so far out that they alone would set the scale."""

import torch
from torch import Tensor

from pyroflows.transforms.base import Pair

# A wild element is farther from the median than this many times sqrt(n) robust standard deviations,
WILD = 3.0
# and at least this many times as far as the last ordinary one. Without this gap, elements are the tail of their law: to
# leave those of heavy tails out of the scale made fits of splines worse, by several nats.
GAP = 10.0
# If they are more than this share of a column, they are a part of its law, too.
MAX_WILD_SHARE = 0.05
# The quartiles of fewer rows say too little about the others.
MIN_ROWS = 20
# Quantiles are taken of rows with this many elements at most, spread evenly over all rows.
MAX_SORTED = 1_000_000


def center_and_spread(rows: Tensor) -> Pair:
    """Return the median of each column, and a standard deviation that a few rows far out do not change.

    It is that of a normal law with the same central half; or the same central 90 or 99 %, if more than half of the rows
    agree; or zero.

    Args:
        rows: ``(n, *shape)``.

    Example:
        >>> center, spread = center_and_spread(torch.tensor([[-1.0], [0.0], [0.5], [1.0], [1e9]]))
        >>> center, spread
        (tensor([0.5000]), tensor([0.7413]))
    """
    count = min(len(rows), max(500, MAX_SORTED // max(1, rows[0].numel())))
    sample = rows[torch.linspace(0, len(rows) - 1, count).long()].sort(0).values
    spread = torch.zeros_like(sample[0])
    for tail, width in ((0.25, 1.349), (0.05, 3.290), (0.005, 5.152)):
        low = int(tail * (count - 1))
        spread = torch.where(spread > 0, spread, (sample[count - 1 - low] - sample[low]) / width)
    return sample[(count - 1) // 2], spread


def wild_elements(rows: Tensor) -> Tensor:
    r"""Return which elements ``(n, *shape)`` of rows are so far out that each alone would set the scale of its column.

    They are farther from the median than :math:`3 \sqrt n` robust standard deviations, so that each adds nine times as
    much to the variance as all ordinary rows together, or more. A gap of at least a factor of ten in the distance parts
    them from other elements, and they are 5 % of the column at most.

    Args:
        rows: ``(n, *shape)``.

    Example:
        >>> wild_elements(torch.tensor([*range(30), -9999.0])[:, None]).nonzero().tolist()
        [[30, 0]]
    """
    columns = rows.flatten(1)
    is_wild = torch.zeros_like(columns, dtype=torch.bool)
    if len(rows) < MIN_ROWS:
        return is_wild.reshape(rows.shape)
    center, spread = center_and_spread(columns)
    limit = WILD * len(rows) ** 0.5 * spread
    has_far = (torch.maximum(columns.amax(0) - center, center - columns.amin(0)) > limit) & (limit > 0)
    # Hardly any column has an element so far out, so that only few distances are computed.
    for j in has_far.nonzero().flatten().tolist():
        distance = (columns[:, j] - center[j]).abs()
        found = distance > _last_ordinary(distance, limit[j])
        is_wild[:, j] = found & (found.sum() <= MAX_WILD_SHARE * len(rows))
    return is_wild.reshape(rows.shape)


def wild_elements_among(rows: Tensor, used: Tensor, by_channel: bool = False) -> Tensor:
    """Return which elements ``(n, *shape)`` are wild among the rows that are used; those of other rows are not.

    Args:
        rows: ``(n, *shape)``.
        used: booleans ``(n,)``.
        by_channel: whether elements are compared with all those of their channel, which is the first axis of an event,
            instead of those in the same place.
    """
    if by_channel:
        elements = rows.movedim(1, -1)
        is_used = used.repeat_interleave(rows.shape[2:].numel())
        return wild_elements_among(elements.flatten(0, -2), is_used).reshape(elements.shape).movedim(-1, 1)
    if used.all():
        return wild_elements(rows)
    is_wild = torch.zeros_like(rows, dtype=torch.bool)
    is_wild[used] = wild_elements(rows[used])
    return is_wild


def _last_ordinary(distance: Tensor, limit: Tensor) -> Tensor:
    """Return the last distance ``()`` before the first gap that ends beyond a limit; infinity if there is none."""
    ordered = distance.sort().values
    is_gap = (ordered[1:] > GAP * ordered[:-1]) & (ordered[1:] > limit)
    return ordered[:-1].where(is_gap, torch.inf).amin()


def location_and_scale(rows: Tensor, weights: Tensor | None, is_wild: Tensor | None = None) -> Pair:
    """Return mean and standard deviation of each column in float64, without wild elements.

    Args:
        rows: ``(n, *shape)``.
        weights: weights of the rows ``(n,)``, not negative; None for equal weights.
        is_wild: which elements ``(n, *shape)`` to leave out; None for those that :func:`wild_elements` finds.

    Example:
        >>> location_and_scale(torch.tensor([[0.0, 1.0], [2.0, 5.0]]), None)
        (tensor([1., 3.], dtype=torch.float64), tensor([1., 2.], dtype=torch.float64))
    """
    # In float64, since sums of squares of large numbers overflow or cancel in float32.
    rows = rows.cpu().double()
    weights = rows.new_ones(len(rows)) if weights is None else weights.cpu().double()
    share = weights.reshape(-1, *[1] * (rows.dim() - 1))
    is_wild = wild_elements_among(rows, weights > 0) if is_wild is None else is_wild.cpu()
    if is_wild.any():
        rows, share = rows.masked_fill(is_wild, 0.0), share * ~is_wild
    share = share / share.sum(0)
    mean = (share * rows).sum(0)
    return mean, (share * (rows - mean) ** 2).sum(0).sqrt()
