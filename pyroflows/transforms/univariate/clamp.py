"""The soft clamp of a log-scale, between a bound on contraction and one on expansion."""

import math
from typing import TypeAlias

import torch
from torch import Tensor

from pyroflows.errors import OptionError

# The bounds on contraction and expansion.
Bounds: TypeAlias = tuple[float | None, float | None]


def checked_bounds(what: str, max_contraction: float | None, max_expansion: float | None) -> Bounds:
    """Return the two bounds, if both are positive and finite, or both None.

    Args:
        what: what has the bounds, for the message.
        max_contraction: the bound on contraction.
        max_expansion: the bound on expansion.

    Raises:
        OptionError: if they are not.
    """
    bounds = (max_contraction, max_expansion)
    if (max_contraction is None) != (max_expansion is None) or any(
        b is not None and not 0 < b < math.inf for b in bounds
    ):
        raise OptionError(f"the bounds of {what} must be both positive and finite, or both None, got {bounds}")
    return bounds


def soft_clamped(log_scale: Tensor, bounds: Bounds) -> Tensor:
    r"""Return :math:`c_+ \tanh(s / c_+)` for :math:`s \ge 0` and :math:`c_- \tanh(s / c_-)` for :math:`s < 0`.

    Args:
        log_scale: s.
        bounds: :math:`(c_-, c_+)`; if they are None, s is returned as it is.

    Example:
        >>> soft_clamped(torch.tensor([-100.0, 0.0, 100.0]), (4.0, 2.0))
        tensor([-4.,  0.,  2.])
    """
    max_contraction, max_expansion = bounds
    if max_contraction is None or max_expansion is None:
        return log_scale
    middle, half = (max_expansion + max_contraction) / 2, (max_expansion - max_contraction) / 2
    bound = middle + half * torch.sign(log_scale.detach())
    return bound * torch.tanh(log_scale / bound)
