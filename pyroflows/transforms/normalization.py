"""Location and scale of data as a layer without parameters."""

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.transforms.base import Pair, Triple
from pyroflows.transforms.triangular.base import TriangularTransform


class Standardize(TriangularTransform):
    r""":math:`x = \mu + \sigma \odot z`, with fixed :math:`\mu` and :math:`\sigma > 0`; its inverse standardises data.

    Both directions are parallel. Location and scale are buffers: they move, cast and are saved with the layer, and do
    not train.

    Args:
        loc: location, of the event's shape, ``(dim,)`` for vectors.
        scale: positive scale, of the same shape.

    Raises:
        OptionError: if these are no two finite tensors of one event shape, or a scale is not positive.

    Example:
        >>> t = Standardize(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5]))
        >>> t.inv(torch.tensor([3.0, -1.0])).tolist()
        [1.0, 0.0]
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        if loc.dim() < 1 or loc.shape != scale.shape:
            raise OptionError(
                "loc and scale must be vectors of one size, or of one event shape, got shapes "
                f"{tuple(loc.shape)} and {tuple(scale.shape)}"
            )
        if not (loc.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
            raise OptionError(f"loc must be finite and scale positive, got {loc.tolist()} and {scale.tolist()}")
        super().__init__(loc.shape)
        self.register_buffer("loc", loc.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

    @property
    def triangular_order(self) -> tuple[int, ...]:
        return ()

    @property
    def is_affine(self) -> bool:
        return True

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        return torch.addcmul(self.loc, self.scale, z), self.scale.log().expand_as(z)

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        return (x - self.loc) / self.scale, -self.scale.log().expand_as(x)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        return *self._forward_and_ladj(z, context), score / self.scale
