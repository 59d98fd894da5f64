"""Chains of layers that are triangular in one order, so that their joint Jacobian is triangular in it as well."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyroflows.transforms.base import FlowTransform, Pair
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.foreign import Foreign
from pyroflows.transforms.triangular.base import TriangularTransform


def flattened(transform: FlowTransform) -> list[Any]:
    """Return the layers of a transform from base to data, with those of nested compositions in their place.

    Example:
        >>> len(flattened(Compose([Planar(2), Compose([Planar(2), Planar(2)])])))
        3
    """
    if not isinstance(transform, Compose):
        return [transform]
    return [layer for part in transform.layers for layer in flattened(part)]


def orders_of(layers: Sequence[Any]) -> list[tuple[int, ...] | None]:
    """Return the order in which each layer is triangular; it is None if there is none, and empty if any order will do.

    Example:
        >>> orders_of([Autoregressive(2), Autoregressive(2, order=[1, 0]), Elementwise(2), Planar(2)])
        [(0, 1), (1, 0), (), None]
    """
    return [layer.triangular_order if _has_slopes(layer) else None for layer in layers]


def forward_and_log_slopes(layers: Sequence[Any], z: Tensor, context: Tensor | None) -> Pair:
    """Send base values through layers of one order.

    Matrices that are triangular in one order multiply to a matrix whose diagonal is the product of their diagonals.

    Args:
        layers: the layers, from base to data.
        z: ``(..., *event_shape)``.
        context: ``(..., *context_shape)``, or None.

    Returns:
        The data x, and the logarithms ``log |dx_j/dz_j|`` of the diagonal of the joint Jacobian, both shaped like z.
    """
    return _through("_forward_and_log_slopes", layers, z, context)


def inverse_and_log_slopes(layers: Sequence[Any], x: Tensor, context: Tensor | None) -> Pair:
    """Send data back through layers of one order, and return z and ``log |dz_j/dx_j|``; the arguments are alike."""
    return _through("_inverse_and_log_slopes", layers[::-1], x, context)


def _through(method: str, layers: Sequence[Any], value: Tensor, context: Tensor | None) -> Pair:
    total: Any = 0.0
    for layer in layers:
        value, log_slopes = getattr(layer, method)(value, context if layer.context_dim else None)
        total = total + log_slopes
    return value, total


def _has_slopes(layer: FlowTransform) -> bool:
    return isinstance(layer, TriangularTransform) or (isinstance(layer, Foreign) and layer.is_elementwise)
