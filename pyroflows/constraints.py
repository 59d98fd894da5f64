"""The constraint on angles, beside those of ``torch.distributions.constraints``, and what constraints are made of."""

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from pyro.distributions.constraints import positive_ordered_vector
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

# Angles that were computed in float32 may round to numbers just beyond pi, and are kept so in float64.
MAX_ANGLE = math.pi * (1 + 4 * torch.finfo(torch.float32).eps)


class _Circular(Constraint):
    r"""The angles from :math:`-\pi` to :math:`\pi` in radians, of which the ends are the same point of the circle.

    Angles that are outside by the rounding of float32 are taken too: as whole turns do not count, they have a density.

    Example:
        >>> pf.constraints.circular.check(torch.tensor([0.0, 3.0, 4.0]))
        tensor([ True,  True, False])
    """

    event_dim = 0

    def check(self, value: Tensor) -> Tensor:
        """Check whether values are angles of one period."""
        return value.abs() <= MAX_ANGLE


circular = _Circular()


def is_angular(constraint: Constraint) -> bool:
    """Return whether a constraint is that on angles, for single elements or for all elements of an event."""
    # A copy or a pickle of a layer makes a new object, so identity would not do.
    return isinstance(without_events(constraint), _Circular)


def without_events(constraint: Constraint) -> Constraint:
    """Return the constraint on single elements that a constraint on events puts on each of them.

    Example:
        >>> without_events(constraints.real_vector)
        Real()
    """
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def on_events(constraint: Constraint, num_axes: int) -> Constraint:
    """Return the constraint on events with this number of axes, each element of which meets the given constraint."""
    rest = num_axes - num_axes_of(constraint)
    return constraints.independent(constraint, rest) if rest else constraint


def parts_of(constraint: Constraint, size: int) -> list[tuple[Constraint, int]]:
    """Return the constraints on runs of indices along the last axis of an event, each with the length of its run.

    Args:
        constraint: a constraint on events, which may be a ``constraints.cat``.
        size: the number of indices along the last axis.

    Example:
        >>> parts_of(constraints.cat([circular, constraints.positive], dim=-1, lengths=[2, 1]), 3)
        [(Circular(), 2), (GreaterThan(lower_bound=0.0), 1)]
    """
    constraint = without_events(constraint)
    if not isinstance(constraint, constraints.cat):
        return [(constraint, size)]
    parts = zip(constraint.cseq, constraint.lengths, strict=True)
    return [run for part, length in parts for run in parts_of(part, length)]


def of_columns(constraint: Constraint, columns: Sequence[int]) -> Constraint:
    """Return the constraint that a constraint on vectors puts on some of their columns.

    Example:
        >>> of_columns(constraints.cat([circular, constraints.positive], dim=-1, lengths=[2, 1]), [2, 0]).cseq
        [GreaterThan(lower_bound=0.0), Circular()]
    """
    inner = without_events(constraint)
    if not isinstance(inner, constraints.cat):
        return on_events(inner, max(num_axes_of(inner), 1))
    each = [part for part, length in parts_of(inner, sum(inner.lengths)) for _ in range(length)]
    return constraints.cat([each[j] for j in columns], dim=-1, lengths=[1] * len(columns))


def angles_in(constraint: Constraint, size: int) -> list[bool]:
    """Return which indices along the last axis of an event a constraint makes angles.

    Args:
        constraint: a constraint on events.
        size: the number of indices along the last axis.

    Example:
        >>> angles_in(constraints.cat([circular, constraints.real], dim=-1, lengths=[2, 1]), 3)
        [True, True, False]
    """
    return [is_angle for part, length in parts_of(constraint, size) for is_angle in [is_angular(part)] * length]


def without_angles(constraint: Constraint) -> Constraint:
    """Return a constraint in which the parts on angles are replaced by the real line.

    Example:
        >>> without_angles(circular)
        Real()
    """
    if isinstance(constraint, constraints.independent):
        base = constraint.base_constraint
        return constraints.independent(without_angles(base), constraint.reinterpreted_batch_ndims)
    if isinstance(constraint, constraints.cat):
        return constraints.cat([without_angles(part) for part in constraint.cseq], constraint.dim, constraint.lengths)
    return constraints.real if isinstance(constraint, _Circular) else constraint


def num_axes_of(constraint: constraints.Constraint) -> int:
    """Return the number of axes of what a constraint constrains, 0 for scalars and 1 for vectors.

    Example:
        >>> num_axes_of(constraints.positive), num_axes_of(dist.constraints.positive_ordered_vector)
        (0, 1)
    """
    # This one of Pyro's does not say that it constrains vectors.
    return 1 if isinstance(constraint, type(positive_ordered_vector)) else constraint.event_dim


def of_scalars(constraint: Constraint) -> Constraint:
    """Return a constraint whose concatenated parts are on scalars where possible; torch checks no others side by side.

    Args:
        constraint: any constraint; one that is not a concatenation is returned itself.

    Example:
        >>> of_scalars(constraints.cat([constraints.real_vector, constraints.positive], dim=-1, lengths=[2, 1])).cseq
        [Real(), GreaterThan(lower_bound=0.0)]
    """
    if not isinstance(constraint, constraints.cat):
        return constraint
    return constraints.cat([without_events(part) for part in constraint.cseq], constraint.dim, constraint.lengths)


def angles_and_reals(angles: Sequence[bool], num_axes: int) -> Constraint:
    """Return the constraint on events whose indices along the last axis are angles where told, and real elsewhere.

    Args:
        angles: one boolean for each index along the last axis.
        num_axes: the number of axes of an event.

    Example:
        >>> angles_and_reals([True, True, False], 1).base_constraint.lengths
        [2, 1]
    """
    runs = [(is_angle, len(list(run))) for is_angle, run in groupby(angles)]
    parts = [circular if is_angle else constraints.real for is_angle, _ in runs]
    columns = parts[0] if len(parts) == 1 else constraints.cat(parts, -1, [length for _, length in runs])
    return constraints.independent(columns, num_axes)


def wrapped(angle: Tensor) -> Tensor:
    r"""Add whole turns to angles, so that they lie in :math:`(-\pi, \pi]`.

    Example:
        >>> wrapped(torch.tensor([0.5, 4.0, -10.0]))
        tensor([ 0.5000, -2.2832,  2.5664])
    """
    # Rounding may leave an angle that is just outside.
    return (angle - turns(angle)).clamp(-math.pi, math.pi)


def turns(angle: Tensor) -> Tensor:
    r"""Return the whole turns in angles, multiples of :math:`2\pi` without which they lie in :math:`(-\pi, \pi]`."""
    return 2 * math.pi * torch.ceil((angle - math.pi) / (2 * math.pi))
