"""Masks of coupling layers: boolean tensors, true for the dimensions that pass unchanged.

A coupling with ``~mask`` transforms what one with ``mask`` passes. ``dim`` is the number of dimensions of a vector, or
of indices of the axis that a coupling masks, such as the channels of an image. Of a single one nothing passes.
"""

import torch
from torch import Tensor


def half(dim: int) -> Tensor:
    """Let the first ``dim // 2`` dimensions pass.

    Example:
        >>> half(5)
        tensor([ True,  True, False, False, False])
    """
    return torch.arange(dim) < dim // 2


def alternating(dim: int) -> Tensor:
    """Let every second dimension pass, from the second on.

    Example:
        >>> alternating(5)
        tensor([False,  True, False,  True, False])
    """
    return torch.arange(dim) % 2 == 1


def random(dim: int, seed: int) -> Tensor:
    """Let ``dim // 2`` dimensions pass that are drawn at random.

    Args:
        dim: the number of dimensions.
        seed: the seed of the draw, which leaves torch's own random state alone.

    Example:
        >>> random(5, seed=0).sum()
        tensor(2)
    """
    return half(dim)[torch.randperm(dim, generator=torch.Generator().manual_seed(seed))]


def channelwise(channels: int, height: int, width: int) -> Tensor:
    """Let the first half of the channels pass, of an image ``(channels, height, width)`` flattened to a vector.

    A coupling of images as they are, ``Coupling((C, H, W))``, takes the mask of its channels alone, ``half(C)``.

    Example:
        >>> channelwise(2, 1, 2)
        tensor([ True,  True, False, False])
    """
    return half(channels).repeat_interleave(height * width)


def growing(dim: int, num_masks: int) -> list[Tensor]:
    """Make a mask for each of several layers, of which each transforms more of the last dimensions than the one before.

    The first mask transforms the last dimension alone, and the first dimension passes all of them.

    Args:
        dim: the number of dimensions.
        num_masks: the number of masks.

    Example:
        >>> growing(3, 2)
        [tensor([ True,  True, False]), tensor([ True, False, False])]
    """
    return [torch.arange(dim) < dim - 1 - i * (dim - 1) // num_masks for i in range(num_masks)]
