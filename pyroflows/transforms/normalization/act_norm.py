"""The layer of a trained location and scale for each channel, which starts where data or draws are standard."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.nets import Parameters
from pyroflows.transforms.base import Pair
from pyroflows.transforms.normalization.channels import ChannelAffine, scaled_moments


class ActNorm(ChannelAffine):
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

    def _channels(self, context: Tensor | None) -> Pair:
        loc, log_scale = self.parameters_of(context).unbind(-2)
        return loc, log_scale
