"""A layer that puts further channels beside those of an image that another layer makes."""

import torch
from torch import Tensor

from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.univariate.layout import joined, split
from pyroflows.transforms.views import View


class Beside(View):
    r"""The layer :math:`x = [t(z_1), z_2]`, which lets the last channels of an image pass.

    Its base values are vectors: the base values :math:`z_1` of t come first, and then all elements of the channels
    :math:`z_2`. What t learns from data or draws it learns from its part of them.

    Args:
        layer: t, from vectors to images ``(channels, height, width)``.
        num_channels: the number of channels of the whole image, larger than that of the images that t makes.

    Shapes: z is ``(..., num_channels * height * width)``, x is ``(..., num_channels, height, width)``, a context is
    that of t.

    Example:
        >>> t = Beside(Multiscale([Squeeze((1, 2, 4))]), num_channels=3)
        >>> z = torch.randn(5, 24)
        >>> torch.equal(t(z)[:, 1:], z[:, 8:].reshape(5, 2, 2, 4))
        True
    """

    def __init__(self, layer: FlowTransform, num_channels: int) -> None:
        channels, height, width = layer.event_shape
        dim = num_channels * height * width
        super().__init__(layer, torch.Size((num_channels, height, width)), layer.context_shape, torch.Size((dim,)))
        self.num_made = channels

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        z_1, z_2 = self._split_base(z)
        x_1, ladj = self.layer._forward_and_ladj(z_1, context)
        return self._join(x_1, z_2), ladj

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        x_1, x_2 = split(x, [self.num_made, x.shape[-3] - self.num_made], -3)
        z_1, ladj = self.layer._inverse_and_ladj(x_1, context)
        return joined([z_1, x_2.flatten(-3)], -1, z_1), ladj

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        (z_1, z_2), (score_1, score_2) = self._split_base(z), self._split_base(score)
        x_1, ladj, score_1 = self.layer._forward_and_score(z_1, score_1, context)
        return self._join(x_1, z_2), ladj, self._join(score_1, score_2)

    def _split_base(self, z: Tensor) -> Pair:
        z_1, z_2 = split(z, [self.layer.dim, z.shape[-1] - self.layer.dim], -1)
        return z_1, z_2

    def _join(self, x_1: Tensor, x_2: Tensor) -> Tensor:
        return joined([x_1, x_2.unflatten(-1, (-1, *self.event_shape[1:]))], -3, x_1)

    def _exact(self) -> FlowTransform:
        return Beside(self.layer.exact(), self.event_shape[0])

    def adapt(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        self.layer.adapt(x[..., : self.num_made, :, :], context, weights)

    def adapt_to_draws(self, z: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        self.layer.adapt_to_draws(z[..., : self.layer.dim], context, weights)

    def observe(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        self.layer.observe(x[..., : self.num_made, :, :], context, weights)
