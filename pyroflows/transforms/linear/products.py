"""Products of matrices, one for all rows or one for each, with vectors."""

from typing import Any

import torch
from torch import Tensor

from pyroflows.compiling.eager import is_transformed
from pyroflows.nets.products import is_large, product


def multiply(matrix: Tensor, z: Tensor) -> Tensor:
    """Return ``matrix z`` for vectors ``(..., n)`` and one matrix ``(m, n)``, or one for each vector.

    Example:
        >>> multiply(torch.eye(3)[:2], torch.tensor([5.0, 6.0, 7.0]))
        tensor([5., 6.])
    """
    if matrix.dim() > 2:
        return (z[..., None, :] @ matrix.mT).squeeze(-2)
    # If all rows share one matrix they form one factor, since a batch of products would copy the matrix.
    rows = z.reshape(-1, z.shape[-1])
    # The transforms of torch.func cannot see into a gradient that is written out.
    if is_transformed() or not is_large(matrix, len(rows)):
        return z @ matrix.mT
    return _Product.apply(matrix, rows).reshape(*z.shape[:-1], len(matrix))


class _Product(torch.autograd.Function):
    r"""The product :math:`Y = Z A^\top` by the faster of two libraries, with its gradient written out.

    From the gradient G by Y follow :math:`G^\top Z` by A and :math:`G A` by Z. Second derivatives are those of the
    recorded operations.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(matrix, rows)
        return product(rows.contiguous(), matrix.mT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        matrix, rows = ctx.saved_tensors
        # By create_graph=True gradients flow through these products again, and is_transformed() is for a batch of them.
        times = torch.mm if torch.is_grad_enabled() or is_transformed() else product
        by_matrix = times(gradient.mT, rows) if ctx.needs_input_grad[0] else None
        return by_matrix, times(gradient, matrix) if ctx.needs_input_grad[1] else None
