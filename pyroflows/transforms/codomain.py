"""Where values of bounded constraints lie: the interior of a constraint, and a point of it."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyroflows.constraints import num_axes_of, without_events

# Instances of these have an attribute for each end. Torch gives the classes themselves no public names.
_ABOVE = (constraints.greater_than, constraints.greater_than_eq)
_BETWEEN = (constraints.interval, constraints.half_open_interval)


def is_unbounded(constraint: constraints.Constraint) -> bool:
    """Tell whether a constraint lets all real numbers pass.

    Example:
        >>> is_unbounded(constraints.real_vector), is_unbounded(constraints.positive)
        (True, False)
    """
    constraint = without_events(constraint)
    if isinstance(constraint, constraints.cat):
        return all(is_unbounded(part) for part in constraint.cseq)
    return isinstance(constraint, type(constraints.real))


def is_inside(constraint: constraints.Constraint, x: Tensor, num_axes: int) -> Tensor:
    """Tell which events lie in the interior of a constraint; a closed end of an interval and infinity do not.

    A bijection of the reals onto an interval does not reach its ends, whether or not the interval is closed.

    Args:
        constraint: a constraint on events or on their elements.
        x: events with ``num_axes`` axes, after any others.
        num_axes: number of axes of an event.

    Returns:
        Booleans of the shape of x without the axes of events.

    Example:
        >>> is_inside(constraints.nonnegative, torch.tensor([[1.0, 2.0], [0.0, 2.0]]), num_axes=1)
        tensor([ True, False])
    """
    return _of_events(_mask(constraint, x, num_axes), x, num_axes)


def is_met(constraint: constraints.Constraint, x: Tensor, num_axes: int) -> Tensor:
    """Tell which events meet a constraint, closed ends of intervals included.

    Args:
        constraint: a constraint on events or on their elements.
        x: events with ``num_axes`` axes, after any others.
        num_axes: number of axes of an event.

    Returns:
        Booleans of the shape of x without the axes of events.

    Example:
        >>> is_met(constraints.nonnegative, torch.tensor([[1.0, 2.0], [0.0, -2.0]]), num_axes=1)
        tensor([ True, False])
    """
    return _of_events(constraint.check(x), x, num_axes)


def _of_events(mask: Tensor, x: Tensor, num_axes: int) -> Tensor:
    """Join what a mask says of the elements of each event; it may say it of whole events already."""
    rest = mask.dim() - (x.dim() - num_axes)
    return mask.flatten(-rest).all(-1) if rest > 0 else mask


def _mask(constraint: Any, x: Tensor, num_axes: int) -> Tensor:
    """Return what :func:`is_inside` does, for events or for their elements."""
    if isinstance(constraint, constraints.independent):
        return _mask(constraint.base_constraint, x, num_axes)
    if isinstance(constraint, constraints.cat):
        pieces = x.split(constraint.lengths, constraint.dim)
        return _all(is_inside(part, piece, num_axes) for part, piece in zip(constraint.cseq, pieces, strict=True))
    if isinstance(constraint, constraints.stack):
        pieces = x.unbind(constraint.dim)
        return _all(is_inside(part, piece, num_axes - 1) for part, piece in zip(constraint.cseq, pieces, strict=True))
    if isinstance(constraint, _ABOVE):
        return (x > constraint.lower_bound) & (x < torch.inf)
    if isinstance(constraint, constraints.less_than):
        return (x < constraint.upper_bound) & (x > -torch.inf)
    if isinstance(constraint, _BETWEEN):
        return (x > constraint.lower_bound) & (x < constraint.upper_bound)
    if isinstance(constraint, type(constraints.simplex)):
        return constraint.check(x) & (x > 0).all(-1)
    # Constraints on vectors, such as ordered ones, compare elements with each other.
    return constraint.check(x) & x.isfinite().all(-1) if num_axes_of(constraint) == 1 else constraint.check(x)


def _all(masks: Any) -> Tensor:
    first, *others = masks
    for mask in others:
        first = first & mask
    return first


def moved_inside(constraint: constraints.Constraint, x: Tensor, is_in: Tensor, num_axes: int) -> Tensor:
    """Return events, with one event in the interior of a constraint in place of those that are outside.

    Args:
        constraint: a constraint on events or on their elements.
        x: events with ``num_axes`` axes, after any others.
        is_in: which of them are inside, of the shape of x without the axes of events.
        num_axes: number of axes of an event.

    Example:
        >>> x = torch.tensor([[0.2, 0.3], [0.5, 7.0]])
        >>> moved_inside(constraints.unit_interval, x, torch.tensor([True, False]), num_axes=1).tolist()[1]
        [0.5, 0.5]
    """
    return torch.where(is_in.reshape(*is_in.shape, *[1] * num_axes), x, point_inside(constraint, x, num_axes))


def point_inside(constraint: constraints.Constraint, x: Tensor, num_axes: int) -> Tensor:
    """Return an event in the interior of a constraint.

    Args:
        constraint: a constraint on events or on their elements.
        x: events with ``num_axes`` axes, for their shape, dtype and device; they are returned themselves where the
            constraint is one that torch knows no bijection to.
        num_axes: number of axes of an event.

    Example:
        >>> point_inside(constraints.unit_interval, torch.ones(5, 2), num_axes=1)
        tensor([0.5000, 0.5000])
    """
    try:
        bijection = biject_to(constraint)
    except NotImplementedError:
        return x
    shape = x.shape[x.dim() - num_axes :]
    return bijection(x.new_zeros(bijection.inverse_shape(shape))).to(x)
