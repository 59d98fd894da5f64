"""Layers and statistics of channels, which are the indices along the first axis of an event."""

import torch
from torch import Tensor

from pyroflows.errors import DataError
from pyroflows.shapes import places
from pyroflows.transforms.base import Pair, Triple
from pyroflows.transforms.triangular.base import TriangularTransform
from pyroflows.transforms.wild import location_and_scale


def moments_of_channels(x: Tensor, weights: Tensor | None) -> Pair:
    """Return mean and standard deviation of each channel over rows and places, in float64, without wild elements.

    Args:
        x: rows ``(n, C, *places)``; of vectors each element is a channel.
        weights: weights of the rows ``(n,)``, not negative; None for equal weights.

    Example:
        >>> mean, deviation = moments_of_channels(torch.tensor([[[0.0, 2.0], [5.0, 5.0]]]), None)
        >>> mean.tolist(), deviation.tolist()
        ([1.0, 5.0], [1.0, 0.0])
    """
    rows = x.movedim(1, -1).flatten(0, -2)
    return location_and_scale(rows, None if weights is None else weights.repeat_interleave(len(rows) // len(x)))


def scaled_moments(x: Tensor, weights: Tensor | None, layer: str) -> Pair:
    """Return what :func:`moments_of_channels` does, with the standard deviation 1 for channels that are constant.

    Args:
        x: rows ``(n, C, *places)``.
        weights: weights of the rows ``(n,)``, not negative; None for equal weights.
        layer: the name of the layer that learns, for the message.

    Raises:
        DataError: if the mean or the standard deviation of a channel is not finite, as for no rows.

    Example:
        >>> scaled_moments(torch.tensor([[0.0, 5.0], [2.0, 5.0]]), None, "ActNorm")[1]
        tensor([1., 1.], dtype=torch.float64)
    """
    if not len(x):
        raise DataError(f"{layer} cannot learn location and scale, since there are no rows")
    mean, deviation = moments_of_channels(x, weights)
    if (is_bad := ~(mean.isfinite() & deviation.isfinite())).any():
        raise DataError(
            f"channels {places(is_bad)} of what arrives at a layer {layer} have no finite mean and standard deviation: "
            "look for rows outside of the flow's support, and for numbers that are not finite or very large"
        )
    return mean, deviation.masked_fill(are_constant(mean, deviation, x.dtype), 1.0)


def are_constant(mean: Tensor, deviation: Tensor, dtype: torch.dtype) -> Tensor:
    """Return where numbers are equal, up to rounding, from their mean and standard deviation in float64.

    Args:
        mean: means of any shape.
        deviation: standard deviations of the same shape.
        dtype: the dtype of the numbers, and of the scale that is to be made of the standard deviation.

    Example:
        >>> mean, deviation = torch.tensor([0.1, 0.1]).double(), torch.tensor([1e-17, 1e-9]).double()
        >>> are_constant(mean, deviation, torch.float32)
        tensor([ True, False])
    """
    # Rounding gives the mean of equal numbers a distance of a few units in the last place from them.
    rounding = 16 * torch.finfo(torch.float64).eps * mean.abs()
    return deviation <= rounding.clamp(min=torch.finfo(dtype).tiny)


class ChannelAffine(TriangularTransform):
    r"""The base class of layers :math:`x = \sigma_c (m_c + z)` with a location and a scale for each channel c.

    A subclass writes ``_channels``. The log-determinant is :math:`P \sum_c \log \sigma_c` for P places, the same for
    all rows of one context. The arguments are those of :class:`pyroflows.transforms.FlowTransform`.

    Shapes: z and x are ``(..., channels, *places)``.
    """

    def _channels(self, context: Tensor | None) -> Pair:
        """Return location, in units of the scale, and log-scale, both ``(..., channels)``."""
        raise NotImplementedError

    @property
    def is_affine(self) -> bool:
        return True

    def _parameters_at(self, context: Tensor | None) -> Pair:
        """Return location, in units of the scale, and log-scale, both ``(..., C, *places)`` with one for all places."""
        loc, log_scale = self._channels(context)
        places = (1,) * (len(self.event_shape) - 1)
        return loc.reshape(loc.shape + places), log_scale.reshape(log_scale.shape + places)

    def _summed_over_places(self, log_scale: Tensor, rows: Tensor) -> Tensor:
        """Return the log-determinant of each row, without a sum over its places."""
        num_axes = len(self.event_shape)
        num_places = self.dim // self.event_shape[0]
        ladj = num_places * log_scale.sum(tuple(range(-num_axes, 0)))
        return ladj.expand(rows.shape[: rows.dim() - num_axes])

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        _, log_scale = self._parameters_at(context)
        return self._forward_and_ladj(z, context)[0], log_scale.expand_as(z)

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        _, log_scale = self._parameters_at(context)
        return self._inverse_and_ladj(x, context)[0], -log_scale.expand_as(x)

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        loc, log_scale = self._parameters_at(context)
        scale = log_scale.exp()
        return torch.addcmul(loc * scale, scale, z), self._summed_over_places(log_scale, z)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        loc, log_scale = self._parameters_at(context)
        return torch.addcmul(-loc, (-log_scale).exp(), x), self._summed_over_places(-log_scale, x)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        _, log_scale = self._parameters_at(context)
        return *self._forward_and_ladj(z, context), score * (-log_scale.detach()).exp()
