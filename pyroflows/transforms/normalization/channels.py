"""Location and scale of channels, which are the indices along the first axis of an event."""

import torch
from torch import Tensor

from pyroflows.errors import DataError
from pyroflows.shapes import places
from pyroflows.transforms.base import Pair
from pyroflows.transforms.wild import location_and_scale


def moments_of_channels(x: Tensor, weights: Tensor | None) -> Pair:
    """Return mean and standard deviation of each channel over rows and places, in float64, without wild elements.

    Args:
        x: rows ``(n, C, *places)``; of vectors each element is a channel.
        weights: weights of the rows ``(n,)``, not negative; None for equal weights.

    Example:
        >>> mean, deviation = moments_of_channels(torch.tensor([[[0.0, 2.0], [5.0, 5.0]]]), None)
        >>> mean.tolist(), deviation.tolist()
        ([1.0, 5.0], [1.0, 0.0])
    """
    rows = x.movedim(1, -1).flatten(0, -2)
    return location_and_scale(rows, None if weights is None else weights.repeat_interleave(len(rows) // len(x)))


def scaled_moments(x: Tensor, weights: Tensor | None, layer: str) -> Pair:
    """Return what :func:`moments_of_channels` does, with the standard deviation 1 for channels that are constant.

    Args:
        x: rows ``(n, C, *places)``.
        weights: weights of the rows ``(n,)``, not negative; None for equal weights.
        layer: the name of the layer that learns, for the message.

    Raises:
        DataError: if the mean or the standard deviation of a channel is not finite, as for no rows.

    Example:
        >>> scaled_moments(torch.tensor([[0.0, 5.0], [2.0, 5.0]]), None, "ActNorm")[1]
        tensor([1., 1.], dtype=torch.float64)
    """
    if not len(x):
        raise DataError(f"{layer} cannot learn location and scale, since there are no rows")
    mean, deviation = moments_of_channels(x, weights)
    if (is_bad := ~(mean.isfinite() & deviation.isfinite())).any():
        raise DataError(
            f"channels {places(is_bad)} of what arrives at a layer {layer} have no finite mean and standard deviation: "
            "look for rows outside of the flow's support, and for numbers that are not finite or very large"
        )
    # Rounding gives the mean of equal numbers a distance from them.
    precision = torch.finfo(x.dtype)
    is_constant = deviation <= (precision.eps * mean.abs()).clamp(min=precision.tiny)
    return mean, deviation.masked_fill(is_constant, 1.0)
