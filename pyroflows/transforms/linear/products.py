"""Products of matrices, one for all rows or one for each, with vectors."""

from torch import Tensor


def multiply(matrix: Tensor, z: Tensor) -> Tensor:
    """Return ``matrix z`` for vectors ``(..., n)`` and one matrix ``(m, n)``, or one for each vector.

    Example:
        >>> multiply(torch.eye(3)[:2], torch.tensor([5.0, 6.0, 7.0]))
        tensor([5., 6.])
    """
    # If all rows share one matrix they form one factor, since a batch of products would copy the matrix.
    return z @ matrix.mT if matrix.dim() == 2 else (z[..., None, :] @ matrix.mT).squeeze(-2)
