"""Maps that scale: all numbers alike, or the negative ones alone."""

import torch
from torch import Tensor

from pyroflows.transforms.univariate.base import Pair
from pyroflows.transforms.univariate.clamp import checked_bounds, soft_clamped


class Scale:
    r"""The scaling :math:`x = e^s z` with :math:`\theta = s_0`, as in the last layer of NICE (Dinh et al. 2015,
    arXiv:1410.8516, section 3.3); the log-derivative is s.

    The log-scale s is :math:`s_0`, softly clamped as in :class:`pyroflows.transforms.univariate.Affine`, of whose
    bounds the arguments and errors here are the same.

    Shapes: z and x are ``(...)``, theta is ``(..., 1)``.

    Example:
        >>> Scale(None, None).forward_and_ladj(torch.tensor(2.0), torch.tensor([3.0]).log())
        (tensor(6.), tensor(1.0986))
    """

    num_params = 1

    def __init__(self, max_contraction: float | None = 4.0, max_expansion: float | None = 2.0) -> None:
        self.max_contraction, self.max_expansion = checked_bounds("a scale", max_contraction, max_expansion)

    def forward_and_ladj(self, z: Tensor, theta: Tensor) -> Pair:
        log_scale = soft_clamped(theta[..., 0], (self.max_contraction, self.max_expansion))
        return z * log_scale.exp(), log_scale.expand_as(z)

    def inverse_and_ladj(self, x: Tensor, theta: Tensor) -> Pair:
        log_scale = soft_clamped(theta[..., 0], (self.max_contraction, self.max_expansion))
        return x * (-log_scale).exp(), -log_scale.expand_as(x)

    def __repr__(self) -> str:
        return f"Scale(max_contraction={self.max_contraction}, max_expansion={self.max_expansion})"


class LeakyReLU:
    r"""The leaky rectifier :math:`x = z` for :math:`z \ge 0` and :math:`x = e^s z` for :math:`z < 0`, whose slope of
    negative numbers is learned and always positive, with :math:`\theta = s_0`.

    The log-slope s is :math:`s_0`, softly clamped as in :class:`pyroflows.transforms.univariate.Affine`, of whose
    bounds the arguments and errors here are the same. The density of x jumps at zero, by the factor :math:`e^s`;
    :class:`pyroflows.transforms.univariate.SinhArcsinh` is a smooth map.

    Shapes: z and x are ``(...)``, theta is ``(..., 1)``.

    Example:
        >>> LeakyReLU().forward_and_ladj(torch.tensor([2.0, -2.0]), torch.tensor([-100.0]))[0]
        tensor([ 2.0000, -0.0366])
    """

    num_params = 1

    def __init__(self, max_contraction: float | None = 4.0, max_expansion: float | None = 2.0) -> None:
        self.max_contraction, self.max_expansion = checked_bounds("a leaky rectifier", max_contraction, max_expansion)

    def forward_and_ladj(self, z: Tensor, theta: Tensor) -> Pair:
        log_slope = self._log_slope_at(z, theta)
        return z * log_slope.exp(), log_slope

    def inverse_and_ladj(self, x: Tensor, theta: Tensor) -> Pair:
        log_slope = self._log_slope_at(x, theta)
        return x * (-log_slope).exp(), -log_slope

    def _log_slope_at(self, value: Tensor, theta: Tensor) -> Tensor:
        """Return s at negative numbers, and zero elsewhere; z and x have the same sign."""
        log_slope = soft_clamped(theta[..., 0], (self.max_contraction, self.max_expansion))
        # The product with a mask would make NaN of zero times an infinite slope.
        return torch.where(value < 0, log_slope, torch.zeros_like(log_slope))

    def __repr__(self) -> str:
        return f"LeakyReLU(max_contraction={self.max_contraction}, max_expansion={self.max_expansion})"
