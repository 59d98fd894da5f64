"""What networks with a bounded Lipschitz constant have in common."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.errors import OptionError
from pyroflows.nets.lipschitz.activations import ACTIVATIONS
from pyroflows.nets.lipschitz.contraction import Contraction
from pyroflows.nets.mlp import zero_initialized


class LipschitzNet(nn.Module):
    r"""The base class of networks g with :math:`\|g(z) - g(z')\| \le c\, \|z - z'\|`, whatever their parameters are.

    The activation's slope is at most 1, and the K weights are

    .. math:: W_k = \frac{s_k}{s_{k-1}} V_k, \qquad \|V_k\| \le c^{1/K}, \qquad s_0 = s_K = 1,

    where the scales s of the hidden layers are parameters, which cancel in the bound of the product. They say how far
    units bend: a unit of n in a layer sees about :math:`\sqrt{D / n}` of z under a bound of the whole matrix, and an
    activation is nearly linear on so small an interval. So s starts at :math:`\sqrt{n / D}`, where D is the number of
    inputs or channels. A network of the context shifts the pre-activations, which does not touch the bound. The output
    layer starts at zero.

    A subclass writes :meth:`_weights` and :meth:`_shifts_at`.

    Args:
        layers: linear layers or convolutions, from input to output.
        coefficient: the bound c, above 0.
        activation: the name of the activation, see :data:`pyroflows.nets.lipschitz.activations.ACTIVATIONS`.

    Raises:
        OptionError: if there is no such activation.
    """

    def __init__(self, layers: Sequence[Any], coefficient: float, activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise OptionError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        self.coefficient = coefficient
        self.activation = activation
        zero_initialized(layers[-1])
        self.layers: Any = nn.ModuleList(layers)
        channels = layers[0].weight.shape[1]
        scales = torch.tensor([max(1.0, layer.weight.shape[0] / channels) for layer in layers[:-1]]).sqrt()
        self.log_scales = nn.Parameter(scales.log())

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Return ``g(z)``, at a context if the network takes one."""
        return self.at(context)(z)

    def at(self, context: Tensor | None) -> Contraction:
        """Return the function g at a context ``(..., *context_shape)``."""
        ends = self.log_scales.new_zeros(1)
        ratios = torch.cat([ends, self.log_scales, ends]).diff().exp()
        weights = self._weights(self.coefficient ** (1 / len(self.layers)), ratios)
        offsets = [layer.bias.reshape(-1, *[1] * (layer.weight.dim() - 2)) for layer in self.layers]
        if context is not None:
            shifts = self._shifts_at(context).split([len(offset) for offset in offsets], -offsets[0].dim())
            offsets = [offset + shift for offset, shift in zip(offsets, shifts, strict=True)]
        return Contraction(weights, offsets, self.activation)

    def _weights(self, bound: float, ratios: Tensor) -> list[Tensor]:
        """Return the weights, each with a norm of at most the bound times its ratio of scales."""
        raise NotImplementedError

    def _shifts_at(self, context: Tensor) -> Tensor:
        """Return what a context adds to all pre-activations, ``(..., sum of widths, *rest)``; the rest broadcasts."""
        raise NotImplementedError
