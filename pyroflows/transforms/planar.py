"""The planar layer."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.nets import Parameters
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.root import increasing_root

EPS = 1e-3
_SHIFT = math.log(math.expm1(1 - EPS))


class Planar(FlowTransform):
    r"""The planar layer (Rezende and Mohamed 2015, arXiv:1505.05770, eq. 10 and appendix A.1).

    .. math::
        x = z + \hat u \tanh(w^\top z + b), \qquad
        \log\left|\det \frac{\partial x}{\partial z}\right| = \log(1 + (1 - \tanh^2) \, w^\top \hat u)

    It is invertible where :math:`w^\top \hat u > -1`. The component of u along w is mapped so that
    :math:`w^\top \hat u \ge -1 + \epsilon`, with the paper's softplus shifted such that u = 0 stays 0 and
    :math:`\epsilon = 10^{-3}`. Both directions are parallel; the inverse costs a scalar root search.

    Args:
        dim: the event size D.
        context_dim: size of the context that u, w and b depend on, 0 for none.

    Shapes: z and x are ``(..., dim)``, a context is ``(..., context_dim)``.

    Example:
        >>> t = Planar(3)
        >>> z = torch.randn(5, 3)
        >>> x, ladj = t.forward_and_ladj(z)
        >>> x.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))
        >>> torch.allclose(t.inv(x), z, atol=1e-5)
        True
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__(dim, context_dim)
        # u = 0 makes the layer the identity; a random w breaks the symmetry between layers.
        w = torch.randn(dim) / math.sqrt(dim)
        self.parameters_of = Parameters(torch.cat([torch.zeros(dim), w, torch.zeros(1)]), context_dim)

    def _constrained(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return u-hat, w, b and w.u-hat, which is not computed from u-hat: rounding must not take it below -1."""
        u, w, b = self.parameters_of(context).split([self.dim, self.dim, 1], dim=-1)
        wu = (w * u).sum(-1, keepdim=True)
        constrained_wu = above_minus_one(wu)
        u = u + (constrained_wu - wu) * w / (w * w).sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        return u, w, b.squeeze(-1), constrained_wu.squeeze(-1)

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        u, w, b, wu = self._constrained(context)
        h = torch.tanh((w * z).sum(-1) + b)
        return z + u * h[..., None], torch.log1p((1 - h**2) * wu)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        # Along w the map is scalar: with a = w.z + b it reads a + (w.u) tanh(a) = w.x + b.
        u, w, b, wu = self._constrained(context)
        h = torch.tanh(tanh_root(wu, (w * x).sum(-1) + b))
        return x - u * h[..., None], -torch.log1p((1 - h**2) * wu)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        u, w, b, wu = self._constrained(context)
        h = torch.tanh((w * z).sum(-1) + b)
        x, ladj = z + u * h[..., None], torch.log1p((1 - h**2) * wu)
        with torch.no_grad():
            # J = I + h' u w^T with h' = 1 - h^2, inverted by Sherman and Morrison; the gradient of ladj is c w.
            slope = 1 - h**2
            c = -2 * h * slope * wu / (1 + slope * wu)
            rest = score - c[..., None] * w
            return x, ladj, rest - (slope * (u * rest).sum(-1) / (1 + slope * wu))[..., None] * w


def above_minus_one(s: Tensor) -> Tensor:
    r"""Map the reals smoothly and increasingly onto :math:`(-1 + \epsilon, \infty)`, so that 0 stays 0.

    .. math:: m(s) = \mathrm{softplus}(s + a) - \mathrm{softplus}(a), \qquad \mathrm{softplus}(a) = 1 - \epsilon

    Example:
        >>> above_minus_one(torch.tensor([-100.0, 0.0, 1.0]))
        tensor([-0.9990,  0.0000,  0.7350])
    """
    return F.softplus(s + _SHIFT) - F.softplus(torch.full_like(s, _SHIFT))


def tanh_root(m: Tensor, c: Tensor) -> Tensor:
    """Return the root a of ``a + m tanh(a) = c``, for m > -1, where the left side increases.

    Raises:
        InversionError: see :func:`pyroflows.transforms.root.increasing_root`.

    Example:
        >>> tanh_root(torch.tensor(1.0), torch.tensor(2.0) + torch.tensor(2.0).tanh())
        tensor(2.)
    """

    def function(a: Tensor) -> Pair:
        h = torch.tanh(a)
        return a + m * h, 1 + m * (1 - h**2)

    m, c = torch.broadcast_tensors(m, c)
    return increasing_root(function, c, c - m.abs(), c + m.abs())
