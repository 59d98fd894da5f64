"""Layers that learn the location and scale of data before training."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflows.errors import DataError, OptionError
from pyroflows.shapes import described, places, shape_of
from pyroflows.transforms.base import Pair, Triple
from pyroflows.transforms.triangular.base import TriangularTransform


class Standardize(TriangularTransform):
    r"""The layer :math:`x = \mu + \sigma \odot z` with :math:`\sigma > 0`; its inverse standardises data.

    It starts as the identity; :meth:`adapt` sets :math:`\mu` and :math:`\sigma` to the mean and the standard deviation
    of data. Its log-determinant is :math:`\sum_j \log \sigma_j`, and both directions are parallel.

    The layer's parameters are :math:`\mu / \sigma` and :math:`\log \sigma`, so that copies, averages and stores of
    a flow's parameters hold all that determines its density. The fits of this library keep them as they are. Training
    loops of your own and Pyro's ``SVI`` move them with the other parameters, by steps in units of the data;
    ``t.requires_grad_(False)`` prevents that.

    Args:
        dim: the event size D, or the event shape.
        loc: initial :math:`\mu`, of the event's shape; None for zero.
        scale: initial :math:`\sigma`, positive, of the event's shape; None for one. A layer that is given loc or scale
            counts as adapted, so that a fit does not set it to those of the data.

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

    def __init__(self, dim: int | Sequence[int], loc: Tensor | None = None, scale: Tensor | None = None) -> None:
        super().__init__(dim)
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
        self.relative_loc = nn.Parameter(loc.detach() / scale.detach())
        self.log_scale = nn.Parameter(scale.detach().log())
        self.adapted.fill_(is_given)

    @property
    def loc(self) -> Tensor:
        r"""The location :math:`\mu`, computed from the parameters, without gradients."""
        return self.relative_loc.detach() * self.scale

    @property
    def scale(self) -> Tensor:
        r"""The scale :math:`\sigma`, computed from the parameters, without gradients."""
        return self.log_scale.detach().exp()

    @property
    def is_identity(self) -> bool:
        """Whether the layer changes nothing, as it does at first."""
        return not (self.relative_loc.any() or self.log_scale.any())

    def _adapt(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> None:
        # In float64, since sums of squares of large numbers overflow or cancel in float32.
        rows = x.cpu().double()
        weights = rows.new_ones(len(rows)) if weights is None else weights.cpu().double()
        weights = (weights / weights.sum()).reshape(-1, *[1] * len(self.event_shape))
        mean = (weights * rows).sum(0)
        deviation = (weights * (rows - mean) ** 2).sum(0).sqrt()
        loc, scale = mean.to(self.log_scale), deviation.to(self.log_scale)
        is_bad = ~(loc.isfinite() & scale.isfinite() & (scale > 0))
        if is_bad.any():
            raise DataError(
                f"columns {places(is_bad)} of x have no positive finite standard deviation: leave out constant "
                "columns, and use units in which the numbers are of ordinary size"
            )
        self.relative_loc.copy_(mean / deviation)
        self.log_scale.copy_(deviation.log())

    @property
    def is_affine(self) -> bool:
        return True

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        scale = self.log_scale.exp()
        return torch.addcmul(self.relative_loc * scale, scale, z), self.log_scale.expand_as(z)

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        scale = self.log_scale.exp()
        return (x - self.relative_loc * scale) / scale, -self.log_scale.expand_as(x)

    # All rows have one log-determinant, which is the sum over columns, not over rows and columns.
    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        scale = self.log_scale.exp()
        x = torch.addcmul(self.relative_loc * scale, scale, z)
        return x, self.log_scale.sum().expand(z.shape[: z.dim() - len(self.event_shape)])

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        scale = self.log_scale.exp()
        z = (x - self.relative_loc * scale) / scale
        return z, -self.log_scale.sum().expand(x.shape[: x.dim() - len(self.event_shape)])

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        return *self._forward_and_ladj(z, context), score / self.scale


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a fit trains: all that are not frozen, except location and scale of data.

    Example:
        >>> flow = pf.Flow([Planar(2)])
        >>> len(trained_parameters(flow)), len(list(flow.parameters()))
        (1, 3)
    """
    layers = [layer for layer in module.modules() if isinstance(layer, Standardize)]
    fixed = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return [parameter for parameter in module.parameters() if parameter.requires_grad and id(parameter) not in fixed]
