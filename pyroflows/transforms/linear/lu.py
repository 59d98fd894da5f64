"""LU layers: a permutation and two triangular factors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflows.errors import OptionError
from pyroflows.nets import MLP
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.linear.permutation import Permutation
from pyroflows.transforms.linear.positive_diagonal import positive_diagonal, with_diagonal
from pyroflows.transforms.linear.products import multiply
from pyroflows.transforms.linear.solves import solve


class LU(FlowTransform):
    r"""The linear map :math:`x = P L U z`, parametrised by its factors (Kingma and Dhariwal 2018, arXiv:1807.03039,
    eq. 10).

    P is a fixed permutation, L unit lower triangular and U upper triangular with the diagonal
    :math:`u_{ii} = \epsilon + \mathrm{softplus}(a_i) > 0`, :math:`\epsilon = 10^{-3}`, so that the map stays invertible
    whatever its parameters are; it starts at L = U = I. The log-determinant, :math:`\sum_i \log u_{ii}`, costs O(D).
    Both directions are parallel: the forward one multiplies by each of the two factors, the inverse solves two
    triangular systems.

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
        super().__init__(dim, context_dim)
        order = range(dim) if order is None else order
        if len(order) != dim:
            raise OptionError(f"order must be a permutation of 0 to {dim - 1}, got {list(order)}")
        self.permutation = Permutation(order)
        # It holds L below its diagonal, U above it, and the a_i on it.
        self.matrix = nn.Parameter(torch.zeros(dim, dim))
        self.net = MLP(context_dim, dim * dim, hidden_dims=(64,)) if context_dim else None

    def _raw(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the matrix that holds both factors, and the diagonal of U."""
        raw = self.matrix
        if self.net is not None:
            # D x D outputs of order one would make triangular factors whose inverses grow like 2^D.
            raw = raw + self.net(context).unflatten(-1, raw.shape) / math.sqrt(self.dim)
        return raw, positive_diagonal(raw)

    def factors(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return L, U and the diagonal of U, at a context ``(..., context_dim)`` if the layer takes one."""
        return lu_factors(self._raw(context)[0])

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self._forward(z, *self._raw(context))

    def _forward(self, z: Tensor, raw: Tensor, scale: Tensor) -> Pair:
        y = multiply(raw.triu(1), z) + scale * z
        x, _ = self.permutation._forward_and_ladj(multiply(raw.tril(-1), y) + y, None)
        return x, scale.log().sum(-1).expand(z.shape[:-1])

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        raw, scale = self._raw(context)
        y, _ = self.permutation._inverse_and_ladj(x, None)
        # Solves read one triangle each, so that L need not be copied.
        z = solve(with_diagonal(raw, scale), solve(raw, y, upper=False, is_unit=True), upper=True)
        return z, -scale.log().sum(-1).expand(x.shape[:-1])

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        raw, scale = self._raw(context)
        with torch.no_grad():
            y = solve(with_diagonal(raw, scale).mT, score, upper=False)
            score, _ = self.permutation._forward_and_ladj(solve(raw.mT, y, upper=True, is_unit=True), None)
        return *self._forward(z, raw, scale), score


def lu_factors(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return L, U and the diagonal of U from matrices ``(..., D, D)``; L = U = I where they are zero.

    They hold L below the diagonal, U above it, and on it what becomes the positive diagonal of U.
    """
    scale = positive_diagonal(raw)
    return with_diagonal(raw.tril(), torch.ones_like(scale)), with_diagonal(raw.triu(), scale), scale
