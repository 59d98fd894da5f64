"""Affine and additive maps."""

import math

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.transforms.univariate.base import Pair


class Additive:
    r"""The shift :math:`x = z + t` with :math:`\theta = t`; the log-derivative is zero (Dinh et al. 2015,
    arXiv:1410.8516).

    Shapes: z and x are ``(...)``, theta is ``(..., 1)``.

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
    r"""The affine map :math:`x = t + e^{s} z` with :math:`\theta = (t, s_0)`; the log-derivative is s.

    The log-scale is soft-clamped (Andrade 2024, arXiv:2402.16408): :math:`s = c_+ \tanh(s_0 / c_+)` for
    :math:`s_0 \ge 0` and :math:`s = c_- \tanh(s_0 / c_-)` for :math:`s_0 < 0`. Without a bound, deep stacks whose
    networks compute large log-scales explode, so the bound on expansion, :math:`c_+`, is the tighter one.

    Args:
        max_contraction: :math:`c_- > 0`; the scale is at least :math:`e^{-c_-}`.
        max_expansion: :math:`c_+ > 0`; the scale is at most :math:`e^{c_+}`. If both are None, :math:`s = s_0`, which
            suits parameters that no network computes.

    Shapes: z and x are ``(...)``, theta is ``(..., 2)``.

    Raises:
        OptionError: if a bound is not positive and finite, or only one of them is None.

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
