"""Solves of linear systems with triangular matrices."""

import torch
from torch import Tensor


def solve(matrix: Tensor, y: Tensor, upper: bool, is_unit: bool = False) -> Tensor:
    """Return the z with ``matrix z = y`` for a triangular matrix, of which the other triangle is not read.

    Args:
        matrix: one matrix ``(n, n)``, or one for each vector, ``(..., n, n)``.
        y: vectors ``(..., n)``.
        upper: whether the matrix is upper triangular, rather than lower.
        is_unit: whether its diagonal counts as ones, whatever stands there.

    Example:
        >>> solve(torch.tensor([[2.0, 7.0], [1.0, 2.0]]), torch.tensor([2.0, 3.0]), upper=False)
        tensor([1., 1.])
    """
    # If all rows share one matrix they form one right-hand side, since a batch of solves would copy the matrix.
    rows = y.reshape(-1, y.shape[-1]) if matrix.dim() == 2 else y[..., None, :]
    # There is no triangular solve in half precision.
    dtype = torch.promote_types(y.dtype, torch.float32)
    solved = torch.linalg.solve_triangular(
        matrix.mT.to(dtype), rows.to(dtype), upper=not upper, left=False, unitriangular=is_unit
    )
    return solved.reshape(y.shape).to(y.dtype)
