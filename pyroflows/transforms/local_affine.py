"""Affine maps of rows, whose locations and scales depend on what the rows share."""

import math

import torch
from torch import Tensor, nn

from pyroflows.nets import MLP
from pyroflows.transforms.linear.positive_diagonal import positive_diagonal
from pyroflows.transforms.linear.solves import solve
from pyroflows.transforms.tables import rows_at
from pyroflows.transforms.univariate.clamp import soft_clamped

# Where h is far out, scales would overflow.
MAX_LOG_SCALE = 5.0


class LocalAffine(nn.Module):
    r"""An affine map for each row r, which depends on elements h that rows share.

    .. math:: x_r = \mu_r + C_r h + m_r(h) + S_r \big(a_r + A_r h + M_r(h) T_r y_r\big), \qquad
        M_r(h) = \mathrm{diag}\big(e^{s_r(h) + B_r h}\big) + L_r(h)

    m, s and the strictly lower triangle L are linear in functions of the first elements of h, see :func:`curved`, with
    coefficients Q. These, :math:`\mu`, C and S are fixed, such as location, regression and scale of a Gaussian close to
    the target. a, A, B and the lower triangular T are learned, and start at 0, 0, 0 and I. They stand in a table with
    one entry for each row, or are computed from features of the row, or are the sum of both; without table and features
    they stay as they start. The log-scale s is softly clamped to :math:`c \tanh(s / c)` with c = 5.

    Args:
        dim: d, the number of elements of a row.
        given_dim: p, the number of elements h.
        num_rows: the number N of rows in the table; None for no table.
        features_dim: the number of features of a row; 0 for none.
        hidden_dims: the widths of the hidden layers of the network that reads the features.
        loc: :math:`\mu`, ``(N or 1, d)``; None for zero.
        regression: C for all but the first g elements of h, ``(N or 1, d, p - g)``; None for zero.
        scale_tril: S, lower triangular ``(N or 1, d, d)``; None for the identity.
        curves: Q, the coefficients of m, s and the rows of L, ``(N or 1, 2 d + d (d - 1) / 2, q)``; None for zero.
        num_curved: g, the number of elements of h with q functions, which are the same for all rows.

    Shapes: y and x are ``(..., R, d)``, h is ``(..., R or 1, p)``, ids are ``(R,)``, features ``(R, F)``.

    Example:
        >>> affine = LocalAffine(1, given_dim=1, loc=torch.tensor([[5.0], [7.0]]), regression=torch.ones(2, 1, 1))
        >>> y, h, ids = torch.tensor([[1.0], [-1.0]]), torch.tensor([[0.5]]), torch.arange(2)
        >>> x, ladj = affine.forward_and_ladj(y, h, ids)
        >>> x, ladj
        (tensor([[6.5000],
                [6.5000]]), tensor([0., 0.]))
    """

    loc: Tensor
    regression: Tensor | None
    scale_tril: Tensor
    curves: Tensor | None

    def __init__(
        self,
        dim: int,
        given_dim: int,
        num_rows: int | None = None,
        features_dim: int = 0,
        hidden_dims: tuple[int, ...] = (64, 64),
        loc: Tensor | None = None,
        regression: Tensor | None = None,
        scale_tril: Tensor | None = None,
        curves: Tensor | None = None,
        num_curved: int = 0,
    ) -> None:
        super().__init__()
        self.dim, self.given_dim, self.num_curved = dim, given_dim, num_curved
        self._sizes = [dim, dim * given_dim, dim * given_dim, dim * dim]
        self.register_buffer("loc", torch.zeros(1, dim) if loc is None else loc.clone())
        self.register_buffer("regression", None if regression is None else regression.clone())
        self.register_buffer("curves", None if curves is None else curves.clone())
        self.register_buffer("scale_tril", torch.eye(dim)[None] if scale_tril is None else scale_tril.clone())
        total = sum(self._sizes)
        self.table = None if num_rows is None else nn.Parameter(torch.zeros(num_rows, total))
        self.net = MLP(features_dim, total, hidden_dims) if features_dim else None

    def forward_and_ladj(
        self, y: Tensor, h: Tensor, ids: Tensor, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return x, and the log-determinant of each row, ``(..., R)``.

        Args:
            y: values of the rows.
            h: the elements on which they depend.
            ids: the index of each row in the table and in what is fixed.
            features: what is known of each row; None if nothing is.
        """
        loc, matrix, ladj, shift, factor = self._of_rows(h, ids, features)
        v = _times(matrix, y if factor is None else _times(factor, y))
        x = loc + _multiply(_at(self.scale_tril, ids), v if shift is None else shift + v)
        return x, ladj.expand(x.shape[:-1])

    def inverse_and_ladj(
        self, x: Tensor, h: Tensor, ids: Tensor, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return y, and the log-determinant of each row, ``(..., R)``; the arguments are those of the other direction.

        Args:
            x: values of the rows.
            h: the elements on which they depend.
            ids: the index of each row in the table and in what is fixed.
            features: what is known of each row; None if nothing is.
        """
        loc, matrix, ladj, shift, factor = self._of_rows(h, ids, features)
        v = _solve(_at(self.scale_tril, ids), x - loc)
        y = _solve(matrix, v if shift is None else v - shift)
        y = y if factor is None else _solve(factor, y)
        return y, -ladj.expand(y.shape[:-1])

    def score(self, score: Tensor, h: Tensor, ids: Tensor, features: Tensor | None = None) -> Tensor:
        """Return the score of the law of x, given that of the law of y, ``(..., R, d)``.

        Args:
            score: the gradient of the log-density of y.
            h: the elements on which the rows depend.
            ids: the index of each row in the table and in what is fixed.
            features: what is known of each row; None if nothing is.
        """
        _, matrix, _, _, factor = self._of_rows(h, ids, features)
        score = score if factor is None else _solve_transposed(factor, score)
        return _solve_transposed(_at(self.scale_tril, ids), _solve_transposed(matrix, score))

    def _of_rows(
        self, h: Tensor, ids: Tensor, features: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return locations, M and log-determinants of rows; shifts and T too where these are learned."""
        loc = _at(self.loc, ids)
        fixed = _at(self.scale_tril, ids).diagonal(dim1=-2, dim2=-1)
        log_scale, lower = torch.zeros_like(fixed), None
        if self.curves is not None:
            functions = curved(h[..., :1, : self.num_curved], self.curves.shape[-1])
            coefficients = _multiply(_at(self.curves, ids), functions)
            moved, log_scale, lower = coefficients.tensor_split((self.dim, 2 * self.dim), -1)
            loc = loc + moved
        if self.regression is not None:
            loc = loc + _multiply(_at(self.regression, ids), h[..., self.num_curved :])
        raw = self._learned(ids, features)
        if raw is None:
            log_scale = _bounded(log_scale)
            return loc, _lower_triangular(log_scale.exp(), lower), (log_scale + fixed.log()).sum(-1), None, None
        a, of_shift, of_scale, factor = raw.split(self._sizes, -1)
        shape = (*raw.shape[:-1], self.dim, self.given_dim)
        log_scale = _bounded(log_scale + _multiply(of_scale.reshape(shape), h))
        factor = factor.unflatten(-1, (self.dim, self.dim))
        diagonal = positive_diagonal(factor)
        ladj = (log_scale + diagonal.log() + fixed.log()).sum(-1)
        shift = a + _multiply(of_shift.reshape(shape), h)
        factor = factor.tril(-1) + torch.diag_embed(diagonal)
        return loc, _lower_triangular(log_scale.exp(), lower), ladj, shift, factor

    def _learned(self, ids: Tensor, features: Tensor | None) -> Tensor | None:
        """Return a, A, B and T of each row in one tensor; None where nothing is learned."""
        parts = []
        if self.table is not None:
            parts.append(rows_at(self.table, ids))
        if self.net is not None:
            parts.append(self.net(features))
        return sum(parts[1:], parts[0]) if parts else None


def num_curves(dim: int, degree: int) -> int:
    """The number of functions that :func:`curved` gives of so many elements with products of a degree, 1, 2 or 3."""
    num_pairs, num_cubic = math.comb(dim, 2), math.comb(dim + 2, 3)
    return 1 + 2 * dim + (0 if degree < 2 else num_pairs) + (dim if degree < 3 else num_cubic)


def curved(h: Tensor, num: int) -> Tensor:
    r"""Functions of elements ``(..., g)`` in which the laws of rows are linear.

    They are 1, :math:`h_j`, :math:`\sqrt{1 + h_j^2}` and products of :math:`t = h / \sqrt{1 + h^2 / 16}`, so that none
    grows faster than h far out: :math:`t_j^3`; with degree 2 also :math:`t_i t_j` for i < j; and with degree 3 all of
    the third degree.

    Args:
        h: the elements.
        num: the number of functions, :func:`num_curves` of some degree.

    Example:
        >>> curved(torch.tensor([0.0, 3.0]), num_curves(2, degree=2))
        tensor([ 1.0000,  0.0000,  3.0000,  1.0000,  3.1623,  0.0000,  0.0000, 13.8240])
    """
    dim = h.shape[-1]
    t = h * (1 + h.square() / 16).rsqrt()
    parts = [torch.ones_like(h[..., :1]), h, (1 + h.square()).sqrt()]
    index = torch.arange(dim, device=h.device)
    if num > num_curves(dim, degree=1):
        first, second = torch.combinations(index, 2).unbind(-1)
        parts.append(t[..., first] * t[..., second])
    if num == num_curves(dim, degree=3):
        cubic = torch.combinations(index, 3, with_replacement=True)
    else:
        cubic = index[:, None].expand(dim, 3)
    first, second, third = cubic.unbind(-1)
    parts.append(t[..., first] * t[..., second] * t[..., third])
    return torch.cat(parts, -1)


def _lower_triangular(diagonal: Tensor, below: Tensor | None) -> Tensor:
    """Make matrices ``(..., d, d)`` of their diagonals and of the rows below these, ``(..., d (d - 1) / 2)``."""
    dim = diagonal.shape[-1]
    if below is None or dim == 1:
        return torch.diag_embed(diagonal)
    index = torch.full((dim, dim), below.shape[-1], device=below.device)
    index[*torch.tril_indices(dim, dim, -1)] = torch.arange(below.shape[-1], device=below.device)
    return torch.diag_embed(diagonal) + nn.functional.pad(below, (0, 1))[..., index]


def _bounded(log_scale: Tensor) -> Tensor:
    return soft_clamped(log_scale, (MAX_LOG_SCALE, MAX_LOG_SCALE))


def _at(table: Tensor, ids: Tensor) -> Tensor:
    return table if len(table) == 1 else table[ids]


def _multiply(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Products of matrices ``(R, n, m)`` and vectors ``(..., R or 1, m)``, ``(..., R, n)``."""
    if vectors.shape[-2] == 1:  # one vector for all rows, hence one product of matrices
        flat = vectors[..., 0, :] @ matrices.flatten(0, 1).mT
        return flat.unflatten(-1, matrices.shape[:2])
    return _times(matrices, vectors)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Products of matrices ``(..., R, n, m)`` and vectors ``(..., R, m)``."""
    return (matrices @ vectors[..., None])[..., 0] if matrices.shape[-1] > 1 else matrices[..., 0] * vectors


def _solve(matrices: Tensor, vectors: Tensor) -> Tensor:
    if matrices.shape[-1] == 1:
        return vectors / matrices[..., 0]
    if len(matrices) == 1:
        return solve(matrices[0], vectors, upper=False)
    return solve(matrices.expand(*vectors.shape, matrices.shape[-1]), vectors, upper=False)


def _solve_transposed(matrices: Tensor, vectors: Tensor) -> Tensor:
    if matrices.shape[-1] == 1:
        return vectors / matrices[..., 0]
    return solve(matrices.mT.expand(*vectors.shape, matrices.shape[-1]), vectors, upper=True)
