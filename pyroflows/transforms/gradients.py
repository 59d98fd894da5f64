"""Vector-Jacobian products of tensors that are already computed, gradients of solutions, and an elementwise score."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def pull_back(outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    r"""Return the vector-Jacobian products :math:`\sum_i c_i^\top \partial y_i / \partial x_j`, one for each input.

    An input that no output depends on gets zeros. The graph of the outputs is kept, so that it can be used again.

    Args:
        outputs: tensors :math:`y_i`; one without gradients counts as a constant.
        cotangents: :math:`c_i`, each of the shape of its output.
        inputs: tensors :math:`x_j` that require gradients.

    Example:
        >>> x, unused = torch.tensor(3.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
        >>> pull_back([x**2], [torch.tensor(1.0)], [x, unused])
        (tensor(6.), tensor(0.))
    """
    pairs = [(output, cotangent) for output, cotangent in zip(outputs, cotangents, strict=True) if output.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(value) for value in inputs)
    outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outputs, inputs, cotangents, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def attached(z: Tensor, residual: Tensor, solve_transposed: Callable[[Tensor], Tensor]) -> Tensor:
    r"""Return z with the gradients of the implicit function that :math:`F(z; \theta) = 0` defines.

    As in :func:`pyroflows.transforms.root.increasing_root`, they are those of a Newton step :math:`z - J^{-1} F(z)`,
    which does not change the value.

    Args:
        z: the solution, without gradients.
        residual: :math:`F(z)`, which is zero up to rounding and has the gradients of everything but z.
        solve_transposed: a function that maps g to the v with :math:`J^\top v = g`. If its results have gradients, so
            have those of z.

    Example:
        >>> y = torch.tensor(9.0, requires_grad=True)
        >>> root = attached(torch.tensor(3.0), 3.0**2 - y, lambda g: g / 6)  # F = z^2 - y
        >>> torch.autograd.grad(root, y)
        (tensor(0.1667),)
    """
    step: Tensor = _NewtonStep.apply(residual, z, solve_transposed)
    return step


class _NewtonStep(torch.autograd.Function):
    """The step ``z - J^{-1} residual``, whose residual is zero but has gradients."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, z: Tensor, solve_transposed: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve_transposed = solve_transposed
        return z.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return -ctx.solve_transposed(gradient), None, None


def elementwise_score(z: Tensor, log_slopes: Tensor, score: Tensor) -> Tensor:
    r"""Return the score of the law of x, where :math:`x_j = T(z_j)`, from that of the law of z.

    .. math:: \partial_{x_j} \log q(x) = (\partial_{z_j} \log p(z) - \partial_{z_j} \log T'(z_j)) / T'(z_j)

    Args:
        z: the elements, which require gradients.
        log_slopes: :math:`\log T'(z_j)`, computed from this z and of its shape.
        score: :math:`\nabla_z \log p(z)`, of the shape of z.

    Example:
        >>> z = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> elementwise_score(z, torch.tensor([2.0, 2.0]).log(), -z)  # x = 2 z, z standard normal
        tensor([-0.5000,  1.0000])
    """
    with torch.no_grad():
        (slope_of_log_slopes,) = pull_back((log_slopes,), (torch.ones_like(log_slopes),), (z,))
        return (score - slope_of_log_slopes) * torch.exp(-log_slopes)
