"""One-hot vectors, through which gradients go: their way through a stack of discrete layers, and the layer that makes
them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.compiling.eager import runs_in_python
from pyroflows.errors import DataError, OptionError
from pyroflows.options import checked_int
from pyroflows.shapes import expanded_to_context
from pyroflows.transforms.base import FlowTransform, Pair
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.discrete.base import DiscreteTransform, as_one_hot, require_categories
from pyroflows.transforms.held import is_validated
from pyroflows.transforms.views import Cached, Conditioned, Inverse


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
        if is_validated() and runs_in_python():
            is_wrong = ~constraints.one_hot.check(x)
            if is_wrong.any():
                place = is_wrong.nonzero()[0].tolist()
                raise DataError(f"OneHot takes one-hot vectors in its inverse, but the one at {place} is none")
        return x.argmax(-1), self.like.new_zeros(x.shape[:-2])


def num_categories_of(transform: FlowTransform) -> int:
    """Return the number of categories that a stack of discrete layers maps.

    Example:
        >>> num_categories_of(pf.transforms.DiscreteCoupling(4, num_categories=6).inv)
        6
    """
    constraint: Any = transform.domain
    return int(constraint.base_constraint.upper_bound) + 1


def maps_categories(transform: nn.Module) -> bool:
    """Tell whether a layer, or a layer of a view, a composition or a flow, is discrete."""
    return any(isinstance(part, DiscreteTransform | OneHot) for part in transform.modules())


def one_hot_value(transform: FlowTransform, value: Tensor, context: Tensor | None, direction: str) -> Tensor:
    """Map one-hot vectors by a stack of discrete layers, with gradients straight through.

    Args:
        transform: a discrete layer, or views and compositions of these.
        value: one-hot vectors ``(..., length, K)``.
        context: ``(..., *context_shape)``, or None.
        direction: "forward" or "inverse".

    Raises:
        OptionError: if a layer is not discrete.
        ShapeError: if the vectors or the context have another shape.

    Example:
        >>> t = pf.transforms.DiscreteAutoregressive(2, num_categories=3)
        >>> one_hot_value(t.inv, torch.eye(3)[torch.tensor([2, 0])], None, "inverse").argmax(-1)
        tensor([2, 0])
    """
    is_forward = direction == "forward"
    if isinstance(transform, Compose):
        context = transform.layer_context(context)
        for layer in transform.layers if is_forward else [*transform.layers][::-1]:
            value = one_hot_value(layer, value, context if layer.context_dim else None, direction)
        return value
    if isinstance(transform, Inverse):
        return one_hot_value(transform.layer, value, context, "inverse" if is_forward else "forward")
    if isinstance(transform, Conditioned):
        return one_hot_value(transform.layer, value, transform.context, direction)
    if isinstance(transform, Cached):
        return one_hot_value(transform.layer, value, context, direction)
    if isinstance(transform, OneHot):
        return value
    name = type(transform).__name__
    if not isinstance(transform, DiscreteTransform):
        raise OptionError(f"{name} is no discrete layer, so that gradients of categories cannot go through it")
    shape = torch.Size([transform.dim, transform.num_categories])
    value = expanded_to_context(value, context, shape, transform.context_shape, name)
    return transform._forward_one_hot(value, context) if is_forward else transform._inverse_one_hot(value, context)
