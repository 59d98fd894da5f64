r"""Linear systems with the transposed Jacobian of an autoregressive layer :math:`x_j = T(z_j; \theta_j(z_{<j}))`.

Their solutions are the gradient of the inverse, by the implicit function theorem, and the score of the law of x. With
cotangents :math:`c` of :math:`\theta`, the system is :math:`J^\top v + (\partial\theta/\partial z)^\top c = g`. Its
component j reads

.. math:: T_j' v_j + \sum_{k>j} \partial_{z_j} \theta_k \cdot (c_k + v_k\, \partial_\theta T_k) = g_j.

Indices j and k run along the last axis, in the layer's order. If an event has further axes, all elements at one index
are one block of the system.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pyroflows.compiling.eager import runs_in_python
from pyroflows.nets import GradientSteps
from pyroflows.transforms.gradients import pull_back

# A solver maps g, T', the derivative of T by theta, and c to the solution v.
Solver: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def parameters_and_solver(
    net: nn.Module, z: Tensor, context: Tensor | None, order: Sequence[int], num_axes: int
) -> tuple[Tensor, Solver]:
    r"""Return the parameters :math:`\theta` that a network computes at z, and a solver of the system there.

    Args:
        net: the network; if it offers :class:`pyroflows.nets.IncrementalGradient`, the solver substitutes backwards,
            and otherwise it iterates.
        z: ``(..., *channels, D)``.
        context: the context of the network, or None.
        order: ``order[i]`` is the index along the last axis at place i.
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
    """Solve by backward substitution: the network's backward pass gives the sum in equation j once all later v_k are
    known.
    """

    def by_index(t: Tensor) -> tuple[Tensor, ...]:
        """Return D contiguous blocks ``(num_params, *channels, N)``."""
        rows = t.reshape(-1, *t.shape[-num_axes - 1 :])
        return rows.permute(-2, -1, *range(1, num_axes), 0).contiguous().unbind()

    # This is what remains of g, (D, *channels, N). From the last place to the first, each v_k is known by its turn and
    # subtracts its terms from the equations before.
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
    """Solve by fixed-point iteration, with a backward pass of the whole network in each."""

    def through_network(v: Tensor) -> Tensor:
        return pull_back((theta,), (torch.addcmul(by_theta, v[..., None], x_by_theta),), (z,))[0]

    return solved_by_iteration(through_network, slope, gradient)


def solved_by_iteration(above_diagonal: Callable[[Tensor], Tensor], diagonal: Tensor, right: Tensor) -> Tensor:
    r"""Solve :math:`d \odot v + f(v) = r` where :math:`f(v)_j` depends on the :math:`v_k` at later places k > j alone.

    Each iteration makes one more place exact. They end as soon as nothing changes by more than rounding. If later
    places depend on earlier ones weakly, that is long before the last place.

    Args:
        above_diagonal: f, affine in v.
        diagonal: d, positive, ``(..., D)``.
        right: r, ``(..., D)``.

    Example:
        >>> upper = torch.tensor([[0.0, 3.0], [0.0, 0.0]])
        >>> solved_by_iteration(lambda v: v @ upper.T, torch.tensor([2.0, 1.0]), torch.tensor([5.0, 1.0]))
        tensor([1., 1.])
    """
    v = right / diagonal
    rounding = 4 * torch.finfo(v.dtype).eps
    for _ in range(v.shape[-1] - 1):
        share = above_diagonal(v)
        last, v = v, (right - share) / diagonal
        if runs_in_python() and ((v - last).abs() <= rounding * (right.abs() + share.abs()) / diagonal).all():
            break
    return v
