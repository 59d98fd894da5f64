"""The shape of images."""

from collections.abc import Sequence

import torch

from pyroflows.errors import OptionError
from pyroflows.shapes import shape_of


def image_shape(shape: Sequence[int], layer: str) -> torch.Size:
    """Return the shape ``(channels, height, width)`` that a layer of images was given.

    Args:
        shape: what the user gave.
        layer: the name of the layer, for the message.

    Raises:
        OptionError: if it is not the shape of an image.

    Example:
        >>> image_shape((3, 8, 6), "Squeeze")
        torch.Size([3, 8, 6])
    """
    sizes = shape_of(shape)
    if len(sizes) != 3 or min(sizes) < 1:
        raise OptionError(f"{layer} needs the shape of an image, (channels, height, width), got {shape!r}")
    return sizes
