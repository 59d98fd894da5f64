"""LU layers: a permutation and two triangular factors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.options import checked_int
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.linear.matrix_parameters import MatrixParameters
from pyroflows.transforms.linear.permutation import Permutation
from pyroflows.transforms.linear.positive_diagonal import positive_diagonal, with_diagonal
from pyroflows.transforms.linear.products import multiply
from pyroflows.transforms.linear.solves import solve


class LU(FlowTransform):
    r"""The linear map :math:`x = P L U z`, parametrised by its factors (Kingma and Dhariwal 2018, arXiv:1807.03039,
    eq. 10).

    P is a fixed permutation, L unit lower triangular and :math:`U = N \operatorname{diag}(u)`, where N is unit upper
    triangular and :math:`u_i = \epsilon + \mathrm{softplus}(a_i) > 0`, :math:`\epsilon = 10^{-3}`, so that the map
    stays invertible whatever its parameters are; it starts at L = U = I. The log-determinant,
    :math:`\sum_i \log u_i`, costs O(D). Both directions are parallel: the forward one multiplies by each of the two
    factors, the inverse solves two triangular systems.

    Args:
        dim: the event size D.
        order: P as a permutation of ``range(dim)``, ``(P y)[i] = y[order[i]]``; None for P = I.
        context_dim: size of the context that L and U depend on, 0 for none.

    Shapes: z and x are ``(..., dim)``, a context is ``(..., context_dim)``.

    Raises:
        OptionError: if ``order`` is not a permutation of ``range(dim)``.

    Example:
        >>> t = LU(3, order=[2, 0, 1])
        >>> z = torch.randn(5, 3)
        >>> torch.allclose(t(z), z[:, [2, 0, 1]], atol=1e-5), torch.allclose(t.inv(t(z)), z, atol=1e-5)
        (True, True)
    """

    def __init__(self, dim: int, order: Sequence[int] | None = None, context_dim: int = 0) -> None:
        super().__init__(checked_int("dim", dim), context_dim)
        order = range(dim) if order is None else order
        if len(order) != dim:
            raise OptionError(f"order must be a permutation of 0 to {dim - 1}, got {list(order)}")
        self.permutation = Permutation(order)
        # It holds L below its diagonal, N above it, and the a_i on it.
        self.matrix_of = MatrixParameters(torch.zeros(dim, dim), context_dim)

    def factors(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return L, U and u, at a context ``(..., context_dim)`` if the layer takes one."""
        return lu_factors(self.matrix_of(context))

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self._forward(z, self.matrix_of(context))

    def _forward(self, z: Tensor, raw: Tensor) -> Pair:
        scale = positive_diagonal(raw)
        y = scale * z
        y = multiply(raw.triu(1), y) + y
        x, _ = self.permutation._forward_and_ladj(multiply(raw.tril(-1), y) + y, None)
        return x, scale.log().sum(-1).expand(z.shape[:-1])

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        raw = self.matrix_of(context)
        scale = positive_diagonal(raw)
        y, _ = self.permutation._inverse_and_ladj(x, None)
        # Solves read one triangle each without its diagonal, so that no factor need be copied.
        z = solve(raw, solve(raw, y, upper=False, is_unit=True), upper=True, is_unit=True) / scale
        return z, -scale.log().sum(-1).expand(x.shape[:-1])

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        raw = self.matrix_of(context)
        with torch.no_grad():  # J^-T = P L^-T N^-T diag(1/u)
            y = solve(raw.mT, score / positive_diagonal(raw), upper=False, is_unit=True)
            score, _ = self.permutation._forward_and_ladj(solve(raw.mT, y, upper=True, is_unit=True), None)
        return *self._forward(z, raw), score


def lu_factors(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return L, :math:`U = N \operatorname{diag}(u)` and u from matrices ``(..., D, D)``.

    They hold L below the diagonal, N above it, and on it what becomes the positive u. Of zeros L and U are I.
    """
    scale = positive_diagonal(raw)
    lower, upper = (with_diagonal(triangle, torch.ones_like(scale)) for triangle in (raw.tril(), raw.triu()))
    return lower, upper * scale[..., None, :], scale


def lu_inverse(raw: Tensor, scale: Tensor) -> Tensor:
    r"""Return :math:`U^{-1} L^{-1} = \operatorname{diag}(1 / u)\, N^{-1} L^{-1}` for small matrices.

    If vectors are many, one product with it is several times as fast as two solves for all of them.

    Args:
        raw: matrices ``(..., D, D)`` that hold L and N, as in :func:`lu_factors`.
        scale: u, ``(..., D)``.
    """
    # There is no triangular solve in half precision.
    dtype = torch.promote_types(raw.dtype, torch.float32)
    # Solves read one triangle each without its diagonal, so that no factor need be copied.
    matrix, identity = raw.to(dtype), torch.eye(raw.shape[-1], dtype=dtype, device=raw.device)
    inverse = torch.linalg.solve_triangular(matrix, identity, upper=False, unitriangular=True)
    inverse = torch.linalg.solve_triangular(matrix, inverse, upper=True, unitriangular=True)
    return inverse.to(raw.dtype) / scale[..., None]
