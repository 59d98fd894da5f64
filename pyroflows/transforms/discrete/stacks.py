"""Stacks of discrete layers: views, compositions and flows of them, which map categories as their layers do."""

from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.errors import OptionError
from pyroflows.shapes import expanded_to_context
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.discrete.base import DiscreteTransform
from pyroflows.transforms.discrete.one_hot import OneHot
from pyroflows.transforms.views import Cached, Conditioned, Inverse


def maps_categories(module: nn.Module) -> bool:
    """Tell whether a layer, or a layer of a view, a composition or a flow, is discrete."""
    return _discrete_layer(module) is not None


def num_categories_of(module: nn.Module) -> int:
    """Return the number of categories of what :func:`maps_categories` is true for.

    Example:
        >>> num_categories_of(pf.transforms.DiscreteCoupling(4, num_categories=6).inv)
        6
    """
    layer: Any = _discrete_layer(module)
    return layer.num_categories


def _discrete_layer(module: nn.Module) -> DiscreteTransform | OneHot | None:
    """Return the first discrete layer of a module; the layers of a flow all have the same categories."""
    if isinstance(module, DiscreteTransform | OneHot):
        return module
    # modules() puts all in a set, which torch.compile cannot follow.
    found = (_discrete_layer(part) for part in module._modules.values() if part is not None)
    return next((layer for layer in found if layer is not None), None)


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
