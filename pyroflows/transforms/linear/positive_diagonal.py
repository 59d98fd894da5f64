"""The positive diagonal of a triangular factor."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_SCALE = 1e-3
_SHIFT = math.log(math.expm1(1 - MIN_SCALE))


def positive_diagonal(raw: Tensor) -> Tensor:
    """Return the diagonal of a factor, which is positive, and one where the raw matrix is zero."""
    return MIN_SCALE + F.softplus(raw.diagonal(dim1=-2, dim2=-1) + _SHIFT)


def raw_diagonal(diagonal: Tensor) -> Tensor:
    """Return the raw numbers from which :func:`positive_diagonal` makes these, which are larger than ``MIN_SCALE``."""
    return torch.log(torch.expm1(diagonal - MIN_SCALE)) - _SHIFT
