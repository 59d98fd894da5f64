"""Shapes of events and contexts: a number for vectors, a sequence of numbers for what has more axes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.errors import OptionError


def shape_of(dim: int | Sequence[int]) -> torch.Size:
    """The shape that a user gave as ``dim``: ``(dim,)`` for a number.

    Example:
        >>> shape_of(3), shape_of((2, 8))
        (torch.Size([3]), torch.Size([2, 8]))
    """
    return torch.Size([dim] if isinstance(dim, int) else dim)


def as_given(shape: torch.Size) -> int | tuple[int, ...]:
    """What :func:`shape_of` made the shape of; 0 for the shape of no context.

    Example:
        >>> as_given(torch.Size([3])), as_given(torch.Size([2, 8])), as_given(torch.Size())
        (3, (2, 8), 0)
    """
    return tuple(shape) if len(shape) > 1 else (*shape, 0)[0]


def described(shape: torch.Size) -> str:
    """``"size 3"`` for vectors, ``"shape (2, 8)"`` otherwise, for messages."""
    return f"{'shape' if len(shape) > 1 else 'size'} {as_given(shape)}"


def places(is_there: Tensor) -> list[int] | list[tuple[int, ...]]:
    """Where a mask is True: indices of a vector, tuples of indices otherwise.

    Example:
        >>> places(torch.tensor([True, False, True])), places(torch.eye(2, dtype=torch.bool))
        ([0, 2], [(0, 0), (1, 1)])
    """
    indices = is_there.nonzero().tolist()
    return [i for (i,) in indices] if is_there.dim() == 1 else [tuple(index) for index in indices]


def axis_from_the_end(axis: int, event_shape: torch.Size, layer: str) -> int:
    """An axis of an event, counted from the end, so that it is the same whatever the batch shape.

    Args:
        axis: the axis as the user gave it, counted from either end.
        event_shape: the shape of the event.
        layer: who asks, for the message.

    Raises:
        OptionError: if the event has no such axis.

    Example:
        >>> axis_from_the_end(0, torch.Size([3, 4, 2]), "Coupling")
        -3
    """
    num_axes = len(event_shape)
    if not -num_axes <= axis < num_axes:
        raise OptionError(
            f"{layer} has events of {described(event_shape)} and needs an axis from {-num_axes} to {num_axes - 1}, "
            f"got {axis}"
        )
    return axis if axis < 0 else axis - num_axes
