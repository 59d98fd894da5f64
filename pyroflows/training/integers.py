"""Integer data, and the noise that makes them continuous."""

import torch
from torch import Tensor

from pyroflows.training.refusals import ColumnLabels, refuse


def uniform_noise(x: Tensor) -> Tensor:
    """Draw noise u between 0 and 1, of the shape and dtype of x; it is never 0.

    Example:
        >>> u = uniform_noise(torch.zeros(1000))
        >>> bool((u > 0).all() and (u < 1).all())
        True
    """
    # Not rand_like, which draws in the order of memory, and that of a frame is by column.
    return torch.rand(x.shape, dtype=x.dtype, device=x.device).clamp_min(torch.finfo(x.dtype).eps)


def dequantized(x: Tensor, u: Tensor) -> Tensor:
    """Return integers x plus noise u, strictly between x and x + 1 even where the sum is rounded.

    So the floor of the result is x. Integers that are so large that no number lies between them stay as they are.

    Args:
        x: whole numbers ``(..., *event_shape)``.
        u: noise from 0 to 1, of a shape that broadcasts with it.

    Example:
        >>> y = dequantized(torch.tensor(255.0), torch.tensor(1 - 1e-7))
        >>> y, y.floor()
        (tensor(256.0000), tensor(255.))
    """
    return torch.clamp(x + u, torch.nextafter(x, x + 1), torch.nextafter(x + 1, x))


def refuse_fractions(values: Tensor, labels: ColumnLabels = None) -> None:
    """Raise if a value of x is no whole number.

    Args:
        values: rows ``(n, *event_shape)``.
        labels: the labels of the columns of a frame, or None.

    Raises:
        DataError: if one is not; the message names it and says what to do.

    Example:
        >>> try:
        ...     refuse_fractions(torch.tensor([[3.0], [0.5]]))
        ... except pf.FlowError as error:
        ...     print(error)
        x has values that are no integers (give levels themselves, such as 0 to 255 instead of shares of 255, or leave
        dequantization out for continuous data) in 1 of 2 rows, the first is 0.5 in row 1, column 0
    """
    what = (
        "values that are no integers (give levels themselves, such as 0 to 255 instead of shares of 255, or leave "
        "dequantization out for continuous data)"
    )
    refuse(values != values.round(), values, "x", what, labels)


def refuse_other_levels(values: Tensor, levels: int, labels: ColumnLabels = None) -> None:
    """Raise if a value of x is none of the levels 0 to ``levels - 1``.

    Args:
        values: whole numbers ``(n, *event_shape)``.
        levels: the number of levels.
        labels: the labels of the columns of a frame, or None.

    Raises:
        DataError: if one is not; the message names it and says what to do.

    Example:
        >>> try:
        ...     refuse_other_levels(torch.tensor([[3.0], [16.0]]), levels=16)
        ... except pf.FlowError as error:
        ...     print(error)
        x has values outside of the 16 levels from 0 to 15 (give the number that the data can have) in 1 of 2 rows, the
        first is 16 in row 1, column 0
    """
    what = f"values outside of the {levels} levels from 0 to {levels - 1} (give the number that the data can have)"
    refuse((values < 0) | (values >= levels), values, "x", what, labels)
