"""Invertible 1 x 1 convolutions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.image.shape import image_shape
from pyroflows.transforms.linear.lu import LU, lu_inverse
from pyroflows.transforms.linear.positive_diagonal import MIN_SCALE, positive_diagonal, raw_diagonal
from pyroflows.transforms.univariate.layout import memory_order, restored


class Conv1x1(FlowTransform):
    r"""The linear map of the channels at each place, :math:`z_{ij} = P L U x_{ij}`, an invertible 1 x 1 convolution
    (Kingma and Dhariwal 2018, arXiv:1807.03039, eq. 10).

    P is a fixed permutation, L unit lower triangular and U upper triangular with the positive diagonal u, as in
    :class:`pyroflows.transforms.LU`, whose inverse this layer is at each place. The log-determinant from base to data
    is :math:`-H W \sum_c \log u_c`. Both directions are one 1 x 1 convolution. The matrix of that from base to data,
    :math:`U^{-1} L^{-1} P^\top`, comes from two triangular solves, which cost the same for any number of places.

    Args:
        shape: the shape (C, H, W) of an image.
        order: P as a permutation of ``range(C)``, ``(P y)[c] = y[order[c]]``; None for P = I.
        context_dim: size of the context that L and U depend on, 0 for none.

    Shapes: z and x are ``(..., C, H, W)``, a context is ``(..., context_dim)``.

    Raises:
        OptionError: if the shape is not that of an image, or ``order`` is not a permutation of ``range(C)``.

    Example:
        >>> t = Conv1x1((3, 4, 2), order=[2, 0, 1])
        >>> x = torch.randn(5, 3, 4, 2)
        >>> torch.allclose(t.inv(x), x[:, [2, 0, 1]], atol=1e-5), torch.allclose(t(t.inv(x)), x, atol=1e-5)
        (True, True)
    """

    def __init__(self, shape: Sequence[int], order: Sequence[int] | None = None, context_dim: int = 0) -> None:
        super().__init__(image_shape(shape, "Conv1x1"), context_dim)
        self.lu = LU(self.event_shape[0], order, context_dim)

    @classmethod
    def starting_at(cls, matrix: Tensor, shape: Sequence[int], context_dim: int = 0) -> "Conv1x1":
        """Return a layer that starts at a matrix, up to the signs of the matrix's rows.

        A positive diagonal of U leaves the signs no choice; the order P is that of the matrix's own decomposition.

        Args:
            matrix: an invertible matrix ``(C, C)`` of ordinary scale, such as an orthogonal one.
            shape: the shape (C, H, W) of an image.
            context_dim: size of the context, 0 for none.

        Example:
            >>> rotation, _ = torch.linalg.qr(torch.randn(3, 3))
            >>> t, x = Conv1x1.starting_at(rotation, (3, 4, 2)), torch.randn(3, 4, 2)
            >>> torch.allclose(t.inv(x).flatten(1).abs(), (rotation @ x.flatten(1)).abs(), atol=1e-4)
            True
        """
        permutation, lower, upper = torch.linalg.lu(matrix.double())
        signs = upper.diagonal().sign()
        lower, upper = signs[:, None] * lower * signs, signs[:, None] * upper
        layer = cls(shape, permutation.argmax(1).tolist(), context_dim)
        diagonal = raw_diagonal(upper.diagonal().clamp(min=2 * MIN_SCALE))
        with torch.no_grad():
            layer.lu.matrix_of.value.copy_(lower.tril(-1) + (upper / upper.diagonal()).triu(1) + torch.diag(diagonal))
        return layer

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        matrix, scale = self.inverse_matrix(context)
        return _product(matrix, z), self._ladj(z, scale)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        matrix, scale = self._matrix(context)
        return _product(matrix, x), -self._ladj(x, scale)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        with torch.no_grad():
            score = _product(self._matrix(context)[0].mT, score)
        return *self._forward_and_ladj(z, context), score

    def _matrix(self, context: Tensor | None) -> Pair:
        lower, upper, scale = self.lu.factors(context)
        return (lower @ upper).index_select(-2, self.lu.permutation.order), scale

    def inverse_matrix(self, context: Tensor | None) -> Pair:
        """Return the matrix from base to data, and u."""
        raw = self.lu.matrix_of(context)
        scale = positive_diagonal(raw)
        return lu_inverse(raw, scale).index_select(-1, self.lu.permutation.order), scale

    def _ladj(self, z: Tensor, scale: Tensor) -> Tensor:
        num_places = self.event_shape[1:].numel()
        return (-num_places * scale.log().sum(-1)).expand(z.shape[:-3])


def _product(matrix: Tensor, value: Tensor) -> Tensor:
    """Return the product of a matrix ``(..., C, C)`` and the channels at each place of ``(..., C, H, W)``."""
    order = memory_order(value, value.dim())
    if matrix.dim() == 2 and order[0] == value.dim() - 3:
        # Where channels come first in memory, one product does.
        columns = value.permute(order)
        return restored((matrix @ columns.flatten(1)).view_as(columns), order)
    return torch.einsum("...ij,...jhw->...ihw", matrix, value)
