"""The layer of a trained location and scale for each channel, which starts where data or draws are standard."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.nets import Parameters
from pyroflows.transforms.base import Pair, Triple
from pyroflows.transforms.normalization.channels import scaled_moments
from pyroflows.transforms.triangular.base import TriangularTransform


class ActNorm(TriangularTransform):
    r"""The layer of activation normalisation (Kingma and Dhariwal 2018, arXiv:1807.03039, section 3.1).

    .. math:: x = \sigma_c \, (m_c + z), \qquad
        \log\left|\det \frac{\partial x}{\partial z}\right| = P \sum_c \log \sigma_c

    The channels c are the indices along the first axis of an event: each dimension of a vector, each channel of an
    image, which has :math:`P = H W` places. The location m in units of the scale and :math:`\log \sigma` are parameters
    that are trained.

    The layer starts as the identity. :meth:`adapt` sets the parameters such that z has mean 0 and variance 1 in each
    channel over rows and places. Where a flow has no data, as in a guide, :meth:`adapt_to_draws` sets them such that x
    has. Both directions are parallel.

    Args:
        dim: the event size D, or the event shape, such as ``(channels, height, width)``.
        context_dim: size of the context by which location and scale differ, 0 for none. What they have in common is
            learned before training, and the network that reads the context starts at zero.

    Shapes: z and x are ``(..., *event_shape)``, a context is ``(..., context_dim)``.

    Raises:
        DataError: from :meth:`adapt`, if a mean or standard deviation is not finite. A constant channel is no error: it
            keeps the scale 1.

    Example:
        >>> t = ActNorm((3, 8, 8))
        >>> t.adapt(5.0 + 2.0 * torch.randn(100, 3, 8, 8))
        >>> t(torch.zeros(3, 8, 8))[:, 0, 0].round()
        tensor([5., 5., 5.], grad_fn=<RoundBackward0>)
    """

    def __init__(self, dim: int | Sequence[int], context_dim: int = 0) -> None:
        super().__init__(dim, context_dim)
        self.parameters_of = Parameters(torch.zeros(2, self.event_shape[0]), context_dim)

    def _adapt(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> None:
        mean, deviation = scaled_moments(x, weights, "ActNorm")
        self.parameters_of.value.copy_(torch.stack([mean / deviation, deviation.log()]))

    def _adapt_to_draws(self, z: Tensor, context: Tensor | None, weights: Tensor | None) -> None:
        mean, deviation = scaled_moments(z, weights, "ActNorm")
        self.parameters_of.value.copy_(torch.stack([-mean, -deviation.log()]))

    @property
    def is_affine(self) -> bool:
        return True

    def _parameters_at(self, context: Tensor | None) -> Pair:
        """Return location, in units of the scale, and log-scale, both ``(..., C, *places)`` with one for all places."""
        theta = self.parameters_of(context)
        num_axes = len(self.event_shape) - 1
        loc, log_scale = theta.reshape(theta.shape + (1,) * num_axes).unbind(-2 - num_axes)
        return loc, log_scale

    def _summed_over_places(self, log_scale: Tensor, rows: Tensor) -> Tensor:
        """Return the log-determinant of each row, without a sum over its places."""
        num_axes = len(self.event_shape)
        num_places = self.dim // self.event_shape[0]
        ladj = num_places * log_scale.sum(tuple(range(-num_axes, 0)))
        return ladj.expand(rows.shape[: rows.dim() - num_axes])

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        loc, log_scale = self._parameters_at(context)
        scale = log_scale.exp()
        return torch.addcmul(loc * scale, scale, z), log_scale.expand_as(z)

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        loc, log_scale = self._parameters_at(context)
        return torch.addcmul(-loc, (-log_scale).exp(), x), -log_scale.expand_as(x)

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        loc, log_scale = self._parameters_at(context)
        scale = log_scale.exp()
        return torch.addcmul(loc * scale, scale, z), self._summed_over_places(log_scale, z)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        loc, log_scale = self._parameters_at(context)
        return torch.addcmul(-loc, (-log_scale).exp(), x), self._summed_over_places(-log_scale, x)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        loc, log_scale = self._parameters_at(context)
        scale = log_scale.exp()
        x, ladj = torch.addcmul(loc * scale, scale, z), self._summed_over_places(log_scale, z)
        return x, ladj, score * (-log_scale.detach()).exp()
