"""Layers that hold the location and scale of data or contexts, which they learn before training."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflows.constraints import angles_in
from pyroflows.errors import DataError, OptionError
from pyroflows.nets.constants import Constants
from pyroflows.shapes import described, places
from pyroflows.transforms.base import Pair, Triple
from pyroflows.transforms.normalization.channels import are_constant, moments_of_channels
from pyroflows.transforms.triangular.base import TriangularTransform
from pyroflows.transforms.wild import location_and_scale, wild_elements

# The largest distance of a context from its mean, in units of its scale.
MAX_CONTEXT = 10.0
# Rows with a mean farther away, in units of the scale, or a scale larger or smaller by this factor, are other data.
MAX_SHIFT, MAX_RATIO = 10.0, 10.0


class Standardize(Constants, TriangularTransform):
    r"""The layer :math:`x = \mu + \sigma \odot z` with :math:`\sigma > 0`; its inverse standardises data.

    It starts as the identity; :meth:`adapt` sets :math:`\mu` and :math:`\sigma` to the mean and the standard deviation
    of data, without elements that alone would set the scale (:func:`pyroflows.transforms.wild.wild_elements`). Its
    log-determinant is :math:`\sum_j \log \sigma_j`, and both directions are parallel.

    The layer's parameters are :math:`\mu / \sigma` and :math:`\log \sigma`, so that copies, averages and stores of
    a flow's parameters hold all that determines its density. The fits of this library keep them as they are. Training
    loops of your own and Pyro's ``SVI`` move them with the other parameters, by steps in units of the data;
    ``t.requires_grad_(False)`` prevents that.

    Args:
        dim: the event size D, or the event shape.
        loc: initial :math:`\mu`, of the event's shape, or ``(channels, 1, 1)`` for images by channel; None for zero.
        scale: initial :math:`\sigma`, positive, of the same shape; None for one. A layer that is given loc or scale
            counts as adapted, so that a fit does not set it to those of the data.
        angles: which indices along the last axis are angles, which keep the location 0 and the scale 1: a circle has no
            other; None for none.
        by_channel: whether all places of a channel, which is an index along the first axis, have one location and
            scale, as is usual for images, some of whose pixels are nearly constant.

    Shapes: z and x are ``(..., *event_shape)``.

    Raises:
        OptionError: if loc or scale is not finite or has another shape, or a scale is not positive; or if events that
            hold angles are to be standardised by channel.
        DataError: from :meth:`adapt`, if a column or channel of the data is constant, or its scale is not a finite
            number.

    Example:
        >>> t = Standardize(2, loc=torch.tensor([1.0, -1.0]), scale=torch.tensor([2.0, 0.5]))
        >>> t.inv(torch.tensor([3.0, -1.0])).tolist()
        [1.0, 0.0]
        >>> t.adapt(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
        >>> t.loc, t.scale
        (tensor([1., 3.]), tensor([1., 2.]))
    """

    angles: Tensor | None

    def __init__(
        self,
        dim: int | Sequence[int],
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        angles: Sequence[bool] | None = None,
        by_channel: bool = False,
    ) -> None:
        super().__init__(dim)
        self.declare_angles(angles or [])
        self.register_constants()
        # Vectors have one place in each channel, which is a column.
        self.by_channel = by_channel and len(self.event_shape) > 1
        if self.by_channel and self.angles is not None:
            raise OptionError("Standardize cannot treat channels that hold angles by channel: leave out by_channel")
        num_axes = len(self.event_shape)
        shape = self.event_shape[:1] + (1,) * (num_axes - 1) if self.by_channel else self.event_shape
        is_given = loc is not None or scale is not None
        loc = torch.zeros(shape) if loc is None else loc
        scale = torch.ones(shape) if scale is None else scale
        if loc.shape != shape or scale.shape != shape:
            required = f"shape {tuple(shape)}, by channel" if self.by_channel else f"the event's {described(shape)}"
            raise OptionError(
                f"loc and scale of Standardize must have {required}, got shapes {tuple(loc.shape)} and "
                f"{tuple(scale.shape)}"
            )
        if not (loc.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
            raise OptionError(
                f"loc must be finite, and scale positive and finite, got {loc.tolist()} and {scale.tolist()}"
            )
        self.relative_loc = nn.Parameter(loc.detach() / scale.detach())
        self.log_scale = nn.Parameter(scale.detach().log())
        self.adapted.fill_(is_given)

    def constants(self) -> dict[str, Tensor | None]:
        angles = angles_in(self.domain, self.event_shape[-1])
        return {"angles": torch.tensor(angles) if any(angles) else None}

    @property
    def loc(self) -> Tensor:
        r"""The location :math:`\mu`, computed from the parameters, without gradients."""
        relative_loc, log_scale = self._parameters_used()
        return (relative_loc * log_scale.exp()).detach()

    @property
    def scale(self) -> Tensor:
        r"""The scale :math:`\sigma`, computed from the parameters, without gradients."""
        return self._parameters_used()[1].detach().exp()

    @property
    def is_identity(self) -> bool:
        """Whether the layer changes nothing, as it does at first."""
        return not (self.relative_loc.any() or self.log_scale.any())

    def _location_and_scale(self, x: Tensor, weights: Tensor | None) -> Pair:
        """Return location and scale of rows ``(n, *event_shape)`` in float64, of the shape of :attr:`loc`."""
        if not self.by_channel:
            return location_and_scale(x, weights)
        mean, deviation = moments_of_channels(x, weights)
        return mean.view_as(self.log_scale), deviation.view_as(self.log_scale)

    def _adapt(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> None:
        mean, deviation = self._location_and_scale(x, weights)
        if self.angles is not None:
            is_angle = self.angles.cpu()
            mean, deviation = torch.where(is_angle, 0.0, mean), torch.where(is_angle, 1.0, deviation)
        loc, scale = mean.to(self.log_scale), deviation.to(self.log_scale)
        is_bad = ~(loc.isfinite() & scale.isfinite()) | are_constant(mean, deviation, scale.dtype).to(loc.device)
        if is_bad.any():
            found, kind = (is_bad.flatten(), "channels") if self.by_channel else (is_bad, "columns")
            raise DataError(
                f"{kind} {places(found)} of x have no positive finite standard deviation: leave out constant {kind}, "
                "and use units in which the numbers are of ordinary size"
            )
        self.relative_loc.copy_(mean / deviation)
        self.log_scale.copy_(deviation.log())

    def far_columns(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Tell which columns of rows have another location or scale than the layer, by a factor of ten of the scale.

        Args:
            x: rows ``(n, *event_shape)``.
            weights: weights of the rows ``(n,)``, not negative; None for equal weights.

        Returns:
            Booleans of the event's shape, or ``(channels,)`` for a layer by channel: whether the mean is more than ten
            scales away from the location, or the standard deviation is more than ten times larger or smaller than the
            scale. Angles and columns that are constant are not.

        Example:
            >>> t = Standardize(2)
            >>> t.far_columns(torch.tensor([[0.0, 500.0], [2.0, 502.0]]))
            tensor([False,  True])
        """
        mean, deviation = (values.to(self.log_scale) for values in self._location_and_scale(x, weights))
        ratio = deviation / self.scale
        is_far = ((mean - self.loc).abs() > MAX_SHIFT * self.scale) | (ratio > MAX_RATIO) | (ratio < 1 / MAX_RATIO)
        is_far = is_far & (deviation > 0)
        if self.by_channel:
            return is_far.flatten()
        return is_far if self.angles is None else is_far & ~self.angles

    @property
    def is_affine(self) -> bool:
        return True

    def _parameters_used(self) -> Pair:
        """Return the parameters with those of angles replaced by zeros, whatever training has made of them."""
        if self.angles is None:
            return self.relative_loc, self.log_scale
        return self.relative_loc.masked_fill(self.angles, 0.0), self.log_scale.masked_fill(self.angles, 0.0)

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        relative_loc, log_scale = self._parameters_used()
        scale = log_scale.exp()
        return torch.addcmul(relative_loc * scale, scale, z), log_scale.expand_as(z)

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        relative_loc, log_scale = self._parameters_used()
        scale = log_scale.exp()
        return (x - relative_loc * scale) / scale, -log_scale.expand_as(x)

    # All rows have one log-determinant, which is the sum over columns, not over rows and columns.
    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self._forward_and_log_slopes(z, context)[0], self._ladj_of(z)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return self._inverse_and_log_slopes(x, context)[0], -self._ladj_of(x)

    def _ladj_of(self, rows: Tensor) -> Tensor:
        _, log_scale = self._parameters_used()
        num_places = self.dim // log_scale.numel()
        return (num_places * log_scale.sum()).expand(rows.shape[: rows.dim() - len(self.event_shape)])

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        return *self._forward_and_ladj(z, context), score / self.scale


class ContextScale(Standardize):
    r"""The location and scale of contexts, which a flow takes off before its layers see a context.

    It differs from :class:`Standardize` in what contexts may be: a constant column keeps the scale one, and a column
    that is rarely other than constant, such as that of a rare category, gets a scale at which it stays within 10.

    Args:
        dim: the size or shape of a context.

    Example:
        >>> t = ContextScale(2)
        >>> t.adapt(torch.tensor([[1990.0, 7.0], [2020.0, 7.0]]))
        >>> t.inv(torch.tensor([2020.0, 8.0])).round(decimals=3).tolist()
        [1.0, 1.0]
    """

    def __init__(self, dim: int | Sequence[int]) -> None:
        super().__init__(dim)

    def _location_and_scale(self, x: Tensor, weights: Tensor | None) -> Pair:
        mean, deviation = location_and_scale(x, weights)
        rows = x.cpu().double()
        distance = (rows - mean).abs().masked_fill(wild_elements(rows), 0.0).amax(0)
        scale = torch.maximum(deviation, distance / MAX_CONTEXT)
        # Rounding gives the mean of equal numbers a distance from them.
        is_constant = scale <= torch.finfo(x.dtype).eps * mean.abs()
        return mean, scale.masked_fill(is_constant | (scale == 0), 1.0)
