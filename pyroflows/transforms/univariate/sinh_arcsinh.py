"""The sinh-arcsinh map, which skews and changes tails smoothly."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.transforms.univariate.affine import Affine
from pyroflows.transforms.univariate.base import Pair
from pyroflows.transforms.univariate.clamp import soft_clamped
from pyroflows.transforms.univariate.overflow import below_overflow

MAX_SKEW = 2.0
MAX_LOG_TAIL = math.log(1.5)
# Powers of powers overflow in deep stacks, so that the map is linear again from |z| = 100 on.
MAX_ARSINH = math.asinh(100)
_LOCATION_SCALE = Affine()


class SinhArcsinh:
    r"""The sinh-arcsinh map (Jones and Pewsey 2009, doi:10.1093/biomet/asp053), with a location and a scale.

    .. math:: x = t + e^s \sinh(\delta \operatorname{arsinh} z + \epsilon), \qquad
        \frac{dx}{dz} = e^s \delta \, \frac{\cosh(\delta \operatorname{arsinh} z + \epsilon)}{\sqrt{1 + z^2}}

    It has parameters :math:`\theta = (t, s_0, \epsilon_0, \log \delta_0)`. A positive :math:`\epsilon` skews to the
    right. A :math:`\delta` above one makes tails heavier, and one below makes them lighter: x grows as
    :math:`|z|^\delta` up to :math:`|z| = 100`. From there on :math:`\delta \operatorname{arsinh} z` grows as
    :math:`\operatorname{arsinh} z`, and x as z, so that values far from the data stay finite. At :math:`\delta = 1` the
    map is the hyperbola :math:`z \cosh\epsilon + \sqrt{1 + z^2} \sinh\epsilon`, a smooth leaky rectifier with slopes
    :math:`e^{\pm\epsilon}`. The log-scale is softly clamped as in :class:`pyroflows.transforms.univariate.Affine`, and
    so are :math:`|\epsilon| < 2` and :math:`2/3 < \delta < 3/2`; values are clamped as
    :mod:`pyroflows.transforms.univariate.overflow` says. Both directions are in closed form.

    Shapes: z and x are ``(...)``, theta is ``(..., 4)``.

    Example:
        >>> theta = torch.tensor([0.0, 0.0, 1.0, 0.0])
        >>> x, ladj = SinhArcsinh().forward_and_ladj(torch.tensor([-1.0, 0.0, 1.0]), theta)
        >>> x
        tensor([0.0429, 1.0616, 2.9596])
    """

    num_params = 4

    def forward_and_ladj(self, z: Tensor, theta: Tensor) -> Pair:
        z = below_overflow(z)
        skew, log_tail = _skew_and_log_tail(theta)
        arsinh = F.hardtanh(torch.asinh(z), -MAX_ARSINH, MAX_ARSINH)
        y, ladj = _shifted(z, torch.expm1(log_tail) * arsinh + skew)
        x, log_scale = _LOCATION_SCALE.forward_and_ladj(y, theta[..., :2])
        return below_overflow(x), ladj + _inside(arsinh, log_tail) + log_scale

    def inverse_and_ladj(self, x: Tensor, theta: Tensor) -> Pair:
        skew, log_tail = _skew_and_log_tail(theta)
        y, log_scale = _LOCATION_SCALE.inverse_and_ladj(below_overflow(x), theta[..., :2])
        arsinh = F.hardtanh((torch.asinh(y) - skew) * (-log_tail).exp(), -MAX_ARSINH, MAX_ARSINH)
        z, ladj = _shifted(y, -torch.expm1(log_tail) * arsinh - skew)
        return below_overflow(z), ladj - _inside(arsinh, log_tail) + log_scale

    def __repr__(self) -> str:
        return "SinhArcsinh()"


def _skew_and_log_tail(theta: Tensor) -> Pair:
    skew = soft_clamped(theta[..., 2], (MAX_SKEW, MAX_SKEW))
    return skew, soft_clamped(theta[..., 3], (MAX_LOG_TAIL, MAX_LOG_TAIL))


def _inside(arsinh: Tensor, log_tail: Tensor) -> Tensor:
    r"""Return :math:`\log\delta` where the map is not linear, and zero elsewhere."""
    return torch.where(arsinh.abs() < MAX_ARSINH, log_tail, torch.zeros_like(log_tail))


def _shifted(z: Tensor, w: Tensor) -> Pair:
    r"""Return :math:`y = \sinh(\operatorname{arsinh} z + w)` and log dy/dz for a w that is held fixed.

    By the addition theorem

    .. math:: y = z \cosh w + \sqrt{1 + z^2} \, \sinh w
        = z\, e^{\pm w} + \frac{\sinh w}{\sqrt{1 + z^2} + |z|}, \qquad
        \frac{dy}{dz} = \sqrt{\frac{1 + y^2}{1 + z^2}},

    where the sign is that of z. In the second form nothing cancels.
    """
    side = 1 - 2 * (z < 0).to(z.dtype)
    # Squares of large numbers would overflow.
    root = torch.hypot(z, torch.ones_like(z))
    y = z * torch.exp(side * w) + torch.sinh(w) / (root + side * z)
    return y, torch.hypot(y, torch.ones_like(y)).log() - root.log()
