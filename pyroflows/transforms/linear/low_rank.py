"""Linear layers that differ from the identity by a matrix of low rank."""

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.nets import Parameters
from pyroflows.options import checked_int
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.linear.lu import lu_factors
from pyroflows.transforms.linear.matrix_parameters import MatrixParameters
from pyroflows.transforms.linear.products import multiply
from pyroflows.transforms.linear.reflections import reflections
from pyroflows.transforms.linear.solves import solve


class LowRank(FlowTransform):
    r"""The linear map :math:`x = (I + Q W^\top) z` for many dimensions, where Q and W have r columns.

    Q is orthonormal, the first r columns of a product of r Householder reflections. Split into a part in the space
    of Q and a part orthogonal to it, :math:`W = Q (M - I)^\top + P`, with :math:`Q^\top P = 0`, so that

    .. math:: x = z + Q \left((M - I) Q^\top z + P^\top z\right), \qquad \log\det(I + Q W^\top) = \log\det M,

    by Sylvester's identity. M = L U is r x r with a positive diagonal of U, as in :class:`pyroflows.transforms.LU`, so
    that the map is invertible whatever its parameters are. :math:`P^\top x = P^\top z` gives the inverse,

    .. math:: z = x + Q (a - Q^\top x), \qquad a = M^{-1} (Q^\top x - P^\top x) = Q^\top z.

    A call costs O(D r) for each vector and O(D r^2) once, both directions are parallel, and the layer starts at the
    identity.

    Args:
        dim: the event size D.
        rank: r, from 1 to D.
        context_dim: size of the context that Q, M and P depend on, 0 for none.

    Shapes: z and x are ``(..., dim)``, a context is ``(..., context_dim)``.

    Raises:
        OptionError: if ``rank`` is outside its range.

    Example:
        >>> t = LowRank(1000, rank=4)
        >>> z = torch.randn(5, 1000)
        >>> torch.allclose(t.inv(t(z)), z, atol=1e-5)
        True
    """

    def __init__(self, dim: int, rank: int, context_dim: int = 0) -> None:
        super().__init__(checked_int("dim", dim), context_dim)
        self.rank = checked_int("rank", rank)
        if self.rank > dim:
            raise OptionError(f"LowRank needs a rank from 1 to dim={dim}, got {rank}")
        # M = I and P = 0 make the identity; random reflections break the symmetry between layers.
        self.directions_of = Parameters(torch.randn(self.rank, dim), context_dim)
        self.core_of = MatrixParameters(torch.zeros(self.rank, self.rank), context_dim)
        self.shear_of = MatrixParameters(torch.zeros(self.rank, dim), context_dim)

    def _factors(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return Q and P as rows, ``(..., r, D)`` each."""
        q = reflections(self.directions_of(context)).leading_rows(self.rank)
        p = self.shear_of(context)
        return q, p - (p @ q.mT) @ q

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        q, p = self._factors(context)
        lower, upper, scale = lu_factors(self.core_of(context))
        return _forward(z, q, p, lower, upper), _ladj(scale, z)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        q, p = self._factors(context)
        lower, upper, scale = lu_factors(self.core_of(context))
        inside = multiply(q, x)
        a = solve(upper, solve(lower, inside - multiply(p, x), upper=False), upper=True)
        return x + multiply(q.mT, a - inside), -_ladj(scale, x)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        q, p = self._factors(context)
        lower, upper, scale = lu_factors(self.core_of(context))
        with torch.no_grad():
            # J^T y = s is y + (Q (M^T - I) + P) Q^T y = s; times Q^T it is M^T c = Q^T s for c = Q^T y.
            inside = multiply(q, score)
            c = solve(lower.mT, solve(upper.mT, inside, upper=False), upper=True)
            score = score + multiply(q.mT, c - inside) - multiply(p.mT, c)
        return _forward(z, q, p, lower, upper), _ladj(scale, z), score

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


def _forward(z: Tensor, q: Tensor, p: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    inside = multiply(q, z)
    return z + multiply(q.mT, multiply(lower, multiply(upper, inside)) - inside + multiply(p, z))


def _ladj(scale: Tensor, z: Tensor) -> Tensor:
    return scale.log().sum(-1).expand(z.shape[:-1])
