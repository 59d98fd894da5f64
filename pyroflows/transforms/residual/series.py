"""The log-determinant of a residual layer from the first terms of its power series."""

import math
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from pyroflows.compiling.eager import is_under_func
from pyroflows.errors import OptionError
from pyroflows.nets.lipschitz.contraction import Linearized
from pyroflows.options import checked_int, checked_number
from pyroflows.transforms.residual.exact import by_rows
from pyroflows.transforms.residual.probes import estimated, first_product, signs


@dataclass(frozen=True)
class TruncatedSeries:
    r"""The first terms of :math:`\log\det(I + J) = \sum_{k \ge 1} \frac{(-1)^{k+1}}{k} \operatorname{tr} J^k` (Behrmann
    et al. 2019, arXiv:1811.00995).

    It is biased, by no more than :meth:`bound`; so the layer's log-determinant counts as an estimate, and its
    ``exact()`` is the determinant. The gradient is that of the same terms. Without probes the traces are exact, and
    cost about what the determinant costs; derivatives of any order are those of the terms. Under ``torch.func`` the
    exact traces take the place of the probes.

    Args:
        num_terms: the number of terms, at least 1. :meth:`within` finds it for a tolerance.
        num_probes: the number of random vectors v that estimate each trace as the mean of :math:`v^\top J^k v`; None
            for exact traces.

    Raises:
        OptionError: if a number is below 1.

    Example:
        >>> TruncatedSeries.within(0.01, dim=2, coefficient=0.5)
        TruncatedSeries(num_terms=5, num_probes=None)
        >>> TruncatedSeries(5).bound(2, 0.5)
        0.009...
    """

    num_terms: int
    num_probes: int | None = None
    is_exact = False

    def __post_init__(self) -> None:
        checked_int("num_terms", self.num_terms)
        if self.num_probes is not None:
            checked_int("num_probes", self.num_probes)

    @classmethod
    def within(cls, tolerance: float, dim: int, coefficient: float, num_probes: int | None = None) -> "TruncatedSeries":
        """Return the shortest series whose bias stays within a tolerance.

        Args:
            tolerance: the largest difference from the log-determinant of a row, at least 1e-10 times ``dim``.
            dim: the number of elements of an event.
            coefficient: the Lipschitz constant of g, below 1.
            num_probes: see the class.

        Raises:
            OptionError: if the tolerance is below that, or the coefficient is not between 0 and 1.
        """
        dim, coefficient = checked_int("dim", dim), checked_number("coefficient", coefficient, below=1.0)
        if not checked_number("tolerance", tolerance) >= 1e-10 * dim:
            raise OptionError(f"the tolerance must be at least 1e-10 times dim={dim}, got {tolerance}")
        left = -math.log1p(-coefficient)
        for n in count(1):
            left -= coefficient**n / n
            if dim * left <= tolerance:
                return cls(n, num_probes)
        raise AssertionError  # the terms add up to the logarithm

    def bound(self, dim: int, coefficient: float) -> float:
        r"""Return a bound of the bias of a row's log-determinant, on either side.

        An eigenvalue of J is at most its norm c, so :math:`|\operatorname{tr} J^k| \le D c^k`, and what is left out is
        at most

        .. math:: D \sum_{k > n} \frac{c^k}{k} = D \left(- \log(1 - c) - \sum_{k \le n} \frac{c^k}{k}\right).

        It is attained by :math:`J = -c I`, where all terms have the same sign.

        Args:
            dim: the number D of elements of an event.
            coefficient: the Lipschitz constant c of g, below 1.

        Raises:
            OptionError: if the coefficient is not between 0 and 1.
        """
        dim, coefficient = checked_int("dim", dim), checked_number("coefficient", coefficient, below=1.0)
        terms = math.fsum(coefficient**k / k for k in range(1, self.num_terms + 1))
        return dim * max(0.0, -math.log1p(-coefficient) - terms)

    def __call__(self, at: Linearized, num_axes: int) -> Tensor:
        """Return the sum of the terms, of the batch shape; ``num_axes`` is the number of axes of an event."""
        if self.num_probes is None or is_under_func():
            return self._exactly(at, num_axes)
        v = signs(self.num_probes, at.value)
        product = first_product(at, v)
        with torch.no_grad():
            held = at.held()
            u = w = terms = v
            for k in range(1, self.num_terms):
                u = -held.transposed_times(u)
                w, terms = w + u, terms + u / (k + 1)
            value = (terms * product).flatten(-num_axes).sum(-1)
        return estimated(value, w, v, product, at, num_axes, self._exactly)

    def _exactly(self, at: Linearized, num_axes: int) -> Tensor:
        return by_rows(self._terms, at, num_axes)

    def _terms(self, jacobian: Tensor) -> Tensor:
        total = jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)
        power = jacobian
        for k in range(2, self.num_terms + 1):
            # The trace of a product needs its two factors alone: here they are the powers of k // 2 and k - k // 2.
            higher = power @ jacobian if k % 2 else power
            total = total - (-1) ** k / k * (power * higher.mT).sum((-2, -1))
            power = higher
        return total
