"""Smooth activations whose slopes stay between -1 and 1."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.compiling.eager import is_transformed

# It maps pre-activations to values and slopes.
Activation = Callable[[Tensor], tuple[Tensor, Tensor]]


def lipswish(a: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return value and slope of LipSwish, :math:`a\, \sigma(a) / 1.1`.

    The slope of :math:`a\, \sigma(a)` is at most 1.0999 (Chen et al. 2019, arXiv:1906.02735, section 3.3). The
    parameter :math:`\beta` of the paper is the scale of the units, see
    :class:`pyroflows.nets.lipschitz.network.LipschitzNet`.

    Args:
        a: pre-activations.

    Example:
        >>> value, slope = lipswish(torch.tensor([0.0, 50.0]))
        >>> slope
        tensor([0.4545, 0.9091])
    """
    gate = torch.sigmoid(a)
    value = a * gate / 1.1
    return value, gate / 1.1 + value * (1 - gate)


def tanh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return value and slope of the hyperbolic tangent."""
    value = torch.tanh(a)
    return value, 1 - value**2


def sine(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return value and slope of the sine."""
    return (torch.sin(a), torch.cos(a)) if is_transformed() else _SineAndCosine.apply(a)


class _SineAndCosine(torch.autograd.Function):
    """Sine and cosine, each of which is the other's slope: autograd's own backward pass computes both once more."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> tuple[Tensor, Tensor]:
        sine, cosine = torch.sin(a), torch.cos(a)
        ctx.save_for_backward(sine, cosine)
        return sine, cosine

    @staticmethod
    def backward(ctx: Any, by_sine: Tensor, by_cosine: Tensor) -> Tensor:
        sine, cosine = ctx.saved_tensors
        return by_sine * cosine - by_cosine * sine


ACTIVATIONS: dict[str, Activation] = {"lipswish": lipswish, "sine": sine, "tanh": tanh}
# The values alone, in the place of the pre-activations, up to a factor.
IN_PLACE: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "lipswish": (partial(F.silu, inplace=True), 1 / 1.1),
    "sine": (torch.sin_, 1.0),
    "tanh": (torch.tanh_, 1.0),
}


def _curved_lipswish(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate = torch.sigmoid(a)
    rest = 1 - gate
    value = a * gate / 1.1
    slope = torch.addcmul(gate / 1.1, value, rest)
    # The derivative of the gate is the product of gate and rest.
    return value, slope, (gate * (1 / 1.1 - value)).add_(slope).mul_(rest)


def _curved_tanh(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value, slope = tanh(a)
    return value, slope, -2 * value * slope


def _curved_sine(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = torch.sin(a)
    return value, torch.cos(a), -value


# Values, slopes and the derivatives of slopes, for gradients that are written out.
CURVED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "lipswish": _curved_lipswish,
    "sine": _curved_sine,
    "tanh": _curved_tanh,
}
