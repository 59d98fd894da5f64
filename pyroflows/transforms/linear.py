"""Linear layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.transforms.base import FlowTransform, Pair


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
        return z[..., self.order], z.new_zeros(z.shape[:-1])

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return x[..., self.inverse_order], x.new_zeros(x.shape[:-1])
