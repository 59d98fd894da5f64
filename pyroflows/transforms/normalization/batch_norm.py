"""The layer of the running location and scale of batches of data, which is the same map in both directions."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.nets import Parameters
from pyroflows.transforms.base import Pair
from pyroflows.transforms.normalization.channels import ChannelAffine, are_constant, scaled_moments


class BatchNorm(ChannelAffine):
    r"""The layer of batch normalisation by running statistics (Dinh et al. 2017, arXiv:1605.08803, section 3.7).

    .. math:: x = \mu_c + s_c \, e^{g_c} (b_c + z), \qquad
        \log\left|\det \frac{\partial x}{\partial z}\right| = P \sum_c (g_c + \log s_c)

    The channels c are the indices along the first axis of an event: each dimension of a vector, each channel of an
    image, which has :math:`P = H W` places. The mean :math:`\mu` and the standard deviation s are running averages over
    batches of data, buffers that no gradient reaches; b and g are parameters that are trained.

    Both directions use the running statistics, so that the layer is a bijection at all times, and a density does not
    depend on the batch in which it is computed. They come from :meth:`adapt` at first. Then :meth:`observe` moves them
    toward those of each batch, which :func:`pyroflows.fit_density` does before a step. Where a flow is trained on
    draws, without data, nothing could bring them up to date: guides, reverse KL and students of distillation refuse the
    layer, and take :class:`ActNorm` instead. Both directions are parallel.

    Args:
        dim: the event size D, or the event shape, such as ``(channels, height, width)``.
        momentum: the weight of a batch in the running averages, above 0 and at most 1.
        context_dim: size of the context that b and g depend on, 0 for none.

    Shapes: z and x are ``(..., *event_shape)``, a context is ``(..., context_dim)``.

    Raises:
        OptionError: if momentum is outside its range.
        DataError: from :meth:`adapt`, if a mean or standard deviation is not finite. A constant channel is no error: it
            keeps the standard deviation 1.

    Example:
        >>> t = BatchNorm(2)
        >>> t.adapt(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
        >>> t.inv(torch.tensor([2.0, 3.0])).tolist()
        [1.0, 0.0]
        >>> t.observe(torch.tensor([[10.0, 3.0]]))
        >>> t.running_mean
        tensor([1.9000, 3.0000])
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int | Sequence[int], momentum: float = 0.1, context_dim: int = 0) -> None:
        super().__init__(dim, context_dim)
        given: Any = momentum
        if not isinstance(given, Real) or isinstance(given, bool) or not 0 < float(given) <= 1:
            raise OptionError(f"momentum of BatchNorm must be a number above 0 and at most 1, got {momentum!r}")
        self.momentum = float(momentum)
        channels = self.event_shape[0]
        self.parameters_of = Parameters(torch.zeros(2, channels), context_dim)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def _adapt(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> None:
        mean, deviation = scaled_moments(x, weights, "BatchNorm")
        self.running_mean.copy_(mean)
        self.running_var.copy_(deviation.square())

    def _observe(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> None:
        rows = x.double().reshape(len(x), x.shape[1], self.dim // x.shape[1])
        share = rows.new_ones(len(x)) if weights is None else weights.to(rows)
        share, total = share[:, None, None], share.sum() * rows.shape[-1]
        mean = (share * rows).sum((0, 2)) / total
        var = (share * (rows - mean[:, None]).square()).sum((0, 2)) / total
        # A batch that says nothing about a channel leaves its statistics as they are, without a look at the values.
        is_bad = ~(mean.isfinite() & var.isfinite())
        is_constant = are_constant(mean, var.sqrt(), x.dtype)
        mean, var = mean.to(self.running_mean), var.to(self.running_var)
        self.running_mean.lerp_(torch.where(is_bad, self.running_mean, mean), self.momentum)
        self.running_var.lerp_(torch.where(is_bad | is_constant, self.running_var, var), self.momentum)

    def _channels(self, context: Tensor | None) -> Pair:
        loc, log_scale = self.parameters_of(context).unbind(-2)
        log_scale = log_scale + self.running_var.log() / 2
        return loc + self.running_mean * (-log_scale).exp(), log_scale
