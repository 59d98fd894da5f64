"""The convolutional velocity network, for images, sequences and videos."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.errors import OptionError
from pyroflows.nets.mlp import checked_widths, zero_initialized
from pyroflows.nets.velocity.time import NUM_FREQUENCIES, time_features
from pyroflows.shapes import described

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class VelocityConv(nn.Module):
    r"""Convolutions that give the velocity of a continuous flow of images, sequences or videos,

    .. math:: a_k = W_k * h_{k-1} + A_k\, \phi(t) + C_k\, e(c) + b_k, \qquad h_0 = z, \quad h_k = \sigma(a_k),

    the velocity being the last a, with SiLU activations :math:`\sigma` and three taps along each axis. Features of time
    :math:`\phi(t)` and of a context vector c shift whole channels; a context that has places, such as another image,
    stands beside z as further channels. Places beyond the border are zero. The last layer starts at zero.

    Args:
        shape: the shape ``(channels, *rest)`` of an event, with one to three axes after the channels.
        hidden_dims: channels of the hidden layers, at least one.
        context_shape: the shape of a vector, or ``(channels, *rest)`` with the places of an event; empty for none.

    Shapes: it maps times ``(N,)``, places ``(N, *shape)`` and contexts ``(N, *context_shape)`` to ``(N, *shape)``.

    Raises:
        OptionError: if a width is not positive, there is another number of axes, or the context does not fit.

    Example:
        >>> net = VelocityConv(torch.Size([3, 4, 6]), (8, 8))
        >>> net(torch.rand(5), torch.randn(5, 3, 4, 6), None).shape
        torch.Size([5, 3, 4, 6])
    """

    def __init__(
        self, shape: torch.Size, hidden_dims: Sequence[int] = (64, 64), context_shape: Sequence[int] = ()
    ) -> None:
        super().__init__()
        channels, *size = shape
        if len(size) not in _CONVOLUTIONS:
            raise OptionError(
                f"a continuous layer convolves along one to three axes after the channels, so that events of "
                f"{described(shape)} need a network of your own: give it as net="
            )
        if len(context_shape) > 1 and list(context_shape[1:]) != size:
            raise OptionError(
                f"a context of a continuous layer with events of {described(shape)} is a vector or has the shape "
                f"(channels, {', '.join(map(str, size))}), but got context_dim={tuple(context_shape)}"
            )
        self.hidden_dims = checked_widths(hidden_dims)
        self.context_has_places = len(context_shape) > 1
        beside = context_shape[0] if self.context_has_places else 0
        widths = [channels + beside, *self.hidden_dims, channels]
        *hidden, last = [_CONVOLUTIONS[len(size)](a, b, 3, padding=1) for a, b in pairwise(widths)]
        self.layers: Any = nn.ModuleList([*hidden, zero_initialized(last)])
        num_shifts = sum(self.hidden_dims)
        self.time = nn.Linear(1 + 2 * NUM_FREQUENCIES, num_shifts, bias=False)
        self.context: nn.Module | None = None
        if context_shape and not self.context_has_places:
            width = self.hidden_dims[0]
            self.context = nn.Sequential(nn.Linear(context_shape[0], width), nn.SiLU(), nn.Linear(width, num_shifts))

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        shifts = self.time(time_features(t, NUM_FREQUENCIES))
        if context is not None and self.context_has_places:
            z = torch.cat([z, context], 1)
        elif context is not None and self.context is not None:
            shifts = shifts + self.context(context)
        shifts = shifts.reshape(*shifts.shape, *[1] * (z.dim() - 2))
        for layer, shift in zip(self.layers[:-1], shifts.split(self.hidden_dims, 1), strict=True):
            z = F.silu(layer(z) + shift)
        return self.layers[-1](z)
