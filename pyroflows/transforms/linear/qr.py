"""QR layers: a rotation and a triangular factor."""

import torch
from torch import Tensor

from pyroflows.nets import Parameters
from pyroflows.options import checked_int
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.linear.matrix_parameters import MatrixParameters
from pyroflows.transforms.linear.orthogonal import checked_reflections
from pyroflows.transforms.linear.positive_diagonal import positive_diagonal
from pyroflows.transforms.linear.products import multiply
from pyroflows.transforms.linear.reflections import Reflections, paired_directions, reflections
from pyroflows.transforms.linear.solves import solve


class QR(FlowTransform):
    r"""The linear map :math:`x = Q R z`, parametrised by its factors (Hoogeboom et al. 2019, arXiv:1901.11137, section
    3.3).

    Q is a product of K Householder reflections, as in :class:`pyroflows.transforms.Orthogonal`, and
    :math:`R = N \operatorname{diag}(r)`, where N is unit upper triangular and
    :math:`r_i = \epsilon + \mathrm{softplus}(a_i) > 0`, :math:`\epsilon = 10^{-3}`, so that the map stays invertible
    whatever its parameters are; it starts at the identity. With as many reflections as can be any rotation it is any
    matrix with a positive determinant, and needs no permutation, unlike :class:`pyroflows.transforms.LU`. The
    log-determinant, :math:`\sum_i \log r_i`, costs O(D). Both directions are parallel: the inverse multiplies by
    :math:`Q^\top` and solves a triangular system.

    Args:
        dim: the event size D.
        num_reflections: K, an even number; None for as many as can be any rotation, but at most 64.
        context_dim: size of the context that Q and R depend on, 0 for none.

    Shapes: z and x are ``(..., dim)``, a context is ``(..., context_dim)``.

    Raises:
        OptionError: if the number of reflections is odd.

    Example:
        >>> t = QR(3)
        >>> z = torch.randn(5, 3)
        >>> torch.allclose(t.inv(t(z)), z, atol=1e-5)
        True
    """

    def __init__(self, dim: int, num_reflections: int | None = None, context_dim: int = 0) -> None:
        super().__init__(checked_int("dim", dim), context_dim)
        directions = paired_directions(checked_reflections(num_reflections, dim), dim)
        self.directions_of = Parameters(directions, context_dim)
        # It holds N above its diagonal, and the a_i on it.
        self.triangle_of = MatrixParameters(torch.zeros(dim, dim), context_dim)

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        raw = self.triangle_of(context)
        return self._forward(z, raw, reflections(self.directions_of(context)))

    def _forward(self, z: Tensor, raw: Tensor, q: Reflections) -> Pair:
        scale = positive_diagonal(raw)
        y = scale * z
        return q.times(multiply(raw.triu(1), y) + y), scale.log().sum(-1).expand(z.shape[:-1])

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        raw = self.triangle_of(context)
        scale = positive_diagonal(raw)
        y = reflections(self.directions_of(context)).transpose_times(x)
        # A solve reads one triangle without its diagonal, so that N need not be copied.
        return solve(raw, y, upper=True, is_unit=True) / scale, -scale.log().sum(-1).expand(x.shape[:-1])

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        raw = self.triangle_of(context)
        q = reflections(self.directions_of(context))
        with torch.no_grad():  # J^-T = Q N^-T diag(1/r)
            score = q.times(solve(raw.mT, score / positive_diagonal(raw), upper=False, is_unit=True))
        return *self._forward(z, raw, q), score

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_reflections={len(self.directions_of.value)}"
