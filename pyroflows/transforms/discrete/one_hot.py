"""The layer that writes categories as one-hot vectors."""

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.compiling.eager import runs_in_python
from pyroflows.errors import DataError
from pyroflows.options import checked_int
from pyroflows.transforms.base import FlowTransform, Pair
from pyroflows.transforms.discrete.base import as_one_hot, require_categories
from pyroflows.transforms.held import is_validated


class OneHot(FlowTransform):
    """The layer that writes categories as one-hot vectors, at the data end of a flow.

    Args:
        length: number of places of a sequence.
        num_categories: number of categories K, at least 2.

    Shapes: z is ``(..., length)``, x is ``(..., length, K)``.

    Raises:
        OptionError: if a size is too small.
        DataError: at a call, where values are validated, if a value is none of the categories, or no one-hot vector.

    Example:
        >>> t = OneHot(2, 3)
        >>> t(torch.tensor([2, 0])).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
        >>> t.inv(t(torch.tensor([2, 0])))
        tensor([2, 0])
    """

    like: Tensor

    def __init__(self, length: int, num_categories: int) -> None:
        length, size = checked_int("length", length), checked_int("num_categories", num_categories, least=2)
        super().__init__((length, size))
        # Sequences of categories have fewer elements than the vectors that stand for them.
        self.base_shape = torch.Size([length])
        self.num_categories = size
        self.register_buffer("like", torch.zeros(()), persistent=False)  # it has the dtype of the layer, and its device
        self.domain = constraints.independent(constraints.integer_interval(0, size - 1), 1)
        self.codomain = constraints.independent(constraints.one_hot, 1)

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        require_categories(z, self.num_categories, "OneHot")
        return as_one_hot(z, self.num_categories, self.like.dtype), self.like.new_zeros(z.shape[:-1])

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        require_one_hot(x, "the inverse of OneHot")
        return x.argmax(-1), self.like.new_zeros(x.shape[:-2])


def require_one_hot(value: Tensor, name: str) -> None:
    """Raise if a vector is not one-hot, where values are validated.

    Args:
        value: vectors ``(..., K)``.
        name: what the message calls what takes them.

    Raises:
        DataError: if one is not; the message names the place of the first.

    Example:
        >>> require_one_hot(torch.eye(3), "this flow")
    """
    if not (is_validated() and runs_in_python()):
        return
    is_wrong = ~constraints.one_hot.check(value)
    if is_wrong.any():
        place = is_wrong.nonzero()[0].tolist()
        raise DataError(
            f"{name} takes one-hot vectors, but the one at {place} is none: torch.nn.functional.one_hot makes them of "
            "categories"
        )
