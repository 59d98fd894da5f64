"""Masks of coupling layers: boolean tensors, True for the dimensions that pass unchanged.

``~mask`` is the coupling that transforms what the mask passes. At one dimension nothing passes.
"""

import torch
from torch import Tensor


def half(dim: int) -> Tensor:
    """The first ``dim // 2`` dimensions pass.

    Example:
        >>> half(5)
        tensor([ True,  True, False, False, False])
    """
    return torch.arange(dim) < dim // 2


def alternating(dim: int) -> Tensor:
    """Every second dimension passes.

    Example:
        >>> alternating(5)
        tensor([False,  True, False,  True, False])
    """
    return torch.arange(dim) % 2 == 1


def random(dim: int, seed: int) -> Tensor:
    """``dim // 2`` dimensions pass, drawn by a seed of their own.

    Example:
        >>> random(5, seed=0).sum()
        tensor(2)
    """
    return half(dim)[torch.randperm(dim, generator=torch.Generator().manual_seed(seed))]


def channelwise(channels: int, height: int, width: int) -> Tensor:
    """The first half of the channels of an image ``(channels, height, width)``, flattened, passes.

    Example:
        >>> channelwise(2, 1, 2)
        tensor([ True,  True, False, False])
    """
    return half(channels).repeat_interleave(height * width)


def growing(dim: int, num_masks: int) -> list[Tensor]:
    """A mask a layer: the first transforms the last dimension alone, later ones more and more of the last dimensions.

    The first dimension passes all of them.

    Example:
        >>> growing(3, 2)
        [tensor([ True,  True, False]), tensor([ True, False, False])]
    """
    return [torch.arange(dim) < dim - 1 - i * (dim - 1) // num_masks for i in range(num_masks)]
