"""Bounds that keep maps finite at values far from the data, where what networks compute has no bound.

A network computes parameters of order one to a hundred at data, and a thousand times as large ones 1000 standard
deviations away, which a map squares or takes as slopes, layer after layer.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_COEFFICIENT = 1e3
# The least bound of values, for float16, whose largest number is 65504.
LEAST_BOUND = 1e3


def bounded_coefficients(theta: Tensor) -> Tensor:
    r"""Return parameters clamped to :math:`\pm 10^3`.

    Example:
        >>> bounded_coefficients(torch.tensor([0.5, -1e20]))
        tensor([ 5.0000e-01, -1.0000e+03])
    """
    # Its backward pass is one operation, unlike that of clamp.
    return F.hardtanh(theta, -MAX_COEFFICIENT, MAX_COEFFICIENT)


def below_overflow(x: Tensor) -> Tensor:
    r"""Return values clamped to :math:`\pm M^{1/4}`, M being the largest number of the dtype: to 4e9 in float32.

    The network and the map of a further layer take such values without overflow, and so do gradients of the
    log-density, which are products of several of them. A normal density is zero there, to any dtype.

    Example:
        >>> below_overflow(torch.tensor([2.0, torch.inf])).tolist()
        [2.0, 4294967296.0]
    """
    largest = max(torch.finfo(x.dtype).max ** 0.25, LEAST_BOUND)
    return F.hardtanh(x, -largest, largest)
