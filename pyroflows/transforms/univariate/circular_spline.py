"""The monotone rational-quadratic spline on the circle."""

import math
from collections.abc import Callable

from torch import Tensor

from pyroflows.constraints import turns
from pyroflows.transforms.univariate.base import Pair
from pyroflows.transforms.univariate.spline import Spline


class CircularSpline(Spline):
    r"""The circular rational-quadratic spline with a phase shift (Rezende et al. 2020, arXiv:2002.02428, section 2.1).

    It is an increasing map of the circle onto itself, of angles in radians,

    .. math:: x = S(z) + \varphi, \qquad S(-\pi) = -\pi, \quad S(\pi) = \pi, \quad S'(-\pi) = S'(\pi),

    where S is the spline of :class:`Spline` on :math:`[-\pi, \pi]`, whose derivatives at the two ends are one
    parameter, so that dx/dz is continuous all around the circle. The shift :math:`\varphi` is any number, so that the
    point at which S is fixed is not a special one.

    Angles outside of :math:`[-\pi, \pi]` keep their turns, :math:`x(z + 2 \pi k) = x(z) + 2 \pi k`. As a map of the
    real line it is hence increasing and has an inverse everywhere, wherever the shift leads; as a map of the circle it
    knows no turns. It is the identity at :math:`\theta = 0`.

    The parameters :math:`\theta` are K raw widths, K raw heights, K raw derivatives at the knots, starting with the one
    at :math:`\pm\pi`, and the shift. Structures show the columns that it maps to their conditioners as cosine and sine,
    so that densities are continuous all around the torus.

    Args:
        bins: K, the number of bins, from 2 to 999.

    Shapes: z and x are ``(...)``, theta is ``(..., 3 K + 1)``; batch dimensions that theta lacks on the left broadcast.

    Raises:
        OptionError: if ``bins`` is outside its range.

    Example:
        >>> spline = CircularSpline(bins=4)
        >>> z, theta = torch.tensor([-torch.pi, 0.0, torch.pi]), torch.randn(spline.num_params)
        >>> x, ladj = spline.forward_and_ladj(z, theta)
        >>> torch.allclose(x[2] - x[0], torch.tensor(2 * torch.pi)), torch.allclose(ladj[0], ladj[2], atol=1e-5)
        (True, True)
    """

    is_circular = True

    def __init__(self, bins: int = 8) -> None:
        super().__init__(bins, bound=math.pi)
        self.num_params = 3 * bins + 1

    def forward_and_ladj(self, z: Tensor, theta: Tensor) -> Pair:
        x, ladj = self._periodic(super().forward_and_ladj, z, theta)
        return x + theta[..., -1], ladj

    def inverse_and_ladj(self, x: Tensor, theta: Tensor) -> Pair:
        return self._periodic(super().inverse_and_ladj, x - theta[..., -1], theta)

    def _periodic(self, spline: Callable[[Tensor, Tensor], Pair], value: Tensor, theta: Tensor) -> Pair:
        """Return the spline of the angle without its turns, with the turns."""
        whole = turns(value.detach())
        # Rounding may leave an angle that is just outside of the interval.
        result, ladj = spline((value - whole).clamp(-math.pi, math.pi), theta[..., :-1])
        return result + whole, ladj

    def __repr__(self) -> str:
        return f"CircularSpline(bins={self.bins})"
