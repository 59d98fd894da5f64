r"""Linear systems with the transposed Jacobian of an autoregressive layer :math:`x_j = T(z_j; \theta_j(z_{<j}))`.

They give the gradient of its inverse, by the implicit function theorem, and the score of what it maps. With the
cotangents :math:`c` of :math:`\theta`, the system is :math:`J^\top v + (\partial\theta/\partial z)^\top c = g`; its
component j reads

.. math:: T_j' v_j + \sum_{k>j} \partial_{z_j} \theta_k \cdot (c_k + v_k\, \partial_\theta T_k) = g_j.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pyroflows.compiling.eager import runs_in_python
from pyroflows.errors import FlowError
from pyroflows.nets import MADE, IncrementalGradient
from pyroflows.transforms.base import pull_back

# From g, T', the derivative of T by theta, and c, to v.
Solver: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def parameters_and_solver(net: nn.Module, z: Tensor, context: Tensor | None) -> tuple[Tensor, Solver]:
    r"""The parameters :math:`\theta` that a network computes, and what solves the system at z."""
    if isinstance(net, MADE):
        hidden = net.pre_activations(z, context)
        return net.parameters_from(hidden), partial(_by_substitution, net, hidden)
    z = z if z.requires_grad else z.detach().requires_grad_()
    theta = net(z, context)
    return theta, partial(_by_iteration, z, theta)


def _by_substitution(
    net: MADE, hidden: list[Tensor], gradient: Tensor, slope: Tensor, x_by_theta: Tensor, by_theta: Tensor
) -> Tensor:
    """Backward substitution: the sum is what the network's backward pass brings to input j once all later v_k are
    known."""
    dim = len(net.order)

    def by_dimension(t: Tensor) -> tuple[Tensor, ...]:
        """D blocks ``(num_params, N)`` of memory of their own."""
        return t.reshape(-1, dim, net.num_params).permute(1, 2, 0).contiguous().unbind()

    # What is left of g, (D, N): from the last place on each v_k, known by then, takes its share from those before.
    rest = gradient.reshape(-1, dim).T.clone(memory_format=torch.contiguous_format)
    rests, factors, cotangents = (
        rest.unbind(),
        by_dimension(-x_by_theta / slope[..., None]),
        by_dimension(-by_theta),
    )
    steps = IncrementalGradient(net, [h.detach().reshape(-1, h.shape[-1]) for h in hidden], rest)
    for place in reversed(range(1, dim)):
        j = net.order[place]
        steps.parameter_gradient(place, cotangents[j].addcmul_(rests[j], factors[j]))
    return rest.T.reshape(gradient.shape) / slope


def _by_iteration(
    z: Tensor, theta: Tensor, gradient: Tensor, slope: Tensor, x_by_theta: Tensor, by_theta: Tensor
) -> Tensor:
    """A fixed point, in which each iteration is a backward pass of the whole network and makes one more place exact.

    It ends as soon as nothing changes by more than rounding, which is long before that where later places depend on
    earlier ones weakly.
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
