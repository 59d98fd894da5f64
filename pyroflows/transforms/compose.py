"""Layers one after the other."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.errors import OptionError, ShapeError
from pyroflows.shapes import as_given
from pyroflows.transforms.base import FlowTransform, Pair, Triple


class Compose(FlowTransform):
    """Layers applied one after the other, the first next to the base."""

    def __init__(self, layers: Sequence[FlowTransform]) -> None:
        if not layers:
            raise OptionError("a composition needs at least one layer")
        shapes = sorted({layer.event_shape for layer in layers})
        context_shapes = sorted({layer.context_shape for layer in layers} - {torch.Size()})
        if len(shapes) > 1 or len(context_shapes) > 1:
            dims, context_dims = [[as_given(shape) for shape in each] for each in (shapes, context_shapes)]
            raise ShapeError(f"layers of one flow must agree, but have dims {dims} and context sizes {context_dims}")
        super().__init__(shapes[0], context_shapes[0] if context_shapes else 0)
        self.codomain = layers[-1].codomain
        self.layers: Any = nn.ModuleList(layers)

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self._through("_forward_and_ladj", self.layers, z, context)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return self._through("_inverse_and_ladj", reversed(self.layers), x, context)

    # The diagonal of a product of matrices that are triangular in one order is the product of the diagonals.

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        self._check_order()
        return self._through("_forward_and_log_slopes", self.layers, z, context)

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        self._check_order()
        return self._through("_inverse_and_log_slopes", reversed(self.layers), x, context)

    def _through(self, method: str, layers: Iterable[FlowTransform], value: Tensor, context: Tensor | None) -> Pair:
        """The value that a method of one layer after the other gives, and the sum of what each gives besides."""
        total: Any = 0.0
        for layer in layers:
            value, logarithm = getattr(layer, method)(value, context if layer.context_dim else None)
            total = total + logarithm
        return value, total

    def _check_order(self) -> None:
        if self.triangular_order is None:
            raise NotImplementedError("these layers are not all triangular in one order")

    @property
    def triangular_order(self) -> tuple[int, ...] | None:
        orders = {layer.triangular_order for layer in self.layers} - {()}
        return () if not orders else orders.pop() if len(orders) == 1 else None

    @property
    def is_affine(self) -> bool:
        return all(layer.is_affine for layer in self.layers)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        total: Any = 0.0
        for layer in self.layers:
            z, ladj, score = layer._forward_and_score(z, score, context if layer.context_dim else None)
            total = total + ladj
        return z, total, score
