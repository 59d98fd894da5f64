"""The Sylvester layer."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.errors import OptionError
from pyroflows.nets import Parameters
from pyroflows.options import checked_int
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.linear.reflections import unit_vectors
from pyroflows.transforms.planar import above_minus_one, tanh_root


class Sylvester(FlowTransform):
    r"""The Householder Sylvester layer (van den Berg et al. 2018, arXiv:1803.05649, eq. 13 and theorem 2).

    .. math::
        x = z + Q R \tanh(\tilde R Q^\top z + b), \qquad
        \log\left|\det \frac{\partial x}{\partial z}\right|
        = \sum_i \log(1 + (1 - \tanh_i^2) \, r_{ii} \tilde r_{ii})

    where Q has M orthonormal columns, the first M of a product of M Householder reflections, and R and
    :math:`\tilde R` are upper triangular. It is invertible where :math:`r_{ii} \tilde r_{ii} > -1`. The sign of
    :math:`\tilde r_{ii}` can be moved into R and b, so it is positive here and at least 0.1; and
    :math:`r_{ii} \tilde r_{ii} > -1 + \epsilon` by the same map as in :class:`Planar`. R = 0 is the identity. Both
    directions are parallel over the batch; the inverse solves M scalar equations, one after the other.

    Args:
        dim: the event size D.
        rank: M, the number of columns, from 1 to D; with M = 1 the layer is close to a planar one.
        context_dim: size of the context that all parameters depend on, 0 for none.

    Shapes: z and x are ``(..., dim)``, a context is ``(..., context_dim)``.

    Raises:
        OptionError: if ``rank`` is outside its range.

    Example:
        >>> t = Sylvester(5, rank=2)
        >>> z = torch.randn(7, 5)
        >>> torch.allclose(t.inv(t(z)), z, atol=1e-5)
        True
    """

    def __init__(self, dim: int, rank: int, context_dim: int = 0) -> None:
        super().__init__(dim, context_dim)
        rank = checked_int("rank", rank)
        if rank > dim:
            raise OptionError(f"Sylvester needs a rank from 1 to dim={dim}, got {rank}")
        self.rank = rank
        self._sizes = [rank * dim, rank * rank, rank * rank, rank]
        # R = 0 makes the layer the identity; random reflections and a random R~ break the symmetry between layers.
        value = [torch.randn(rank * dim), torch.zeros(rank**2), torch.randn(rank**2) / rank, torch.zeros(rank)]
        self.parameters_of = Parameters(torch.cat(value), context_dim)

    def _constrained(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the unit vectors of the reflections, R, R~, b, and the constrained diagonal of R R~."""
        raw = self.parameters_of(context)
        v, r, r_tilde, b = raw.split(self._sizes, dim=-1)
        v = unit_vectors(v.unflatten(-1, (self.rank, self.dim)))
        r, r_tilde = (m.unflatten(-1, (self.rank, self.rank)) for m in (r, r_tilde))
        diagonal_tilde = 0.1 + F.softplus(r_tilde.diagonal(dim1=-2, dim2=-1))
        product = above_minus_one(r.diagonal(dim1=-2, dim2=-1) * diagonal_tilde)
        r = torch.triu(r, 1) + torch.diag_embed(product / diagonal_tilde)
        r_tilde = torch.triu(r_tilde, 1) + torch.diag_embed(diagonal_tilde)
        return v, r, r_tilde, b, product

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        v, r, r_tilde, b, product = self._constrained(context)
        h = torch.tanh(_apply(r_tilde, self._project(v, z)) + b)
        return z + self._embed(v, _apply(r, h)), torch.log1p((1 - h**2) * product).sum(-1)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        v, r, r_tilde, b, product = self._constrained(context)
        h = torch.tanh(_apply(r_tilde, self._project(v, z)) + b)
        x, ladj = z + self._embed(v, _apply(r, h)), torch.log1p((1 - h**2) * product).sum(-1)
        with torch.no_grad():
            # J = I + Q R H' R~ Q^T with H' = diag(1 - h^2), inverted by Woodbury: with the gradient Q R~^T c of ladj,
            # J^-T (s - Q R~^T c) = s - Q R~^T (c + H' y), where (I + (R~ R)^T H') y = R^T (Q^T s - R~^T c).
            slope = 1 - h**2
            c = -2 * h * slope * product / (1 + slope * product)
            rest = _apply(r.mT, self._project(v, score) - _apply(r_tilde.mT, c))
            mixing = torch.tril((r_tilde @ r).mT * slope[..., None, :], -1) + torch.diag_embed(1 + slope * product)
            y = torch.linalg.solve_triangular(mixing, rest[..., None], upper=False).squeeze(-1)
            return x, ladj, score - self._embed(v, _apply(r_tilde.mT, c + slope * y))

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        # With y = Q^T x and a = R~ Q^T z + b: R~ y + b = a + (R~ R) tanh(a). Equation i increases in a_i and has no
        # earlier component, so the system is solved from the last component up.
        v, r, r_tilde, b, product = self._constrained(context)
        c = _apply(r_tilde, self._project(v, x)) + b
        mixing = r_tilde @ r
        solved: list[Tensor] = []
        for i in reversed(range(self.rank)):
            known = sum(
                (mixing[..., i, j] * h for j, h in zip(range(i + 1, self.rank), solved, strict=True)), start=0.0
            )
            solved.insert(0, torch.tanh(tanh_root(product[..., i], c[..., i] - known)))
        h = torch.stack(solved, -1)
        return x - self._embed(v, _apply(r, h)), -torch.log1p((1 - h**2) * product).sum(-1)

    def _project(self, v: Tensor, z: Tensor) -> Tensor:
        """Return Q^T z: all reflections of z, then the first M components."""
        for i in range(self.rank):
            z = _reflect(v[..., i, :], z)
        return z[..., : self.rank]

    def _embed(self, v: Tensor, h: Tensor) -> Tensor:
        """Return Q h: zeros appended to h, then the reflections in reverse order."""
        h = F.pad(h, (0, self.dim - self.rank))
        for i in reversed(range(self.rank)):
            h = _reflect(v[..., i, :], h)
        return h

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


def _reflect(unit: Tensor, z: Tensor) -> Tensor:
    """Return the Householder reflection of z; a zero vector reflects nothing."""
    return z - 2 * unit * (unit * z).sum(-1, keepdim=True)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None]).squeeze(-1)
