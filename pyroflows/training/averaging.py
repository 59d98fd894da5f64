"""Average parameters over the steps of a fit."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class MovingAverage:
    r"""This is the exponential moving average of tensors over the steps of a fit,

    .. math:: \bar\theta_k = d_k \bar\theta_{k-1} + (1 - d_k)\, \theta_k,
        \qquad d_k = \min\Big(d, \frac{k}{k + 9}\Big),

    which removes most of the noise that the gradients of single batches leave in the tensors. The decay :math:`d_k`
    grows with the number of steps, so that the average never looks back further than about a tenth of the fit.

    Args:
        tensors: the tensors; the average starts at their present values.
        decay: the decay d, from 0 for the last values alone up to 1.

    Attributes:
        values: the averages.

    Example:
        >>> x = torch.zeros(2)
        >>> average = MovingAverage([x], decay=0.9)
        >>> x += 1
        >>> average.update()
        >>> with average.in_place():
        ...     print(x)
        tensor([0.9000, 0.9000])
        >>> x
        tensor([1., 1.])
    """

    def __init__(self, tensors: Iterable[Tensor], decay: float) -> None:
        self._tensors = list(tensors)
        self._decay = decay
        self._num_steps = 0
        self.values = [tensor.detach().clone() for tensor in self._tensors]

    @torch.no_grad()
    def update(self) -> None:
        """Take the present values into the average."""
        self._num_steps += 1
        decay = min(self._decay, self._num_steps / (self._num_steps + 9))
        torch._foreach_lerp_(self.values, [tensor.detach() for tensor in self._tensors], 1 - decay)

    @torch.no_grad()
    def put_in(self) -> None:
        """Give the tensors the values of the average."""
        torch._foreach_copy_([tensor.detach() for tensor in self._tensors], self.values)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the tensors the values of the average inside a ``with`` block, and their own again after it."""
        own = [tensor.detach().clone() for tensor in self._tensors]
        try:
            self.put_in()
            yield
        finally:
            torch._foreach_copy_([tensor.detach() for tensor in self._tensors], own)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, and the number of values in them."""
        return {"values": list(self.values), "num_steps": self._num_steps}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` returned."""
        torch._foreach_copy_(self.values, list(state["values"]))
        self._num_steps = state["num_steps"]
