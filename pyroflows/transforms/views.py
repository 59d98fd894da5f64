"""Views of a layer, which are layers with the same parameters: its inverse, the layer at one context, and one that
remembers.

Methods of :class:`pyroflows.transforms.FlowTransform` make them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.memory import Memory


class View(FlowTransform):
    """The base class of views: a layer that computes by another one and shares its parameters."""

    def __init__(self, layer: FlowTransform, event_shape: torch.Size, context_dim: Any, base_shape: torch.Size) -> None:
        super().__init__(event_shape, context_dim)
        # The layer knows whether it keeps the number of elements, which one-hot vectors of categories do not.
        self.base_shape = base_shape
        self.layer = layer

    @property
    def ladj_is_exact(self) -> bool:
        return self.layer.ladj_is_exact

    @property
    def reads_values(self) -> bool:
        return self.layer.reads_values

    @property
    def adapts(self) -> bool:
        return self.layer.adapts

    @property
    def is_adapted(self) -> bool:
        return self.layer.is_adapted

    @property
    def adapts_to_draws(self) -> bool:
        return self.layer.adapts_to_draws

    @property
    def is_adapted_to_draws(self) -> bool:
        return self.layer.is_adapted_to_draws

    @property
    def observes(self) -> bool:
        return self.layer.observes

    def adapt(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        self.layer.adapt(x, self._layers_context(context, len(x)), weights)

    def adapt_to_draws(self, z: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        self.layer.adapt_to_draws(z, self._layers_context(context, len(z)), weights)

    def observe(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        self.layer.observe(x, self._layers_context(context, len(x)), weights)

    def _layers_context(self, context: Tensor | None, num_rows: int) -> Tensor | None:
        """Return the contexts of so many rows as the layer takes them."""
        return context

    # They are properties, since the bounds of a layer can be tensors that move, cast and load.
    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.layer.domain

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.layer.codomain

    @property
    def is_bounding(self) -> bool:
        return self.layer.is_bounding

    @property
    def is_onto_reals(self) -> bool:
        return self.layer.is_onto_reals


class Inverse(View):
    r"""The inverse of a layer, with the same parameters: it maps z to :math:`t^{-1}(z)`. ``t.inv`` makes it.

    Its data end is the base end of the layer. So it adapts to data as the layer adapts to draws, and the other way
    round; a layer that learns from data alone does not adapt to those of its inverse, and observes none.

    Args:
        layer: the layer t.

    Example:
        >>> t = Planar(2)
        >>> isinstance(t.inv, Inverse), t.inv.inv is t
        (True, True)
        >>> [name for name, _ in t.inv.named_parameters()]
        ['layer.parameters_of.value']
    """

    def __init__(self, layer: FlowTransform) -> None:
        super().__init__(layer, layer.base_shape, layer.context_shape, layer.event_shape)

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.layer.codomain

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.layer.domain

    is_bounding, is_onto_reals = FlowTransform.is_bounding, FlowTransform.is_onto_reals

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.layer._inverse_and_ladj(z, context)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return self.layer._forward_and_ladj(x, context)

    def _forward_value(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.layer._inverse_value(z, context)

    def _inverse_value(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.layer._forward_value(x, context)

    def _exact(self) -> FlowTransform:
        return self.layer.exact().inv

    @property
    def adapts(self) -> bool:
        return self.layer.adapts_to_draws

    @property
    def is_adapted(self) -> bool:
        return self.layer.is_adapted_to_draws

    @property
    def adapts_to_draws(self) -> bool:
        return self.layer.adapts

    @property
    def is_adapted_to_draws(self) -> bool:
        return self.layer.is_adapted

    @property
    def observes(self) -> bool:
        return False

    def adapt(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        self.layer.adapt_to_draws(x, context, weights)

    def adapt_to_draws(self, z: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        self.layer.adapt(z, context, weights)

    def observe(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Do nothing: statistics are those of data at the data end of a layer, which is the base end of its inverse."""

    # These go through the layer's own calls, so that a cached layer remembers in both directions.
    def _call(self, z: Tensor) -> Tensor:
        return self.layer._inverse(z)

    def _inverse(self, x: Tensor) -> Tensor:
        return self.layer._call(x)

    def log_abs_det_jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        """Return ``log |det dx/dz|``, which the layer's own forward direction gives at x."""
        return -self.layer.log_abs_det_jacobian(x, z)

    @property
    def inv(self) -> FlowTransform:
        return self.layer


class Conditioned(View):
    """A layer at one context, which takes no context itself. ``t.condition(context)`` makes it.

    Gradients flow into the context, which moves and casts with the layer.

    Args:
        layer: a layer that takes a context.
        context: ``(..., *context_shape)``.

    Example:
        >>> t = Planar(2, context_dim=3).condition(torch.randn(5, 3))
        >>> t(torch.zeros(2)).shape, t.context_dim
        (torch.Size([5, 2]), 0)
    """

    context: Tensor

    def __init__(self, layer: FlowTransform, context: Tensor) -> None:
        super().__init__(layer, layer.event_shape, (), layer.base_shape)
        if isinstance(context, nn.Parameter):
            self.context = context
        else:
            # It moves and casts with the layer, but is not part of what the layer has learnt.
            self.register_buffer("context", context, persistent=False)

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.layer.forward_and_ladj(z, self.context)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return self.layer.inverse_and_ladj(x, self.context)

    def _forward_value(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.layer._data_value(z, self.context)

    def _inverse_value(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.layer.base_value(x, self.context)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        return self.layer.forward_and_score(z, score, self.context)

    def _exact(self) -> FlowTransform:
        return self.layer.exact().condition(self.context)

    def _layers_context(self, context: Tensor | None, num_rows: int) -> Tensor | None:
        return self.context.expand(num_rows, *self.layer.context_shape)


class Cached(View):
    """A view of a layer that remembers its last z, x and ``log |det dx/dz|``. ``t.with_cache()`` makes it.

    Pyro's ``NeuTraReparam`` needs it. Deepcopy and pickle drop the memory, and it is not used after a value, a
    parameter or a buffer has changed.

    Args:
        layer: the layer to call.

    Example:
        >>> t = Planar(2).with_cache()
        >>> z = torch.randn(5, 2)
        >>> t.inv(t(z)) is z  # without a root search
        True
    """

    def __init__(self, layer: FlowTransform) -> None:
        super().__init__(layer, layer.event_shape, layer.context_shape, layer.base_shape)
        self._memory = Memory(layer)

    def _call(self, z: Tensor) -> Tensor:
        if (last := self._memory.recall(z, None, None)) is not None:
            return last[1]
        x, ladj = self.layer.forward_and_ladj(z)
        self._memory.keep(z, x, ladj)
        return x

    def _inverse(self, x: Tensor) -> Tensor:
        if (last := self._memory.recall(None, x, None)) is not None:
            return last[0]
        z, ladj = self.layer.inverse_and_ladj(x)
        self._memory.keep(z, x, -ladj)
        return z

    def log_abs_det_jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        if (last := self._memory.recall(z, x, None)) is not None:
            return last[2]
        return self.layer.log_abs_det_jacobian(z, x)

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.layer._forward_and_ladj(z, context)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return self.layer._inverse_and_ladj(x, context)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        return self.layer._forward_and_score(z, score, context)

    def _exact(self) -> FlowTransform:
        return Cached(self.layer.exact())

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        return self if cache_size else self.layer
