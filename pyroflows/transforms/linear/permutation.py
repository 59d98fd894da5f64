"""Permutations of the dimensions of a vector."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.transforms.base import FlowTransform, Pair, Triple


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
