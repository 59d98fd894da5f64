"""Linear layers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.errors import OptionError
from pyroflows.nets import MLP
from pyroflows.transforms.base import FlowTransform, Pair, Triple

MIN_SCALE = 1e-3
_SHIFT = math.log(math.expm1(1 - MIN_SCALE))


class Permutation(FlowTransform):
    """``x[i] = z[order[i]]``; the log-determinant is zero. Both directions are parallel.

    Args:
        order: a permutation of ``range(dim)``.

    Raises:
        OptionError: if ``order`` is no permutation.

    Example:
        >>> Permutation([2, 0, 1])(torch.tensor([10.0, 11.0, 12.0]))
        tensor([12., 10., 11.])
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(self, order: Sequence[int]) -> None:
        indices = torch.as_tensor(order)
        if sorted(indices.tolist()) != list(range(len(indices))):
            raise OptionError(f"order must be a permutation of 0 to {len(indices) - 1}, got {indices.tolist()}")
        super().__init__(len(indices))
        self.register_buffer("order", indices)
        self.register_buffer("inverse_order", indices.argsort())

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return z.index_select(-1, self.order), z.new_zeros(z.shape[:-1])

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return x.index_select(-1, self.inverse_order), x.new_zeros(x.shape[:-1])

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        return *self._forward_and_ladj(z, context), score.index_select(-1, self.order)


class LU(FlowTransform):
    r""":math:`x = P L U z`, a linear map by its factors (Kingma and Dhariwal 2018, arXiv:1807.03039, eq. 10).

    P is a fixed permutation, L unit lower triangular and U upper triangular with the diagonal
    :math:`u_{ii} = \epsilon + \mathrm{softplus}(a_i) > 0`, :math:`\epsilon = 10^{-3}`, so that the map stays invertible
    whatever its parameters are; it starts at L = U = I. The log-determinant, :math:`\sum_i \log u_{ii}`, costs O(D).
    Both directions are parallel: a product with each of the two factors, or a triangular solve.

    Args:
        dim: the event size D.
        order: P as a permutation of ``range(dim)``, ``(P y)[i] = y[order[i]]``; ascending, P = I, by default.
        context_dim: size of the context that L and U depend on.

    Shapes: z and x are ``(..., dim)``, a context is ``(..., context_dim)``.

    Raises:
        OptionError: if ``order`` is no permutation of ``range(dim)``.

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
        # L below its diagonal, and U above and, through softplus, on it.
        self.matrix = nn.Parameter(torch.zeros(dim, dim))
        self.net = MLP(context_dim, dim * dim, hidden_dims=(64,)) if context_dim else None

    def _factors(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """L, U, and the diagonal of U."""
        raw = self.matrix
        if self.net is not None:
            # D x D outputs of order one would make triangular factors whose inverses grow like 2^D.
            raw = raw + self.net(context).unflatten(-1, raw.shape) / math.sqrt(self.dim)
        scale = MIN_SCALE + F.softplus(raw.diagonal(dim1=-2, dim2=-1) + _SHIFT)
        lower = raw.tril(-1) + torch.eye(self.dim, dtype=raw.dtype, device=raw.device)
        return lower, raw.triu(1) + torch.diag_embed(scale), scale

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self._forward(z, *self._factors(context))

    def _forward(self, z: Tensor, lower: Tensor, upper: Tensor, scale: Tensor) -> Pair:
        rows = z[..., None, :] @ upper.mT @ lower.mT
        x, _ = self.permutation._forward_and_ladj(rows.squeeze(-2), None)
        return x, scale.log().sum(-1).expand(z.shape[:-1])

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        lower, upper, scale = self._factors(context)
        y, _ = self.permutation._inverse_and_ladj(x, None)
        z = _solve(upper, _solve(lower, y, upper=False), upper=True)
        return z, -scale.log().sum(-1).expand(x.shape[:-1])

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        lower, upper, scale = self._factors(context)
        with torch.no_grad():
            y = _solve(lower.mT, _solve(upper.mT, score, upper=False), upper=True)
            score, _ = self.permutation._forward_and_ladj(y, None)
        return *self._forward(z, lower, upper, scale), score


def _solve(matrix: Tensor, y: Tensor, upper: bool) -> Tensor:
    """The z with ``matrix z = y`` for a triangular matrix."""
    # One matrix for all: rows of one right-hand side, since a batch of solves would copy the matrix.
    rows = y.reshape(-1, y.shape[-1]) if matrix.dim() == 2 else y[..., None, :]
    # There is no triangular solve in half precision.
    dtype = torch.promote_types(y.dtype, torch.float32)
    solved = torch.linalg.solve_triangular(matrix.mT.to(dtype), rows.to(dtype), upper=not upper, left=False)
    return solved.reshape(y.shape).to(y.dtype)
