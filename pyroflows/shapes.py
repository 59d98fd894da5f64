"""Shapes of events and contexts, which users give as a number for vectors and as a sequence for arrays of more axes."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows.errors import OptionError, ShapeError
from pyroflows.options import as_int


def shape_of(dim: int | Sequence[int]) -> torch.Size:
    """Return the shape that ``dim`` stands for: ``(dim,)`` for a number, the sequence itself otherwise.

    Raises:
        OptionError: if it is neither a whole number nor a sequence of these.

    Example:
        >>> shape_of(3), shape_of((2, 8))
        (torch.Size([3]), torch.Size([2, 8]))
    """
    given = tuple(dim) if isinstance(dim, Iterable) and not isinstance(dim, str | Tensor) else (dim,)
    sizes = [size for size in map(as_int, given) if size is not None]
    if len(sizes) < len(given):
        raise OptionError(f"a size of events or contexts must be an integer or a sequence of these, got {dim!r}")
    return torch.Size(sizes)


def as_given(shape: torch.Size) -> int | tuple[int, ...]:
    """Return the ``dim`` from which :func:`shape_of` makes this shape, or 0 for the empty shape of no context.

    Example:
        >>> as_given(torch.Size([3])), as_given(torch.Size([2, 8])), as_given(torch.Size())
        (3, (2, 8), 0)
    """
    return tuple(shape) if len(shape) > 1 else (*shape, 0)[0]


def described(shape: torch.Size) -> str:
    """Return a shape in the words of a message: as a size for vectors, as a shape otherwise.

    Example:
        >>> described(torch.Size([3])), described(torch.Size([2, 8]))
        ('size 3', 'shape (2, 8)')
    """
    return f"{'shape' if len(shape) > 1 else 'size'} {as_given(shape)}"


def places(is_there: Tensor) -> list[int] | list[tuple[int, ...]]:
    """Return the indices at which a mask is true, as numbers for a vector and as tuples otherwise.

    Example:
        >>> places(torch.tensor([True, False, True])), places(torch.eye(2, dtype=torch.bool))
        ([0, 2], [(0, 0), (1, 1)])
    """
    indices = is_there.nonzero().tolist()
    return [i for (i,) in indices] if is_there.dim() == 1 else [tuple(index) for index in indices]


def counted(count: int, noun: str) -> str:
    """Return a number of things in words, with the noun in the singular for one.

    Example:
        >>> counted(1, "row"), counted(0, "row")
        ('1 row', '0 rows')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(found: Sequence[Any], most: int = 8) -> str:
    """Return a list as text for a message, of which the first few items stand for a long one.

    Example:
        >>> listed([1, 4]), listed(range(100), most=3)
        ('[1, 4]', '[0, 1, 2, and 97 more]')
    """
    rest = len(found) - most
    return f"[{', '.join(map(str, found[:most]))}{f', and {rest} more' if rest > 0 else ''}]"


def axis_from_the_end(axis: int, event_shape: torch.Size, layer: str) -> int:
    """Return an axis of an event counted from the end, so that it is the same for every batch shape.

    Args:
        axis: the axis as the user gave it, counted from either end.
        event_shape: the shape of the event.
        layer: the name of the layer, for the message.

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


def expanded_to_context(
    value: Tensor, context: Tensor | None, event_shape: torch.Size, context_shape: torch.Size, layer: str
) -> Tensor:
    """Check the shapes of a layer's arguments, and return the value expanded to the batch shape of both.

    Args:
        value: ``(..., *event_shape)``.
        context: ``(..., *context_shape)``, or None if the layer takes none.
        event_shape: the shape of an event at that end of the layer.
        context_shape: the shape of a context, empty for none.
        layer: the name of the layer, for the message.

    Raises:
        ShapeError: if the value or the context has another shape, or their batch shapes do not broadcast.

    Example:
        >>> value, context = torch.zeros(2), torch.zeros(5, 3)
        >>> expanded_to_context(value, context, torch.Size([2]), torch.Size([3]), "Planar").shape
        torch.Size([5, 2])
    """
    num_axes, num_context_axes = len(event_shape), len(context_shape)
    if value.shape[-num_axes:] != event_shape:
        raise ShapeError(f"{layer} has event {described(event_shape)}, but got a tensor of shape {tuple(value.shape)}")
    if not context_shape:
        if context is not None:
            raise ShapeError(f"{layer} takes no context, but got shape {tuple(context.shape)}: set its context_dim")
        return value
    if context is None:
        raise ShapeError(f"{layer} needs a context of {described(context_shape)}: use t.condition(context)")
    if context.shape[-num_context_axes:] != context_shape:
        raise ShapeError(f"{layer} has context {described(context_shape)}, but got shape {tuple(context.shape)}")
    value_batch, context_batch = value.shape[:-num_axes], context.shape[:-num_context_axes]
    try:
        batch_shape = torch.broadcast_shapes(value_batch, context_batch)
    except RuntimeError:
        raise ShapeError(
            f"the batch shapes of the value, {tuple(value_batch)}, and of the context, {tuple(context_batch)}, do not "
            f"broadcast in {layer}"
        ) from None
    return value.expand(batch_shape + event_shape)
