"""The monotone network: a deep sigmoidal map."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.options import checked_int
from pyroflows.transforms.root import increasing_root
from pyroflows.transforms.univariate.base import Pair
from pyroflows.transforms.univariate.overflow import below_overflow, bounded_coefficients

EPS = 1e-3
# The map's tails have the least of the slopes a. If sampling goes through the inverse, each dimension is an input of
# the conditioner for the next, and tails that stretch more than tenfold explode within a few dimensions.
MIN_A = 0.1
# Data tell sigmoids apart once a and b are about ten; with this gain, raw parameters of order one reach that.
GAIN = 5.0
SPREAD = 2.0
_SHIFT = math.log(math.expm1(1))


class Monotone:
    r"""The deep sigmoidal map, a monotone network (Huang et al. 2018, arXiv:1804.00779), whose slope is bounded below.

    .. math::
        x = \epsilon z + (1 - \epsilon) \operatorname{logit} \sum_{i=1}^U w_i \, \sigma(u_i), \qquad
        u_i = a_i (z - m_i) + m_i + b_i

    It has weights :math:`w = \operatorname{softmax}(\omega)`, slopes
    :math:`a_i = 0.1 + 0.9 \operatorname{softplus}(5 \alpha_i + \log(e - 1))`, shifts :math:`b_i = 5 \beta_i`, fixed
    centres :math:`m_i` spread over (-2, 2), and parameters :math:`\theta = (\alpha, \beta, \omega)`. The derivative
    dx/dz lies between :math:`\epsilon = 10^{-3}` and :math:`\epsilon + (1 - \epsilon) \max_i a_i`. Without the term
    :math:`\epsilon z` it would have no lower bound between two clusters of sigmoids, and floats could not tell one z
    from the next there. The tails are linear, with the least of the slopes :math:`a_i`. The inverse is a root search.

    A network that computes the parameters has no bound far from the data, so :math:`\alpha` is clamped to
    :math:`\pm 10^3` and values as :mod:`pyroflows.transforms.univariate.overflow` says, so that log-densities and their
    gradients are finite. The logit is computed in log space, so that neither direction saturates:

    .. math::
        \operatorname{logit} s = \log s - \log(1 - s), \quad
        s = \sum_i w_i \sigma(u_i), \quad 1 - s = \sum_i w_i \sigma(-u_i).

    Args:
        num_units: U, the number of sigmoids, at least 1.

    Shapes: z and x are ``(...)``, theta is ``(..., 3 U)``; batch dimensions that theta lacks on the left broadcast.

    Raises:
        OptionError: if ``num_units`` is below 1.
        InversionError: from the inverse, if the root search misses its target, see
            :func:`pyroflows.transforms.root.increasing_root`.

    Example:
        >>> monotone = Monotone(num_units=8)
        >>> theta = torch.randn(monotone.num_params)
        >>> z = torch.linspace(-8, 8, 5)
        >>> x, ladj = monotone.forward_and_ladj(z, theta)
        >>> torch.allclose(monotone.inverse_and_ladj(x, theta)[0], z, atol=1e-3)
        True
    """

    def __init__(self, num_units: int = 8) -> None:
        num_units = checked_int("num_units", num_units)
        self.num_units = num_units
        self.num_params = 3 * num_units
        # Equal units get equal gradients and stay equal for ever. Each turns about its own centre m: at a = 1 it still
        # computes z + b, but as the slopes grow the units separate.
        self._centers = [SPREAD * (2 * i + 1 - num_units) / num_units for i in range(num_units)]

    def forward_and_ladj(self, z: Tensor, theta: Tensor) -> Pair:
        x, slope = _mixture(below_overflow(z), *self._units(theta, z.dim()))
        return below_overflow(x), slope.log()

    def inverse_and_ladj(self, x: Tensor, theta: Tensor) -> Pair:
        a, b, log_w = self._units(theta, x.dim())
        with torch.no_grad():
            # A mean of sigmoids lies between the least and the greatest. So x lies between the values that single units
            # would give, and z between the roots that single units would have.
            roots = (x - (1 - EPS) * b) / (EPS + (1 - EPS) * a)
        z = increasing_root(lambda z: _mixture(z, a, b, log_w), x, roots.amin(0), roots.amax(0))
        return below_overflow(z), -_mixture(z, a, b, log_w)[1].log()

    def _units(self, theta: Tensor, num_dims: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a and b of ``u = a z + b`` and the log weights, ``(U, ...)`` with the dimensions of z."""
        padding = (1,) * (num_dims + 1 - theta.dim())
        alpha, beta, omega = theta.reshape(*padding, *theta.shape).movedim(-1, 0).unflatten(0, (3, self.num_units))
        slopes = F.softplus(bounded_coefficients(alpha) + _SHIFT / GAIN, beta=GAIN)
        a = MIN_A + (1 - MIN_A) * GAIN * slopes
        m = torch.tensor(self._centers, dtype=a.dtype, device=a.device).reshape(-1, *[1] * num_dims)
        return a, torch.add(m, beta, alpha=GAIN) - a * m, F.log_softmax(omega, 0)

    def __repr__(self) -> str:
        return f"Monotone(num_units={self.num_units})"


def _mixture(z: Tensor, a: Tensor, b: Tensor, log_w: Tensor) -> Pair:
    """Return x and dx/dz, which is a sum of positive terms: the derivatives of log s and of -log(1 - s)."""
    u = a * z + b
    both = torch.stack([u, -u])
    log_terms = log_w + F.logsigmoid(both)
    # This is not torch.logsumexp, whose backward pass has the shares of large log terms to a few digits only.
    top = log_terms.detach().amax(1)
    terms = (log_terms - top[:, None]).exp()
    total = terms.sum(1)
    log_s, log_one_minus_s = top + total.log()
    slope = ((a * terms * torch.sigmoid(-both)).sum(1) / total).sum(0)
    return EPS * z + (1 - EPS) * (log_s - log_one_minus_s), EPS + (1 - EPS) * slope
