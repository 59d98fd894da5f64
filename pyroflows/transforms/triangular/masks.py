"""Masks of coupling layers: boolean tensors, true for the dimensions that pass unchanged.

A coupling with ``~mask`` transforms what one with ``mask`` passes. ``dim`` is the number of dimensions of a vector, or
of indices of the axis that a coupling masks, such as the channels of an image. If ``dim`` is 1, nothing passes.
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
    """Let every second dimension pass, starting with the second.

    Example:
        >>> alternating(5)
        tensor([False,  True, False,  True, False])
    """
    return torch.arange(dim) % 2 == 1


def random(dim: int, seed: int) -> Tensor:
    """Let ``dim // 2`` dimensions pass, which are drawn at random.

    Args:
        dim: the number of dimensions.
        seed: the seed of the draw; torch's own random state is neither read nor changed.

    Example:
        >>> random(5, seed=0).sum()
        tensor(2)
    """
    return half(dim)[torch.randperm(dim, generator=torch.Generator().manual_seed(seed))]


def channelwise(channels: int, height: int, width: int) -> Tensor:
    """Let the first half of the channels of an image pass, for an image ``(channels, height, width)`` as a flat vector.

    For images that keep their axes, ``Coupling((C, H, W))`` takes the mask of the channels, ``half(C)``.

    Example:
        >>> channelwise(2, 1, 2)
        tensor([ True,  True, False, False])
    """
    return half(channels).repeat_interleave(height * width)


def growing(dim: int, num_masks: int) -> list[Tensor]:
    """Make masks for a stack of layers, each of which transforms more of the last dimensions than the layer before.

    With the first mask the last dimension alone is transformed; the first dimension passes every layer.

    Args:
        dim: the number of dimensions.
        num_masks: the number of masks.

    Example:
        >>> growing(3, 2)
        [tensor([ True,  True, False]), tensor([ True, False, False])]
    """
    return [torch.arange(dim) < dim - 1 - i * (dim - 1) // num_masks for i in range(num_masks)]
