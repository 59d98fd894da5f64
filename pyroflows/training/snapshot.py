"""Keep copies of the values of tensors, to put them back if training has made the values worse."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Snapshot:
    """A snapshot keeps copies of the values of tensors, at first of their present values.

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
        """Copy the present values of the tensors."""
        self.values = [tensor.detach().clone() for tensor in self._tensors]

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the tensors the values that were copied last."""
        for tensor, value in zip(self._tensors, self.values, strict=True):
            tensor.copy_(value)

    def load(self, values: Sequence[Tensor]) -> None:
        """Replace the kept values.

        Args:
            values: one tensor for each of the snapshot's tensors, of the same shape.
        """
        self.values = [value.to(tensor, copy=True) for tensor, value in zip(self._tensors, values, strict=True)]
