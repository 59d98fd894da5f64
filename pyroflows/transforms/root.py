"""A bracketed, vectorised search for roots of increasing scalar functions, with exact gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyroflows.compiling.eager import runs_in_python
from pyroflows.errors import InversionError

# Each iteration halves the bracket or the Newton step before it. Their number is fixed, so that the search traces and
# runs under vmap; no case was found that needs more than three quarters of them, brackets of width 1e8 included.
NUM_ITERATIONS = {torch.float64: 100, torch.float32: 60}


def increasing_root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], target: Tensor, lower: Tensor, upper: Tensor
) -> Tensor:
    r"""Solve ``function(a) = target`` for a in ``[lower, upper]``, elementwise.

    Newton's method, safeguarded by bisection, finds the root without gradients. Two Newton steps with gradients follow.
    They move the root by rounding only, since ``function(a)`` already equals the target. The first gives the root the
    derivative of the implicit function :math:`a(y, \theta)`,

    .. math:: \mathrm{d}a = (\mathrm{d}y - \partial_\theta f\, \mathrm{d}\theta) / f'(a),

    and the second makes second derivatives exact as well.

    Args:
        function: maps a to ``(f(a), f'(a))``, where f' must be positive; gradients flow into whatever it closes over.
        target: y, of any shape.
        lower: lower end of a bracket of the root, of the target's shape.
        upper: upper end of the bracket, of the target's shape.

    Returns:
        The root, of the target's shape. It is NaN where the target or the bracket is not finite, and, in a traced call
        or under vmap, where the search missed the target.

    Raises:
        InversionError: in eager execution, if a residual exceeds rounding.

    Example:
        >>> cubic = lambda a: (a + a**3, 1 + 3 * a**2)
        >>> increasing_root(cubic, torch.tensor([2.0, 10.0]), torch.zeros(2), torch.full((2,), 10.0))
        tensor([1., 2.])
    """
    with torch.no_grad():
        low, high = lower.detach(), upper.detach()
        a, last_step = (low + high) / 2, (high - low).abs()
        for _ in range(NUM_ITERATIONS.get(a.dtype, 24)):
            value, slope = function(a)
            below = value < target
            low, high = torch.where(below, a, low), torch.where(below, high, a)
            step = (target - value) / slope
            newton, half = a + step, (high - low) / 2
            # Without the second condition Newton's method can run in circles inside the bracket.
            trusted = (newton >= low) & (newton <= high) & (step.abs() <= last_step / 2)
            a, last_step = torch.where(trusted, newton, low + half), torch.where(trusted, step.abs(), half)
        value, slope = function(a)
        residual = (value - target).abs()
        # The target is known to rounding, and so is the root, which moves the value by slope times that. The bracket
        # does not count: beside a wide one a root that was missed would look like rounding.
        scale = 1 + target.abs() + a.abs() * slope
        solved = residual <= 100 * torch.finfo(a.dtype).eps * scale
        # Values that are not finite come from a fit that diverges: their NaN passes on to the training guard.
        finite = torch.isfinite(scale + lower + upper)
        failed = ~solved & finite
    if runs_in_python() and failed.any():
        raise InversionError(
            f"the inverse missed its target by {residual[failed].max().item():.1e} at {int(failed.sum())} of "
            f"{failed.numel()} values: the parameters are too extreme for this dtype; use float64 or smaller parameters"
        )
    for _ in range(2):
        value, slope = function(a)
        a = a - (value - target) / slope
    return torch.where(solved & finite, a, torch.nan)
