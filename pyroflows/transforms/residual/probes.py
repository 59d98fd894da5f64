"""Random probes of a Jacobian's traces, and the gradient of what they estimate."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows.compiling.eager import is_transformed
from pyroflows.nets.gradients import recorded_gradients
from pyroflows.nets.lipschitz.contraction import Linearized

LogDetOf = Callable[[Linearized, int], Tensor]


def signs(num_probes: int, like: Tensor) -> Tensor:
    """Draw vectors of independent signs, ``(num_probes, *like.shape)``.

    Among vectors of independent elements with mean 0 and variance 1 they estimate traces with the least variance.
    """
    return 2 * torch.randint(2, (num_probes, *like.shape), dtype=like.dtype, device=like.device) - 1


def first_product(at: Linearized, v: Tensor) -> Tensor:
    """Return :math:`J v`, which records gradients only where torch's compilers look for them."""
    return (at if torch.is_grad_enabled() and is_transformed() else at.held()).times(v)


def estimated(
    value: Tensor, w: Tensor, v: Tensor, product: Tensor, at: Linearized, num_axes: int, exact: LogDetOf
) -> Tensor:
    r"""Return an estimate with its gradient, as means over the probes.

    The gradient is that of :math:`w^\top J v` with w and v held. The product is recorded in the backward pass alone, so
    that an estimate holds the memory of its own arguments, whatever the number of terms was.

    Its derivative is no estimate of a second derivative, since w depends on J too. Where the gradient is itself
    recorded, by ``create_graph=True``, it is that of the function that is estimated, so that derivatives of any order
    are right. What ``torch.compile``, ``make_fx`` and ``torch.jit.trace`` record has first derivatives only.

    Args:
        value: the estimates, ``(num_probes, *batch)``.
        w: the vectors that their gradients take from the left, ``(num_probes, *batch, *shape)``.
        v: the probes, of the same shape.
        product: their :func:`first_product`.
        at: the Jacobian.
        num_axes: number of axes of an event.
        exact: gives what is estimated.
    """
    if not torch.is_grad_enabled():
        return value.mean(0)
    if is_transformed():  # by torch's compilers, which cannot see into the written gradient
        along = (w * product).flatten(-num_axes).sum(-1)
        return (value + (along - along.detach())).mean(0)
    return _Estimated.apply((exact, num_axes, len(at.weights)), value, w, v, *at.weights, *at.slopes)


class _Estimated(torch.autograd.Function):
    """The mean of estimates over the probes, with the gradient of the first of two functions written in its place."""

    @staticmethod
    def forward(ctx: Any, arguments: Any, value: Tensor, w: Tensor, v: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(w, v, *parts)
        ctx.arguments = arguments
        return value.mean(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        w, v, *parts = ctx.saved_tensors
        exact, num_axes, num_weights = ctx.arguments

        def linearized(parts: Sequence[Tensor]) -> Linearized:
            return Linearized(v[0], parts[:num_weights], parts[num_weights:])

        if torch.is_grad_enabled():  # by create_graph=True
            found = recorded_gradients(lambda *views: exact(linearized(views), num_axes), parts, (gradient,))
        else:
            w = w * gradient.reshape(*gradient.shape, *[1] * num_axes) / len(v)
            found = recorded_gradients(lambda *views: linearized(views).times(v), parts, (w,))
        return None, None, None, None, *found
