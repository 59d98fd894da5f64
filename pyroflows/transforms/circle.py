r"""Angles: the map of the real line onto the circle, and the layer that takes whole turns out of angles.

Layers on circles are maps of the real line that commute with whole turns, :math:`t(z + 2\pi k) = t(z) + 2\pi k`. Such a
map is one of the circle, and unlike a map of an interval it has no seam: it is increasing, has an inverse and a
log-determinant at every number. A flow takes the whole turns out at its two ends.
"""

import math

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to

from pyroflows.constraints import angles_in, circular, wrapped
from pyroflows.nets.constants import Constants
from pyroflows.transforms.base import Pair, Triple
from pyroflows.transforms.triangular.base import TriangularTransform


class Wrap(Transform):
    r"""The map of the real line onto the circle, :math:`x = c + \pi\, \mathrm{erf}(u / \sqrt 2)`, up to whole turns.

    The uniform law on the circle is that of a standard normal u, and any smooth density has Gaussian tails in u, where
    both ends of the line meet in the point opposite to the center. So the center decides how well a flow can fit a
    posterior, but not whether what it fits is right. ``biject_to`` gives it, at the center 0, for
    ``pf.constraints.circular``.

    Args:
        center: c, the angles at u = 0.
    """

    domain = constraints.real
    codomain = circular
    bijective = True
    sign = +1

    def __init__(self, center: Tensor) -> None:
        super().__init__()
        self.center = center

    def _call(self, x: Tensor) -> Tensor:
        return wrapped(self.center + math.pi * torch.erf(x / math.sqrt(2)))

    def _inverse(self, y: Tensor) -> Tensor:
        most = 1 - torch.finfo(y.dtype).eps
        return math.sqrt(2) * torch.erfinv((wrapped(y - self.center) / math.pi).clamp(-most, most))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return math.log(2 * math.pi) - 0.5 * x**2 - 0.5 * math.log(2 * math.pi)


# Pyro's own guides ask the first, and its MCMC kernels the second.
for _registry in (biject_to, transform_to):
    _registry.register(circular, lambda _: Wrap(torch.zeros(())))


class WholeTurns(Constants, TriangularTransform):
    r"""The layer that takes whole turns out of angles, so that they lie in :math:`[-\pi, \pi]`.

    On the circle it is the identity, in both directions. Its log-determinant is zero. A flow with layers on circles
    puts one at each of its ends.

    Args:
        dim: the event size D, or the event shape.
        codomain: the constraint on events at the data end; it determines which columns are angles.

    Shapes: z and x are ``(..., *event_shape)``.

    Example:
        >>> columns = constraints.cat([circular, constraints.real], dim=-1)
        >>> WholeTurns(2, columns)(torch.tensor([4.0, 4.0]))
        tensor([-2.2832,  4.0000])
    """

    angles: Tensor

    def __init__(self, dim: int | tuple[int, ...], codomain: constraints.Constraint) -> None:
        super().__init__(dim)
        angles = angles_in(codomain, self.event_shape[-1])
        self.declare_angles(angles)
        self.codomain = codomain
        self.register_constants()

    def constants(self) -> dict[str, Tensor | None]:
        return {"angles": torch.tensor(angles_in(self.codomain, self.event_shape[-1]))}

    @property
    def is_bounding(self) -> bool:
        return True

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        return torch.where(self.angles, wrapped(z), z), torch.zeros_like(z)

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        return self._forward_and_log_slopes(x, context)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        return *self._forward_and_ladj(z, context), score
