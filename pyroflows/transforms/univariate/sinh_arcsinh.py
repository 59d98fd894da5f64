"""The sinh-arcsinh map, which skews and changes tails smoothly."""

import math

import torch
from torch import Tensor

from pyroflows.transforms.univariate.affine import Affine
from pyroflows.transforms.univariate.base import Pair
from pyroflows.transforms.univariate.clamp import soft_clamped
from pyroflows.transforms.univariate.overflow import below_overflow

MAX_SKEW = 2.0
# Tails of x are those of z to a power between 2/3 and 3/2.
MAX_LOG_TAIL = math.log(1.5)
_LOCATION_SCALE = Affine()


class SinhArcsinh:
    r"""The sinh-arcsinh map (Jones and Pewsey 2009, doi:10.1093/biomet/asp053), with a location and a scale.

    .. math:: x = t + e^s \sinh(\delta \operatorname{arsinh} z + \epsilon), \qquad
        \frac{dx}{dz} = e^s \delta \, \frac{\cosh(\delta \operatorname{arsinh} z + \epsilon)}{\sqrt{1 + z^2}}

    It has parameters :math:`\theta = (t, s_0, \epsilon_0, \log \delta_0)`. A positive :math:`\epsilon` skews to the
    right, and :math:`\delta` changes the tails, which are powers: :math:`|x| \sim |z|^\delta` far out. At
    :math:`\delta = 1` the map is the hyperbola :math:`z \cosh\epsilon + \sqrt{1 + z^2} \sinh\epsilon`, a smooth leaky
    rectifier with slopes :math:`e^{\pm\epsilon}`. The log-scale is softly clamped as in
    :class:`pyroflows.transforms.univariate.Affine`, and so are :math:`|\epsilon| < 2` and
    :math:`2/3 < \delta < 3/2`; values are clamped as :mod:`pyroflows.transforms.univariate.overflow` says, since powers
    of powers overflow in deep stacks. Both directions are in closed form; the inverse of the sinh-arcsinh map is one,
    with :math:`1/\delta` and :math:`-\epsilon / \delta`.

    Shapes: z and x are ``(...)``, theta is ``(..., 4)``.

    Example:
        >>> theta = torch.tensor([0.0, 0.0, 1.0, 0.0])
        >>> x, ladj = SinhArcsinh().forward_and_ladj(torch.tensor([-1.0, 0.0, 1.0]), theta)
        >>> x
        tensor([0.0581, 0.9640, 2.5225])
    """

    num_params = 4

    def forward_and_ladj(self, z: Tensor, theta: Tensor) -> Pair:
        skew, log_tail = _skew_and_log_tail(theta)
        y, ladj = _sinh_arcsinh(below_overflow(z), skew, log_tail)
        x, log_scale = _LOCATION_SCALE.forward_and_ladj(y, theta[..., :2])
        return below_overflow(x), ladj + log_scale

    def inverse_and_ladj(self, x: Tensor, theta: Tensor) -> Pair:
        skew, log_tail = _skew_and_log_tail(theta)
        y, log_scale = _LOCATION_SCALE.inverse_and_ladj(below_overflow(x), theta[..., :2])
        z, ladj = _sinh_arcsinh(y, -skew * (-log_tail).exp(), -log_tail)
        return below_overflow(z), ladj + log_scale

    def __repr__(self) -> str:
        return "SinhArcsinh()"


def _skew_and_log_tail(theta: Tensor) -> Pair:
    skew = soft_clamped(theta[..., 2], (MAX_SKEW, MAX_SKEW))
    return skew, soft_clamped(theta[..., 3], (MAX_LOG_TAIL, MAX_LOG_TAIL))


def _sinh_arcsinh(z: Tensor, skew: Tensor, log_tail: Tensor) -> Pair:
    r"""Return :math:`y = \sinh(\delta \operatorname{arsinh} z + \epsilon)` and log dy/dz.

    Let :math:`w = (\delta - 1) \operatorname{arsinh} z + \epsilon`. By the addition theorem

    .. math:: y = \sinh(\operatorname{arsinh} z + w) = z \cosh w + \sqrt{1 + z^2} \, \sinh w
        = z\, e^{\operatorname{sign}(z) w} + \frac{\sinh w}{\sqrt{1 + z^2} + |z|},

    in which nothing cancels, and w is small where the map is close to the identity.
    """
    w = torch.expm1(log_tail) * torch.asinh(z) + skew
    side = torch.sign(z.detach())
    # Squares of large numbers overflow in half precision.
    root = torch.hypot(z, torch.ones_like(z))
    y = z * torch.exp(side * w) + torch.sinh(w) / (root + side * z)
    return y, log_tail + torch.hypot(y, torch.ones_like(y)).log() - root.log()
