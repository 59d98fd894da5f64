"""Linear layers: permutations, LU factors, and a triangular matrix with a shift."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.errors import OptionError
from pyroflows.nets import MLP
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.triangular.base import TriangularTransform

MIN_SCALE = 1e-3
_SHIFT = math.log(math.expm1(1 - MIN_SCALE))


class Permutation(FlowTransform):
    r"""The permutation :math:`x_i = z_{\mathrm{order}_i}` of the dimensions of a vector.

    It has no parameters, and its log-determinant is zero. Both directions are parallel.

    Args:
        order: a permutation of ``range(dim)``; ``order[i]`` is the dimension of z that becomes dimension i of x.

    Shapes: z and x are ``(..., dim)``.

    Raises:
        OptionError: if ``order`` is not a permutation.

    Example:
        >>> Permutation([2, 0, 1])(torch.tensor([10.0, 11.0, 12.0]))
        tensor([12., 10., 11.])
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(self, order: Sequence[int]) -> None:
        indices = torch.as_tensor(order)
        if indices.dim() != 1:
            raise OptionError(f"order must be a sequence of the indices 0 to D - 1, got {order!r}")
        if sorted(indices.tolist()) != list(range(len(indices))):
            raise OptionError(f"order must be a permutation of 0 to {len(indices) - 1}, got {indices.tolist()}")
        super().__init__(len(indices))
        # The list stays what the constructor got, whatever state is loaded, so that a state of another order is seen.
        self.permutation: list[int] = indices.tolist()
        self.register_buffer("order", indices)
        self.register_buffer("inverse_order", indices.argsort())

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return z.index_select(-1, self.order), z.new_zeros(z.shape[:-1])

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return x.index_select(-1, self.inverse_order), x.new_zeros(x.shape[:-1])

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        return *self._forward_and_ladj(z, context), score.index_select(-1, self.order)


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

    def _factors(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return L, U and the diagonal of U."""
        raw = self.matrix
        if self.net is not None:
            # D x D outputs of order one would make triangular factors whose inverses grow like 2^D.
            raw = raw + self.net(context).unflatten(-1, raw.shape) / math.sqrt(self.dim)
        scale = _positive_diagonal(raw)
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


class Triangular(TriangularTransform):
    r"""The affine map :math:`x = \mu + S (b + T z)`, where a lower triangular T and a shift b are learned.

    The location :math:`\mu` and the factor S are fixed. The diagonal of T is
    :math:`\epsilon + \mathrm{softplus}(a_i) > 0`, :math:`\epsilon = 10^{-3}`; T starts at I and b at 0. If S is the
    Cholesky factor of a covariance, T and b are learned in the coordinates that this covariance whitens, whatever the
    scales of x are. The log-determinant is :math:`\sum_i (\log s_{ii} + \log t_{ii})`. Both directions are parallel:
    the forward one multiplies by T and S, the inverse solves two triangular systems.

    Args:
        dim: the event size D.
        context_dim: size of the context that b and T depend on, 0 for none.
        loc: :math:`\mu`, ``(dim,)``; None for zero.
        scale_tril: S, lower triangular ``(dim, dim)`` with a positive diagonal; None for the identity.

    Shapes: z and x are ``(..., dim)``, a context is ``(..., context_dim)``.

    Raises:
        OptionError: if ``loc`` or ``scale_tril`` has another size, or ``scale_tril`` is not lower triangular with a
            positive diagonal.

    Example:
        >>> t = Triangular(2, loc=torch.tensor([1.0, 0.0]), scale_tril=torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        >>> t(torch.tensor([1.0, 0.0])).round(decimals=4).tolist()
        [3.0, 1.0]
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(
        self, dim: int, context_dim: int = 0, loc: Tensor | None = None, scale_tril: Tensor | None = None
    ) -> None:
        super().__init__(dim, context_dim)
        loc = torch.zeros(dim) if loc is None else loc
        scale_tril = torch.eye(dim) if scale_tril is None else scale_tril
        if loc.shape != (dim,) or scale_tril.shape != (dim, dim):
            raise OptionError(
                f"loc and scale_tril must have shapes ({dim},) and ({dim}, {dim}), got {tuple(loc.shape)} and "
                f"{tuple(scale_tril.shape)}"
            )
        if not (scale_tril.tril().equal(scale_tril) and (scale_tril.diagonal() > 0).all()):
            raise OptionError("scale_tril must be lower triangular with a positive diagonal")
        self.register_buffer("loc", loc.detach().clone())
        self.register_buffer("scale_tril", scale_tril.detach().clone())
        # It holds T with the a_i on its diagonal, and b in the last column.
        self.matrix = nn.Parameter(torch.zeros(dim, dim + 1))
        self.net = MLP(context_dim, dim * (dim + 1), hidden_dims=(64,)) if context_dim else None

    def _learned(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return b, T and log |det S T|."""
        raw: Tensor = self.matrix
        if self.net is not None:
            raw = raw + self.net(context).unflatten(-1, raw.shape) / math.sqrt(self.dim)
        shift, raw = raw[..., -1], raw[..., :-1]
        scale = _positive_diagonal(raw)
        ladj = scale.log().sum(-1) + self.scale_tril.diagonal().log().sum()
        return shift, raw.tril(-1) + torch.diag_embed(scale), ladj

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self._forward(z, *self._learned(context))

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        return self._forward_and_ladj(z, context)[0], self._log_slopes(context).expand_as(z)

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        return self._inverse_and_ladj(x, context)[0], -self._log_slopes(context).expand_as(x)

    def _log_slopes(self, context: Tensor | None) -> Tensor:
        _, factor, _ = self._learned(context)
        return factor.diagonal(dim1=-2, dim2=-1).log() + self.scale_tril.diagonal().log()

    @property
    def triangular_order(self) -> tuple[int, ...]:
        return tuple(range(self.dim))

    @property
    def is_affine(self) -> bool:
        return True

    def _forward(self, z: Tensor, shift: Tensor, factor: Tensor, ladj: Tensor) -> Pair:
        y = shift + (z @ factor.mT if factor.dim() == 2 else (z[..., None, :] @ factor.mT).squeeze(-2))
        return self.loc + y @ self.scale_tril.mT, ladj.expand(z.shape[:-1])

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        shift, factor, ladj = self._learned(context)
        y = _solve(self.scale_tril, x - self.loc, upper=False)
        return _solve(factor, y - shift, upper=False), -ladj.expand(x.shape[:-1])

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        shift, factor, ladj = self._learned(context)
        with torch.no_grad():
            score = _solve(self.scale_tril.mT, _solve(factor.mT, score, upper=True), upper=True)
        return *self._forward(z, shift, factor, ladj), score


def _positive_diagonal(raw: Tensor) -> Tensor:
    """Return the diagonal of a factor, which is positive, and one where the raw matrix is zero."""
    return MIN_SCALE + F.softplus(raw.diagonal(dim1=-2, dim2=-1) + _SHIFT)


def _solve(matrix: Tensor, y: Tensor, upper: bool) -> Tensor:
    """Return the z with ``matrix z = y`` for a triangular matrix."""
    # If all rows share one matrix they form one right-hand side, since a batch of solves would copy the matrix.
    rows = y.reshape(-1, y.shape[-1]) if matrix.dim() == 2 else y[..., None, :]
    # There is no triangular solve in half precision.
    dtype = torch.promote_types(y.dtype, torch.float32)
    solved = torch.linalg.solve_triangular(matrix.mT.to(dtype), rows.to(dtype), upper=not upper, left=False)
    return solved.reshape(y.shape).to(y.dtype)
