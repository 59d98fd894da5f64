"""Values of tensors that are kept, to be put back where training has made them worse."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Snapshot:
    """A copy of the values of tensors, at first of those that they have now.

    Args:
        tensors: the tensors, such as the parameters and buffers of a flow.

    Attributes:
        values: the copies.

    Example:
        >>> x = torch.zeros(2)
        >>> start = Snapshot([x])
        >>> x += 1
        >>> start.put_back()
        >>> x
        tensor([0., 0.])
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self.take()

    def take(self) -> None:
        """Copy the values that the tensors have now."""
        self.values = [tensor.detach().clone() for tensor in self._tensors]

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the tensors the values that were copied last."""
        for tensor, value in zip(self._tensors, self.values, strict=True):
            tensor.copy_(value)

    def load(self, values: Sequence[Tensor]) -> None:
        """Keep these values instead."""
        self.values = [value.to(tensor, copy=True) for tensor, value in zip(self._tensors, values, strict=True)]
