"""The radial layer."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.nets import Parameters
from pyroflows.transforms.base import FlowTransform, Pair
from pyroflows.transforms.planar import EPS, above_minus_one


class Radial(FlowTransform):
    r"""The radial layer (Rezende and Mohamed 2015, arXiv:1505.05770, eq. 14 and appendix A.2).

    .. math::
        x = z + \hat\beta \, h \, (z - z_0), \qquad h = 1 / (\alpha + r), \qquad r = |z - z_0|

        \log\left|\det \frac{\partial x}{\partial z}\right|
        = (D - 1) \log(1 + \hat\beta h) + \log(1 + \hat\beta \alpha h^2)

    It is invertible where :math:`\hat\beta > -\alpha`. Here :math:`\hat\beta = \alpha m(\beta)`, with the increasing
    map :math:`m > -1 + \epsilon`, m(0) = 0, of :class:`Planar`, and :math:`\alpha \ge \epsilon = 10^{-3}`. Both
    directions are parallel and in closed form.

    Args:
        dim: the event size D.
        context_dim: size of the context that :math:`z_0`, :math:`\alpha` and :math:`\beta` depend on, 0 for none.

    Shapes: z and x are ``(..., dim)``, a context is ``(..., context_dim)``.

    Example:
        >>> t = Radial(3)
        >>> z = torch.randn(5, 3)
        >>> torch.allclose(t.inv(t(z)), z, atol=1e-5)
        True
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__(dim, context_dim)
        # beta = 0 makes the layer the identity; a random centre breaks the symmetry between layers.
        self.parameters_of = Parameters(torch.cat([torch.randn(dim), torch.zeros(2)]), context_dim)

    def _constrained(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        center, alpha, beta = self.parameters_of(context).split([self.dim, 1, 1], dim=-1)
        alpha = EPS + F.softplus(alpha)
        return center, alpha, alpha * above_minus_one(beta)

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        center, alpha, beta = self._constrained(context)
        offset = z - center
        h = 1 / (alpha + _length(offset))
        return z + beta * h * offset, self._ladj(alpha, beta, h)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        # With s = |x - z0| the radius r solves s = r + beta r / (alpha + r), that is r^2 + p r - alpha s = 0 with
        # p = alpha + beta - s. Its positive root is written so that nothing cancels, whatever the sign of p.
        center, alpha, beta = self._constrained(context)
        offset = x - center
        s = _length(offset)
        p = alpha + beta - s
        root = torch.sqrt(p * p + 4 * alpha * s)
        r = torch.where(p > 0, 2 * alpha * s / (p.abs() + root), (p.abs() + root) / 2)
        h = 1 / (alpha + r)
        return center + offset / (1 + beta * h), -self._ladj(alpha, beta, h)

    def _ladj(self, alpha: Tensor, beta: Tensor, h: Tensor) -> Tensor:
        ladj = (self.dim - 1) * torch.log1p(beta * h) + torch.log1p((beta * h) * (alpha * h))
        return ladj.squeeze(-1)


def _length(offset: Tensor) -> Tensor:
    """Return the lengths ``(..., 1)`` of vectors, clamped so that their squares do not overflow.

    At such lengths the layer moves a point by less than rounding does.
    """
    largest = math.sqrt(torch.finfo(offset.dtype).max / offset.shape[-1]) / 4
    return torch.linalg.vector_norm(offset.clamp(-largest, largest), dim=-1, keepdim=True)
