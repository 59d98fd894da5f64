"""Solves of linear systems with triangular matrices."""

import torch
from torch import Tensor


def solve(matrix: Tensor, y: Tensor, upper: bool) -> Tensor:
    """Return the z with ``matrix z = y`` for a triangular matrix."""
    # If all rows share one matrix they form one right-hand side, since a batch of solves would copy the matrix.
    rows = y.reshape(-1, y.shape[-1]) if matrix.dim() == 2 else y[..., None, :]
    # There is no triangular solve in half precision.
    dtype = torch.promote_types(y.dtype, torch.float32)
    solved = torch.linalg.solve_triangular(matrix.mT.to(dtype), rows.to(dtype), upper=not upper, left=False)
    return solved.reshape(y.shape).to(y.dtype)
