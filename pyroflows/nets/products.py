"""Products of matrices, by the faster of the two libraries that torch brings for processors."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# From this number of multiplications on, a product of oneDNN is worth its larger overhead. It rearranges the second
# factor, so that it pays earlier where that is the smaller one.
MIN_SIZE = 5 * 2**19
MIN_SIZE_OF_ROWS = 2**20


def is_large(a: Tensor, num_columns: int) -> bool:
    """Tell whether oneDNN multiplies a matrix by another one with so many columns faster than MKL.

    MKL leaves half of the width of the vector registers of AMD's processors unused, and oneDNN does not. On others the
    two are about as fast, and MKL, which torch calls by itself, needs no choice.

    Args:
        a: ``(m, k)``, where the other one is ``(k, n)``, of the same dtype and device.
        num_columns: n.
    """
    return _is_above(MIN_SIZE, a, num_columns)


def _is_above(min_size: int, a: Tensor, num_columns: int) -> bool:
    return (
        a.numel() * num_columns > min_size
        and a.dtype is torch.float32
        and a.device.type == "cpu"
        and _is_amd_with_onednn()
    )


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of two matrices, ``(m, k)`` and ``(k, n)``, for tensors whose gradients nobody records.

    Example:
        >>> product(2 * torch.eye(2), torch.ones(2, 3))
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
    """
    if _is_above(MIN_SIZE_OF_ROWS if b.numel() < a.numel() else MIN_SIZE, a, b.shape[1]):
        # This operator is the linear layer that torch's compiler uses: it takes the transpose of the second factor.
        return torch.ops.mkldnn._linear_pointwise.default(a, b.T, None, "none", [], "")
    return torch.mm(a, b)


def affine(h: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    r"""Return :math:`h W^\top + b` for a batch ``(m, k)``, a matrix ``(n, k)`` and an offset that broadcasts.

    It is for tensors whose gradients nobody records, as :func:`product` is.
    """
    if not is_large(h, weight.shape[0]):
        return torch.addmm(offset, h, weight.T)
    if offset.dim() == 1:
        return torch.ops.mkldnn._linear_pointwise.default(h, weight, offset, "none", [], "")
    return product(h, weight.T).add_(offset)


@cache
def _is_amd_with_onednn() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and cpuinfo.exists()
        and "AuthenticAMD" in cpuinfo.read_text()
    )
