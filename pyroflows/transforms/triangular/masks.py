"""Masks of coupling layers: boolean tensors, true for the dimensions that pass unchanged.

A coupling with ``~mask`` transforms what one with ``mask`` passes. ``dim`` is the number of dimensions of a vector, or
of indices of the axis that a coupling masks, such as the channels of an image. If ``dim`` is 1, nothing passes. The
mask of a checkerboard is one of the places of an image.
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


def checkerboard(*sizes: int) -> Tensor:
    """Let every second place pass, like the black squares of a board, for the places of an image or of a sequence.

    Args:
        sizes: the sizes of the axes after the channels, such as the height and the width of an image.

    Returns:
        Booleans ``(1, *sizes)``, which are the same for all channels.

    Example:
        >>> checkerboard(2, 3)
        tensor([[[False,  True, False],
                 [ True, False,  True]]])
    """
    indices = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    return (torch.stack(indices).sum(0) % 2 == 1)[None]


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
