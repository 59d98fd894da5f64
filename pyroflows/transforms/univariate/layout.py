"""The order of axes in memory, in which operations on all elements of several tensors run through contiguous blocks."""

from torch import Tensor


def memory_order(theta: Tensor) -> list[int]:
    """Return the axes of elements in their order in memory, the outermost first.

    Args:
        theta: parameters ``(..., num_params)``; the axis of parameters does not count.

    Example:
        >>> memory_order(torch.zeros(5, 3, 2)), memory_order(torch.zeros(2, 3, 5).permute(2, 1, 0))
        ([0, 1], [1, 0])
    """
    strides = theta.stride()
    return sorted(range(theta.dim() - 1), key=strides.__getitem__, reverse=True)


def restored(tensor: Tensor, order: list[int]) -> Tensor:
    """Return the tensor whose ``permute(order)`` is this one; further axes at its end stay there."""
    further = range(len(order), tensor.dim())
    return tensor.permute([*sorted(range(len(order)), key=order.__getitem__), *further])
