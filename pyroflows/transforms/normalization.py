"""Layers that learn the location and scale of data before training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.constraints import angles_in
from pyroflows.errors import DataError, OptionError
from pyroflows.shapes import described, places, shape_of
from pyroflows.transforms.base import Pair, Triple
from pyroflows.transforms.triangular.base import TriangularTransform


class Standardize(TriangularTransform):
    r"""The layer :math:`x = \mu + \sigma \odot z` with fixed :math:`\mu` and :math:`\sigma > 0`; its inverse
    standardises data.

    It starts as the identity; :meth:`adapt` sets :math:`\mu` and :math:`\sigma` to the mean and the standard deviation
    of data. Its log-determinant is :math:`\sum_j \log \sigma_j`, and both directions are parallel. Location and scale
    are buffers: they move, cast and are saved with the layer, but are not trained.

    Args:
        dim: the event size D, or the event shape.
        loc: :math:`\mu`, of the event's shape; None for zero.
        scale: :math:`\sigma`, positive, of the event's shape; None for one. A layer that is given loc or scale counts
            as adapted, so that a fit leaves it as it is.
        angles: which indices along the last axis are angles, which keep the location 0 and the scale 1: a circle has no
            other; None for none.

    Shapes: z and x are ``(..., *event_shape)``.

    Raises:
        OptionError: if loc or scale is not finite or has another shape, or a scale is not positive.
        DataError: from :meth:`adapt`, if a column of the data is constant, or its scale is not a finite number.

    Example:
        >>> t = Standardize(2, loc=torch.tensor([1.0, -1.0]), scale=torch.tensor([2.0, 0.5]))
        >>> t.inv(torch.tensor([3.0, -1.0])).tolist()
        [1.0, 0.0]
        >>> t.adapt(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
        >>> t.loc, t.scale
        (tensor([1., 3.]), tensor([1., 2.]))
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        dim: int | Sequence[int],
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        angles: Sequence[bool] | None = None,
    ) -> None:
        super().__init__(dim)
        self.declare_angles(angles or [])
        is_given = loc is not None or scale is not None
        loc = torch.zeros(shape_of(dim)) if loc is None else loc
        scale = torch.ones(shape_of(dim)) if scale is None else scale
        if loc.shape != self.event_shape or scale.shape != self.event_shape:
            raise OptionError(
                f"loc and scale of Standardize must have the event's {described(self.event_shape)}, got shapes "
                f"{tuple(loc.shape)} and {tuple(scale.shape)}"
            )
        if not (loc.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
            raise OptionError(
                f"loc must be finite, and scale positive and finite, got {loc.tolist()} and {scale.tolist()}"
            )
        self.register_buffer("loc", loc.detach().clone())
        self.register_buffer("scale", scale.detach().clone())
        self.adapted.fill_(is_given)

    def _adapt(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> None:
        # In float64, since sums of squares of large numbers overflow or cancel in float32.
        rows = x.cpu().double()
        weights = rows.new_ones(len(rows)) if weights is None else weights.cpu().double()
        weights = (weights / weights.sum()).reshape(-1, *[1] * len(self.event_shape))
        mean = (weights * rows).sum(0)
        deviation = (weights * (rows - mean) ** 2).sum(0).sqrt()
        is_angle = torch.tensor(angles_in(self.codomain, self.event_shape[-1]))
        mean, deviation = torch.where(is_angle, 0.0, mean), torch.where(is_angle, 1.0, deviation)
        loc, scale = mean.to(self.loc), deviation.to(self.scale)
        is_bad = ~(loc.isfinite() & scale.isfinite() & (scale > 0))
        if is_bad.any():
            raise DataError(
                f"columns {places(is_bad)} of x have no positive finite standard deviation: leave out constant "
                "columns, and use units in which the numbers are of ordinary size"
            )
        self.loc.copy_(loc)
        self.scale.copy_(scale)

    @property
    def is_affine(self) -> bool:
        return True

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        return torch.addcmul(self.loc, self.scale, z), self.scale.log().expand_as(z)

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        return (x - self.loc) / self.scale, -self.scale.log().expand_as(x)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        return *self._forward_and_ladj(z, context), score / self.scale
