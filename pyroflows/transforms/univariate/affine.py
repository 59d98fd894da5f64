"""Affine and additive maps."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.compiling.eager import is_transformed
from pyroflows.nets.gradients import recorded_gradients
from pyroflows.transforms.univariate.base import Pair
from pyroflows.transforms.univariate.clamp import Bounds, checked_bounds, soft_clamped
from pyroflows.transforms.univariate.layout import memory_order, restored


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
        self.max_contraction, self.max_expansion = checked_bounds("an affine map", max_contraction, max_expansion)

    def forward_and_ladj(self, z: Tensor, theta: Tensor) -> Pair:
        return self._map(False, z, theta)

    def inverse_and_ladj(self, x: Tensor, theta: Tensor) -> Pair:
        return self._map(True, x, theta)

    def _map(self, is_inverse: bool, value: Tensor, theta: Tensor) -> Pair:
        bounds = self.max_contraction, self.max_expansion
        # Parameters that all rows share are computed with once; torch.func cannot see into the written gradient.
        if None in bounds or theta.shape[:-1] != value.shape or is_transformed():
            return _recorded(is_inverse, value, theta, bounds)
        return _Affine.apply(is_inverse, value, theta, bounds)

    def __repr__(self) -> str:
        return f"Affine(max_contraction={self.max_contraction}, max_expansion={self.max_expansion})"


def _recorded(is_inverse: bool, value: Tensor, theta: Tensor, bounds: Bounds) -> Pair:
    """Return the map's value and log-derivative by operations that autograd records."""
    shift, log_scale = theta.unbind(-1)
    log_scale = soft_clamped(log_scale, bounds)
    if is_inverse:
        ladj = -log_scale
        return (value - shift) * torch.exp(ladj), ladj.expand_as(value)
    return shift + torch.exp(log_scale) * value, log_scale.expand_as(value)


def _bent(value: Tensor, factor: float) -> Tensor:
    """Multiply negative numbers by a factor, in place; for bounds that are equal there is nothing to do."""
    return value if factor == 1 else F.leaky_relu_(value, factor)


class _Affine(torch.autograd.Function):
    r"""The map with soft-clamped log-scale and its gradient written out.

    With c the bound on the side of :math:`s_0`, the clamp is :math:`s = 2c\,(\sigma - \tfrac12)` where
    :math:`\sigma = 1 / (1 + e^{-2 s_0 / c})`, since :math:`\tanh u = 2\, \sigma(2u) - 1`; the logistic function is
    several times as fast as tanh. Its derivative is :math:`ds / ds_0 = 4\, \sigma (1 - \sigma)`.

    Let G and L be the gradients by the value and by the log-derivative. Forward, :math:`x = t + e^s z` and
    :math:`\ell = s` give

    .. math:: g_z = G e^s, \qquad g_t = G, \qquad g_s = G e^s z + L.

    Inverse, :math:`z = (x - t)\, e^{-s}` and :math:`\ell = -s` give

    .. math:: g_x = G e^{-s}, \qquad g_t = -g_x, \qquad g_s = -(G z + L).

    Second derivatives are those of the recorded operations.
    """

    @staticmethod
    def forward(ctx: Any, is_inverse: bool, value: Tensor, theta: Tensor, bounds: tuple[float, float]) -> Pair:
        order = memory_order(theta, theta.dim() - 1)
        shift, raw = theta.permute(*order, -1).unbind(-1)
        given = value.permute(order).contiguous()
        max_contraction, max_expansion = bounds
        ratio = max_contraction / max_expansion
        sigmoid = _bent(raw * (2 / max_expansion), 1 / ratio).sigmoid_()
        ladj = _bent(sigmoid - 0.5, ratio).mul_(-2 * max_expansion if is_inverse else 2 * max_expansion)
        scale = torch.exp(ladj)
        result = (given - shift).mul_(scale) if is_inverse else torch.addcmul(shift, scale, given)
        ctx.save_for_backward(value, theta, sigmoid, scale, result if is_inverse else given)
        ctx.arguments = is_inverse, bounds, order
        return restored(result, order), restored(ladj, order)

    @staticmethod
    def backward(ctx: Any, g_result: Tensor, g_ladj: Tensor) -> tuple[Any, ...]:
        value, theta, sigmoid, scale, z = ctx.saved_tensors
        is_inverse, bounds, order = ctx.arguments
        if torch.is_grad_enabled():  # by create_graph=True: the caller wants second derivatives
            function = partial(_recorded, is_inverse, bounds=bounds)
            return None, *recorded_gradients(function, (value, theta), (g_result, g_ladj)), None
        g_result, g_ladj = g_result.permute(order), g_ladj.permute(order)
        g_value = g_result * scale
        if is_inverse:
            g_shift, g_log_scale = -g_value, torch.addcmul(g_ladj, g_result, z).mul_(-4)
        else:
            g_shift, g_log_scale = g_result, torch.addcmul(g_ladj, g_value, z).mul_(4)
        g_theta = torch.stack([g_shift, torch.ops.aten.sigmoid_backward(g_log_scale, sigmoid)]).movedim(0, -1)
        return None, restored(g_value, order), restored(g_theta, order), None
