r"""Linear systems with the transposed Jacobian of an autoregressive layer :math:`x_j = T(z_j; \theta_j(z_{<j}))`.

They give the gradient of its inverse, by the implicit function theorem, and the score of what it maps. With the
cotangents :math:`c` of :math:`\theta`, the system is :math:`J^\top v + (\partial\theta/\partial z)^\top c = g`; its
component j reads

.. math:: T_j' v_j + \sum_{k>j} \partial_{z_j} \theta_k \cdot (c_k + v_k\, \partial_\theta T_k) = g_j.

Indices j and k run along the last axis, in the layer's order; where an event has further axes, all elements at one
index are one block of the system.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pyroflows.compiling.eager import runs_in_python
from pyroflows.errors import FlowError
from pyroflows.nets import GradientSteps
from pyroflows.transforms.gradients import pull_back

# It maps g, T', the derivative of T by theta, and c, to v.
Solver: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def parameters_and_solver(
    net: nn.Module, z: Tensor, context: Tensor | None, order: Sequence[int], num_axes: int
) -> tuple[Tensor, Solver]:
    r"""The parameters :math:`\theta` that a network computes at z, and what solves the system there.

    Args:
        net: the network; if it is an :class:`pyroflows.nets.IncrementalGradient`, the solver uses it.
        z: ``(..., *channels, D)``.
        context: what the network takes as such.
        order: ``order[i]`` is the index along the last axis that stands at place i.
        num_axes: the number of axes of an event, 1 for vectors.
    """
    # isinstance with a protocol takes as long as a step.
    if (with_gradient_steps := getattr(net, "with_gradient_steps", None)) is not None:
        theta, start = with_gradient_steps(z, context)
        return theta, partial(_by_substitution, start, order, num_axes)
    z = z if z.requires_grad else z.detach().requires_grad_()
    theta = net(z, context)
    return theta, partial(_by_iteration, z, theta)


def _by_substitution(
    start: Callable[[Tensor], GradientSteps],
    order: Sequence[int],
    num_axes: int,
    gradient: Tensor,
    slope: Tensor,
    x_by_theta: Tensor,
    by_theta: Tensor,
) -> Tensor:
    """Backward substitution: the sum is what the network's backward pass brings to input j once all later v_k are
    known."""

    def by_index(t: Tensor) -> tuple[Tensor, ...]:
        """D blocks ``(num_params, *channels, N)`` of memory of their own."""
        rows = t.reshape(-1, *t.shape[-num_axes - 1 :])
        return rows.permute(-2, -1, *range(1, num_axes), 0).contiguous().unbind()

    # What is left of g, (D, *channels, N): from the last place on each v_k, known by then, takes its share from those
    # before.
    rest = (
        gradient.reshape(-1, *gradient.shape[-num_axes:]).transpose(0, -1).clone(memory_format=torch.contiguous_format)
    )
    rests, factors, cotangents = rest.unbind(), by_index(-x_by_theta / slope[..., None]), by_index(-by_theta)
    steps = start(rest)
    for place in reversed(range(1, len(order))):
        j = order[place]
        steps.pull_back(place, cotangents[j].addcmul_(rests[j], factors[j]))
    return rest.transpose(0, -1).reshape(gradient.shape) / slope


def _by_iteration(
    z: Tensor, theta: Tensor, gradient: Tensor, slope: Tensor, x_by_theta: Tensor, by_theta: Tensor
) -> Tensor:
    """Fixed-point iteration: each iteration is a backward pass of the whole network and makes one more place exact.

    It ends as soon as nothing changes by more than rounding, which is long before the last place where later places
    depend on earlier ones weakly.
    """
    v = gradient / slope
    rounding = 4 * torch.finfo(v.dtype).eps
    for _ in range(z.shape[-1] - 1):
        (share,) = pull_back((theta,), (torch.addcmul(by_theta, v[..., None], x_by_theta),), (z,))
        last, v = v, (gradient - share) / slope
        if runs_in_python() and ((v - last).abs() <= rounding * (gradient.abs() + share.abs()) / slope).all():
            break
    return v


def attached(z: Tensor, residual: Tensor, solve_transposed: Callable[[Tensor], Tensor]) -> Tensor:
    r"""z with the gradients of the implicit function :math:`F(z; c, \mathrm{weights}) = x`.

    As in :func:`pyroflows.transforms.root.increasing_root`, by a Newton step :math:`z - J^{-1} (F(z) - x)`, which
    changes no value.

    Args:
        z: the solution, without gradients.
        residual: :math:`F(z) - x`, zero to rounding, with the gradients of everything but z.
        solve_transposed: gives the v with :math:`J^\top v = g`.
    """
    return _NewtonStep.apply(residual, z, solve_transposed)


class _NewtonStep(torch.autograd.Function):
    """``z - J^{-1} residual`` where the residual is zero but has gradients."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, z: Tensor, solve_transposed: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve_transposed = solve_transposed
        return z.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # once_differentiable would not do: torch.autograd.functional.hessian then returns zeros.
        if torch.is_grad_enabled():
            raise FlowError(
                "create_graph=True has no second derivatives of this direction of Autoregressive: use torch.func, or a "
                "flow that goes here in one pass, which is MAF for a density and IAF for a sample"
            )
        return -ctx.solve_transposed(gradient), None, None
