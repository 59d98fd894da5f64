"""Convolutional networks whose Lipschitz constant is bounded."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.errors import OptionError
from pyroflows.nets.conv import Conv
from pyroflows.nets.lipschitz.network import LipschitzNet
from pyroflows.nets.lipschitz.norms import normalized_conv
from pyroflows.nets.mlp import MLP, checked_widths
from pyroflows.shapes import described

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class LipschitzConv(LipschitzNet):
    """Convolutions of images or sequences with a bounded Lipschitz constant, see :class:`LipschitzNet`.

    The first and the last convolution have three taps along each axis, and those between the hidden layers have one
    (Chen et al. 2019, arXiv:1906.02735). Places beyond the border are zero. The norms are those of convolutions as maps
    of images of this size, see :func:`pyroflows.nets.lipschitz.norms.normalized_conv`. The hidden layers start at
    orthogonal matrices at the middle tap (Xiao et al. 2018, arXiv:1806.05393), which have their full norm in all
    directions.

    Args:
        shape: the shape ``(channels, *rest)`` of input and output, with one to three axes after the channels.
        hidden_dims: channels of the hidden layers; if there is none, the network is one convolution.
        coefficient: the bound c, above 0.
        context_shape: the shape of a vector, which all places see alike, or the shape ``(channels, *rest)`` of a
            context of which each place sees its neighbourhood; empty if there is no context.
        activation: the name of the activation, see :data:`pyroflows.nets.lipschitz.activations.ACTIVATIONS`.

    Raises:
        OptionError: if a width is not positive, there is another number of axes, the context does not fit, or there is
            no such activation.

    Example:
        >>> g = LipschitzConv((3, 4, 6), (8, 8), 0.9, (2,), "sine").at(torch.randn(5, 2))
        >>> g(torch.randn(5, 3, 4, 6)).shape
        torch.Size([5, 3, 4, 6])
    """

    def __init__(
        self,
        shape: torch.Size,
        hidden_dims: Sequence[int],
        coefficient: float,
        context_shape: torch.Size,
        activation: str,
    ) -> None:
        channels, *size = shape
        if len(size) not in _CONVOLUTIONS:
            raise OptionError(
                f"a residual layer has convolutions along one to three axes after the channels, so that it cannot have "
                f"events of {described(shape)}"
            )
        if len(context_shape) > 1 and list(context_shape[1:]) != size:
            raise OptionError(
                f"a context of a residual layer with events of {described(shape)} is a vector or has the shape "
                f"(channels, {', '.join(map(str, size))}), but got context_dim={tuple(context_shape)}"
            )
        widths = [channels, *checked_widths(hidden_dims, least=0), channels]
        last = len(widths) - 2
        convolution = _CONVOLUTIONS[len(size)]
        layers = [convolution(a, b, 3 if k in (0, last) else 1) for k, (a, b) in enumerate(pairwise(widths))]
        for layer in layers[:-1]:
            nn.init.zeros_(layer.weight)
            middle = layer.weight.flatten(2)[..., layer.weight[0, 0].numel() // 2]
            nn.init.orthogonal_(middle)
            nn.init.zeros_(layer.bias)
        super().__init__(layers, coefficient, activation)
        self.size = size
        self.shifts = _shifts(context_shape, sum(widths[1:])) if context_shape else None

    def _weights(self, bound: float, ratios: Tensor) -> list[Tensor]:
        return [
            ratio * normalized_conv(layer.weight, self.size, bound)
            for ratio, layer in zip(ratios, self.layers, strict=True)
        ]

    def _shifts_at(self, context: Tensor) -> Tensor:
        assert self.shifts is not None
        if isinstance(self.shifts, MLP):
            shifts = self.shifts(context)
            return shifts.reshape(*shifts.shape, *[1] * len(self.size))
        num_axes = 1 + len(self.size)
        batch_shape, shape = context.shape[:-num_axes], context.shape[-num_axes:]
        shifts = self.shifts(context.reshape(batch_shape.numel(), *shape))
        return shifts.reshape(*batch_shape, *shifts.shape[1:])


def _shifts(context_shape: torch.Size, out_dim: int) -> nn.Module:
    """Return a linear function of a context that starts at zero."""
    channels, *size = context_shape
    return Conv(channels, out_dim, (), len(size)) if size else MLP(channels, out_dim, ())
