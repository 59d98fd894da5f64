"""The order of axes in memory, in which operations on all elements of several tensors run through contiguous blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor


def memory_order(tensor: Tensor, num_axes: int) -> list[int]:
    """Return the first axes of a tensor in their order in memory, the outermost first.

    Example:
        >>> memory_order(torch.zeros(5, 3, 2), 2), memory_order(torch.zeros(2, 3, 5).permute(2, 1, 0), 2)
        ([0, 1], [1, 0])
    """
    strides = tensor.stride()
    return sorted(range(num_axes), key=strides.__getitem__, reverse=True)


def restored(tensor: Tensor, order: list[int]) -> Tensor:
    """Return the tensor whose ``permute(order)`` is this one; further axes at its end stay there."""
    further = range(len(order), tensor.dim())
    return tensor.permute([*sorted(range(len(order)), key=order.__getitem__), *further])


def split(tensor: Tensor, sizes: Sequence[int], axis: int) -> Sequence[Tensor]:
    """Return what ``tensor.split(sizes, axis)`` does; the gradient gets the order of the tensor in memory.

    Example:
        >>> a, b = split(torch.arange(3.0), [2, 1], 0)
        >>> a, b
        (tensor([0., 1.]), tensor([2.]))
    """
    order = memory_order(tensor, tensor.dim())
    if order == sorted(order):
        return tensor.split(sizes, axis)
    return [restored(part, order) for part in tensor.permute(order).split(sizes, order.index(axis % tensor.dim()))]


def joined(parts: Sequence[Tensor], axis: int, like: Tensor) -> Tensor:
    """Return what ``torch.cat(parts, axis)`` does, in the order in memory of one of the parts.

    Example:
        >>> part = torch.zeros(2, 3).T
        >>> joined([part, part], 1, part).stride()
        (1, 3)
    """
    order = memory_order(like, like.dim())
    if order == sorted(order):
        return torch.cat(list(parts), axis)
    return restored(torch.cat([part.permute(order) for part in parts], order.index(axis % like.dim())), order)
