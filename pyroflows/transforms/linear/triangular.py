"""Affine layers with a triangular matrix."""

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.transforms.base import Pair, Triple
from pyroflows.transforms.linear.matrix_parameters import MatrixParameters
from pyroflows.transforms.linear.positive_diagonal import positive_diagonal
from pyroflows.transforms.linear.products import multiply
from pyroflows.transforms.linear.solves import solve
from pyroflows.transforms.triangular.base import TriangularTransform


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
        self.matrix_of = MatrixParameters(torch.zeros(dim, dim + 1), context_dim)

    def _learned(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return b, T and log |det S T|."""
        raw = self.matrix_of(context)
        shift, raw = raw[..., -1], raw[..., :-1]
        scale = positive_diagonal(raw)
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
        y = shift + multiply(factor, z)
        return self.loc + multiply(self.scale_tril, y), ladj.expand(z.shape[:-1])

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        shift, factor, ladj = self._learned(context)
        y = solve(self.scale_tril, x - self.loc, upper=False)
        return solve(factor, y - shift, upper=False), -ladj.expand(x.shape[:-1])

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        shift, factor, ladj = self._learned(context)
        with torch.no_grad():
            score = solve(self.scale_tril.mT, solve(factor.mT, score, upper=True), upper=True)
        return *self._forward(z, shift, factor, ladj), score
