"""Roots of increasing scalar functions: bracketed, vectorised, to float precision, with exact gradients."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyroflows.errors import InversionError

# Newton's steps converge in a few iterations; the bracket's halvings, which guarantee the rest, need one iteration a
# bit. The number is fixed, so that the search traces and runs under vmap.
NUM_ITERATIONS = {torch.float64: 80, torch.float32: 48}


def increasing_root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], target: Tensor, lower: Tensor, upper: Tensor
) -> Tensor:
    r"""Solve ``function(a) = target`` for a in ``[lower, upper]``, elementwise.

    ``function`` returns its value and its derivative, which must be positive. Newton's method, safeguarded by
    bisection, without gradients; then one Newton step with gradients. Since the function's value is already the
    target's there, that step changes the root by rounding only, and its derivative is the implicit one,

    .. math:: \mathrm{d}a = (\mathrm{d}y - \partial_\theta f\, \mathrm{d}\theta) / f'(a).

    Args:
        function: maps a to ``(f(a), f'(a))``; gradients flow into whatever it closes over.
        target: y; any shape.
        lower: lower end of a bracket of the root, of the target's shape.
        upper: its upper end.

    Raises:
        InversionError: in eager execution, where the residual exceeds rounding; traced or under vmap the result is
            NaN there.
    """
    with torch.no_grad():
        low, high = lower.detach(), upper.detach()
        scale = 1 + target.abs() + low.abs() + high.abs()
        a = (low + high) / 2
        for _ in range(NUM_ITERATIONS.get(a.dtype, 24)):
            value, slope = function(a)
            below = value < target
            low, high = torch.where(below, a, low), torch.where(below, high, a)
            newton = a - (value - target) / slope
            a = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
    value, slope = function(a)
    residual = value - target
    # A target that is not finite is the caller's affair: its NaN passes on.
    solved = (residual.detach().abs() <= 1e3 * torch.finfo(a.dtype).eps * scale) | ~torch.isfinite(target)
    if _runs_in_python() and not solved.all():
        worst = residual.detach()[~solved].abs().max().item()
        raise InversionError(
            f"the inverse missed its target by {worst:.1e} at {int((~solved).sum())} of {solved.numel()} values: "
            "the parameters are too extreme for this dtype; use float64 or smaller parameters"
        )
    return torch.where(solved, a - residual / slope.detach(), torch.nan)


def _runs_in_python() -> bool:
    """Whether a tensor's value can be looked at here: not under vmap, torch.compile or make_fx."""
    return (
        not torch.compiler.is_compiling()
        and get_proxy_mode() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )
