"""Affine and additive maps."""

import math

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.transforms.univariate.base import Pair


class Additive:
    r"""Shift, :math:`x = z + t` with :math:`\theta = t`; the log-derivative is zero.

    Example:
        >>> Additive().forward_and_ladj(torch.tensor(2.0), torch.tensor([1.0]))
        (tensor(3.), tensor(0.))
    """

    num_params = 1

    def forward_and_ladj(self, z: Tensor, theta: Tensor) -> Pair:
        return z + theta[..., 0], torch.zeros_like(z)

    def inverse_and_ladj(self, x: Tensor, theta: Tensor) -> Pair:
        return x - theta[..., 0], torch.zeros_like(x)

    def __repr__(self) -> str:
        return "Additive()"


class Affine:
    r"""Affine map, :math:`x = t + e^{s} z` with :math:`\theta = (t, s_0)`.

    The log-scale is soft-clamped, :math:`s = c_\pm \tanh(s_0 / c_\pm)`, where the bound on expansion, :math:`c_+`, is
    tighter than the one on contraction, :math:`c_-`: with networks of unbounded output deep stacks explode
    (Andrade 2024, arXiv:2402.16408).

    Args:
        max_contraction: :math:`c_- > 0`; the scale is at least :math:`e^{-c_-}`.
        max_expansion: :math:`c_+ > 0`; the scale is at most :math:`e^{c_+}`. ``None`` for both: no clamp, for
            parameters that no network computes.

    Example:
        >>> x, ladj = Affine().forward_and_ladj(torch.tensor(2.0), torch.tensor([1.0, 0.0]))
        >>> x, ladj
        (tensor(3.), tensor(0.))
    """

    num_params = 2

    def __init__(self, max_contraction: float | None = 4.0, max_expansion: float | None = 2.0) -> None:
        bounds = (max_contraction, max_expansion)
        if (max_contraction is None) != (max_expansion is None) or any(
            b is not None and not 0 < b < math.inf for b in bounds
        ):
            raise OptionError(
                f"the bounds of an affine map must be both positive and finite, or both None, got {bounds}"
            )
        self.max_contraction = max_contraction
        self.max_expansion = max_expansion

    def forward_and_ladj(self, z: Tensor, theta: Tensor) -> Pair:
        shift, log_scale = self._shift_and_log_scale(theta)
        return shift + torch.exp(log_scale) * z, log_scale.expand_as(z)

    def inverse_and_ladj(self, x: Tensor, theta: Tensor) -> Pair:
        shift, log_scale = self._shift_and_log_scale(theta)
        ladj = -log_scale
        return (x - shift) * torch.exp(ladj), ladj.expand_as(x)

    def _shift_and_log_scale(self, theta: Tensor) -> Pair:
        shift, log_scale = theta.unbind(-1)
        if self.max_contraction is None or self.max_expansion is None:
            return shift, log_scale
        middle, half = (self.max_expansion + self.max_contraction) / 2, (self.max_expansion - self.max_contraction) / 2
        bound = middle + half * torch.sign(log_scale.detach())
        return shift, bound * torch.tanh(log_scale / bound)

    def __repr__(self) -> str:
        return f"Affine(max_contraction={self.max_contraction}, max_expansion={self.max_expansion})"
