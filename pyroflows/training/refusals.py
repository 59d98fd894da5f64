"""Refuse data that cannot be used, in messages that name the first row and its column."""

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.constraints import is_angular, num_axes_of, parts_of
from pyroflows.errors import DataError
from pyroflows.shapes import as_given, listed, places
from pyroflows.transforms.discrete.base import advice_on
from pyroflows.transforms.wild import center_and_spread

ColumnLabels: TypeAlias = list[Any] | None
# A standard deviation must be at least this many times the spacing of numbers in the dtype of a flow. Normal data that
# were rounded to a tenth of it were fitted as well as others, see :mod:`pyroflows.training.ill_posed`.
MIN_RESOLUTION = 10


def refuse(
    is_bad: Tensor, values: Tensor, name: str, what: str, labels: ColumnLabels = None, advice: str | None = None
) -> None:
    """Raise if there is a bad value; the message names the first one, and says how many rows have one.

    Args:
        is_bad: booleans ``(n, ...)``.
        values: the values, of the same shape.
        name: what they are.
        what: what is bad.
        labels: the labels of the columns of a frame, or None.
        advice: what to do, or None.
    """
    if not is_bad.any():
        return
    row, *column = is_bad.nonzero()[0].tolist()
    count = int(is_bad.reshape(len(values), -1).any(-1).sum())
    place = f"row {row}" + (f", column {as_given(torch.Size(column))}" if column else "")
    if labels is not None and len(column) == 1:
        place += f" ({labels[column[0]]!r})"
    first = values[row, *column]
    shown = listed([f"{value:.6g}" for value in first.flatten().tolist()]) if first.dim() else f"{first.item():.6g}"
    advice = f": {advice}" if advice else ""
    raise DataError(f"{name} has {what} in {count} of {len(values)} rows, the first is {shown} in {place}{advice}")


def refuse_lost_digits(name: str, given: Tensor, cast: Tensor) -> None:
    """Raise if numbers lose so many digits in the dtype of the flow that rows differ in little else.

    Half of the rows are rounded by more than a quarter of the spacing of numbers there, which is compared with the
    spread of the rows. To subtract the location in the dtype of the data would give the right density, but draws of
    the flow would be rounded all the same.
    """
    dtype = cast.dtype
    if given.dtype == dtype or not len(given) or torch.equal(cast.to(given.dtype), given):
        return
    given, cast = given.cpu().double(), cast.cpu().double()
    _, spread = center_and_spread(given)
    spacing, _ = center_and_spread((given - cast).abs())
    lost = places((MIN_RESOLUTION * 4 * spacing > spread) & (spread > 0))
    if lost:
        raise DataError(
            f"columns {listed(lost)} of {name} lose the digits in which their rows differ, since the flow rounds them "
            f"to {dtype}: fit flow.double(), or subtract an origin from them first"
        )


def refuse_outside(support: constraints.Constraint, x: Tensor, labels: ColumnLabels, name: str = "x") -> None:
    """Raise if a value is outside a support, or on its boundary, where the bijection onto it is not finite."""
    first = 0
    for constraint, length in parts_of(support, x.shape[-1]):
        columns, first = slice(first, first + length), first + length
        values = x[..., columns]
        is_inside = constraint.check(values)
        if num_axes_of(constraint):
            refuse(~is_inside, x, name, f"values outside the support {constraint}", labels)
            continue
        is_inside = is_inside.reshape(*is_inside.shape, *[1] * (x.dim() - is_inside.dim()))
        # There is no bijection onto a discrete support, to which its bounds belong.
        for bound in () if constraint.is_discrete else ("lower_bound", "upper_bound"):
            is_inside = is_inside & (values != getattr(constraint, bound, torch.nan))
        is_bad = torch.zeros_like(x, dtype=torch.bool)
        is_bad[..., columns] = ~is_inside
        what = f"values outside the support {constraint}" + ("" if constraint.is_discrete else " or on its boundary")
        advice = None
        if isinstance(constraint, type(constraints.integer_interval(0, 1))):
            what = f"values that are no integers from {constraint.lower_bound} to {constraint.upper_bound}"
            advice = None if is_inside.all() else advice_on(values)
        if is_angular(constraint):
            what = (
                "angles outside of -pi to pi (make degrees radians by torch.deg2rad, "
                "then take whole turns out by torch.remainder(x + pi, 2 * pi) - pi)"
            )
        refuse(is_bad, x, name, what, labels, advice)
