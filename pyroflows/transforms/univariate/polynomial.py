"""The sum-of-squares polynomial map."""

import math

import numpy as np
import torch
from numpy.polynomial import legendre
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.options import checked_int
from pyroflows.transforms.root import increasing_root
from pyroflows.transforms.univariate.base import Pair
from pyroflows.transforms.univariate.overflow import below_overflow, bounded_coefficients

EPS = 1e-3


class SOS:
    r"""The sum-of-squares polynomial (Jaini et al. 2019, arXiv:1905.02325), continued by linear tails.

    .. math::
        x = t + \int_0^z s(u) \, du, \qquad
        s(u) = \epsilon + \frac{1 - \epsilon}{K} \sum_{k=1}^K p_k(u)^2, \qquad
        p_k(u) = 1 + \sum_{j=0}^d a_{kj} (u / B - m_k)^j

    for :math:`|u| \le B`, and :math:`s(u) = s(\pm B)` beyond, with :math:`\epsilon = 10^{-3}`, fixed centres
    :math:`m_k` spread over (-1, 1), and :math:`\theta = (t, a_{10}, \ldots, a_{Kd})`. The log-derivative is
    :math:`\log s(z)`, and the inverse is a root search.

    The paper has no tails. A stack of L of its layers grows like :math:`z^{(2d + 1)^L}`, which overflows on the first
    outlier. With linear tails x grows like z, by a factor that is quadratic in the coefficients. A network that
    computes them has no bound far from the data, so they are clamped to :math:`\pm 10^3`, and values as
    :mod:`pyroflows.transforms.univariate.overflow` says, so that log-densities and their gradients are finite.

    Args:
        num_polynomials: K, at least 1; two squares suffice for every polynomial that is nowhere negative.
        degree: d, the degree of each polynomial, at least 1; inside the bound the map has degree 2d + 1.
        bound: B > 0; beyond :math:`\pm B` the map is linear. With a large bound it learns slowly, since the powers of
            z / B vanish where the data are.

    Shapes: z and x are ``(...)``, theta is ``(..., 1 + K (d + 1))``; batch dimensions that theta lacks on the left
    broadcast.

    Raises:
        OptionError: if ``num_polynomials`` or ``degree`` is below 1, or ``bound`` is not positive and finite.
        InversionError: from the inverse, if the root search misses its target, see
            :func:`pyroflows.transforms.root.increasing_root`.

    Example:
        >>> sos = SOS(num_polynomials=2, degree=3)
        >>> theta = torch.randn(sos.num_params)
        >>> z = torch.linspace(-8, 8, 5)
        >>> x, ladj = sos.forward_and_ladj(z, theta)
        >>> torch.allclose(sos.inverse_and_ladj(x, theta)[0], z, atol=1e-3)
        True
    """

    def __init__(self, num_polynomials: int = 2, degree: int = 3, bound: float = 3.0) -> None:
        num_polynomials = checked_int("num_polynomials", num_polynomials)
        degree = checked_int("degree", degree)
        if not 0 < bound < math.inf:
            raise OptionError(f"SOS needs a positive, finite bound, got {bound}")
        self.num_polynomials = num_polynomials
        self.degree = degree
        self.bound = bound
        self.num_params = 1 + num_polynomials * (degree + 1)
        self._nodes, self._weights = _radau(degree + 1)
        # A sum of squares does not change when the vector (p_1, ..., p_K) is rotated. If all p_k had the same powers,
        # gradient descent would keep this symmetry: starting from constants, equal or not, they would stay multiples of
        # one another, which is one square in all. Powers about different centres have no such symmetry.
        k = num_polynomials
        self._centers = [(2 * i + 1 - k) / k for i in range(k)]

    def forward_and_ladj(self, z: Tensor, theta: Tensor) -> Pair:
        shift, coefficients = self._shift_and_coefficients(theta, z.dim())
        value, slope = self._integral(below_overflow(z), coefficients)
        return below_overflow(shift + value), slope.log()

    def inverse_and_ladj(self, x: Tensor, theta: Tensor) -> Pair:
        shift, coefficients = self._shift_and_coefficients(theta, x.dim())
        target = x - shift
        with torch.no_grad():
            end = torch.full_like(target, self.bound)
            bottom, bottom_slope = self._integral(-end, coefficients)
            top, top_slope = self._integral(end, coefficients)
            # If the root lies in a tail, the outer end of the bracket is the root itself.
            lower = -end + (target - bottom).clamp_max(0) / bottom_slope
            upper = end + (target - top).clamp_min(0) / top_slope
        z = increasing_root(lambda z: self._integral(z, coefficients), target, lower, upper)
        return below_overflow(z), -self._integral(z, coefficients)[1].log()

    def _shift_and_coefficients(self, theta: Tensor, num_dims: int) -> Pair:
        """Return t ``(...)`` and a ``(K, d + 1, ...)``, with the dimensions of z."""
        padding = (1,) * (num_dims + 1 - theta.dim())
        theta = theta.reshape(*padding, *theta.shape).movedim(-1, 0)
        coefficients = bounded_coefficients(theta[1:])
        return theta[0], coefficients.unflatten(0, (self.num_polynomials, self.degree + 1))

    def _integral(self, z: Tensor, coefficients: Tensor) -> Pair:
        """Return the integral of s from 0 to z, and s(z).

        Radau's quadrature with d + 1 nodes is exact, since s has degree 2d. Its weights are positive, so that the sum
        stays positive under rounding. Its last node is z itself, so that the derivative s(z) comes with it.
        """
        inside = z.clamp(-self.bound, self.bound)
        nodes, weights, centers = (
            torch.tensor(numbers, dtype=z.dtype, device=z.device).reshape(-1, *[1] * z.dim())
            for numbers in (self._nodes, self._weights, self._centers)
        )
        powers_of = (nodes * (inside / self.bound))[:, None] - centers
        p = coefficients[:, -1]
        for a in (*coefficients[:, 1:-1].unbind(1)[::-1], 1 + coefficients[:, 0]):
            p = torch.addcmul(a, p, powers_of)
        slopes = EPS + (1 - EPS) * p.square().mean(1)
        return (weights * slopes).sum(0) * inside + slopes[-1] * (z - inside), slopes[-1]

    def __repr__(self) -> str:
        return f"SOS(num_polynomials={self.num_polynomials}, degree={self.degree}, bound={self.bound})"


def _radau(num_nodes: int) -> tuple[list[float], list[float]]:
    """Return nodes in (0, 1], the last of them 1, and weights of the quadrature on [0, 1] of degree 2 num_nodes - 2.

    On [-1, 1] with the fixed node -1, the nodes are the roots of P_{n-1} + P_n (Abramowitz and Stegun, 25.4.31).
    """
    last, both = [0.0] * (num_nodes - 1) + [1.0], [0.0] * (num_nodes - 1) + [1.0, 1.0]
    x = np.sort(legendre.legroots(both))
    x -= legendre.legval(x, both) / legendre.legval(x, legendre.legder(both))  # the roots are good to 1e-13 only
    weights = (1 - x) / legendre.legval(x, last) ** 2
    return ((1 - x) / 2)[::-1].tolist(), (weights / weights.sum())[::-1].tolist()
