"""Composition of layers."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.errors import OptionError, ShapeError
from pyroflows.shapes import as_given, described, shape_of
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.circle import WholeTurns
from pyroflows.transforms.codomain import is_unbounded

# Layers behind others learn from rows with this many elements at most, or from this many rows if that is more.
MAX_ADAPTED, MIN_ADAPTED = 2**18, 128


class Compose(FlowTransform):
    r"""Layers applied one after the other, :math:`x = t_n(\dots t_2(t_1(z)))`, the first next to the base.

    The log-determinant is the sum of those of the layers, :math:`\log|\det J| = \sum_k \log|\det J_k|`. A direction
    is parallel if it is parallel in every layer.

    Args:
        layers: one or more layers, from base to data. Each takes events of the shape that the one before gives; all
            that take a context take one of the same shape, and get the same.
        context_scale: the location and scale of contexts, which layers get without them; None to give contexts to the
            layers as they are.
        base_context_dim: size or shape of the context that the base of a flow takes; the composition takes it even if
            no layer does. 0 if the base takes none.

    Shapes: z is ``(..., *base_shape)`` of the first layer, x is ``(..., *event_shape)`` of the last, a context is
    ``(..., *context_shape)``.

    Raises:
        OptionError: if there is no layer.
        ShapeError: if the shapes of two layers in a row differ, or those of contexts; the message names the layers.

    Example:
        >>> t = Compose([Planar(2), Permutation([1, 0])])
        >>> z = torch.randn(5, 2)
        >>> torch.allclose(t(z), Planar(2)(z).flip(-1))  # a new planar layer is the identity
        True
    """

    def __init__(
        self,
        layers: Sequence[FlowTransform],
        context_scale: FlowTransform | None = None,
        base_context_dim: int | Sequence[int] = 0,
    ) -> None:
        if not layers:
            raise OptionError("a composition needs at least one layer")
        for place, (before, after) in enumerate(pairwise(layers)):
            if before.event_shape != after.base_shape:
                raise ShapeError(
                    "the shapes of layers in a row must agree, but "
                    f"layer {place} ({type(before).__name__}) gives events of {described(before.event_shape)}, and "
                    f"layer {place + 1} ({type(after).__name__}) takes events of {described(after.base_shape)}"
                )
        by_context = {layer.context_shape: type(layer).__name__ for layer in layers if layer.context_dim}
        if base_context_dim:
            by_context.setdefault(shape_of(base_context_dim), "the base")
        if len(by_context) > 1:
            found = ", ".join(f"{name} has {as_given(shape)}" for shape, name in by_context.items())
            raise ShapeError(f"the context sizes of layers of one flow must agree, but {found}")
        context_shape = next(iter(by_context), torch.Size())
        super().__init__(layers[-1].event_shape, context_shape)
        # The layers know whether they keep the number of elements, which one-hot vectors of categories do not.
        self.base_shape = layers[0].base_shape
        self.layers: Any = nn.ModuleList(layers)
        self.context_scale = context_scale
        # The inverses of layers at the data end of a bounded one may give it values that it cannot invert, unless they
        # are bounded alike. The last layer's are the values that users give. Whole turns are taken out of any number.
        self._are_guarded = [
            layer.is_bounding and not isinstance(layer, WholeTurns) and is_unbounded(after.domain)
            for layer, after in pairwise(layers)
        ] + [False]

    @property
    def is_bounding(self) -> bool:
        return self.layers[-1].is_bounding

    @property
    def is_onto_reals(self) -> bool:
        return not (self.is_bounding or any(self._are_guarded))

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.layers[0].domain

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.layers[-1].codomain

    def layer_context(self, context: Tensor | None) -> Tensor | None:
        """Return a context ``(..., *context_shape)`` as the layers take it, without location and scale."""
        if context is None or self.context_scale is None:
            return context
        return self.context_scale.inverse_and_ladj(context)[0]

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        context = self.layer_context(context)
        total: Any = 0.0
        for layer in self.layers:
            z, ladj = layer._forward_and_ladj(z, context if layer.context_dim else None)
            z, ladj = layer._checked_pair(z, ladj, layer.event_shape)
            total = total + ladj
        return z, total

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        context = self.layer_context(context)
        total: Any = 0.0
        # A list of modules is slow to read from its end.
        for layer, is_guarded in zip([*self.layers][::-1], self._are_guarded[::-1], strict=True):
            inverse = layer._guarded if is_guarded else layer._inverse_and_ladj
            x, ladj = inverse(x, context if layer.context_dim else None)
            x, ladj = layer._checked_pair(x, ladj, layer.base_shape)
            total = total + ladj
        return x, total

    def _forward_value(self, z: Tensor, context: Tensor | None) -> Tensor:
        context = self.layer_context(context)
        for layer in self.layers:
            z = layer._forward_value(z, context if layer.context_dim else None)
        return z

    def _inverse_value(self, x: Tensor, context: Tensor | None) -> Tensor:
        if any(self._are_guarded):
            return self._inverse_and_ladj(x, context)[0]
        context = self.layer_context(context)
        for layer in [*self.layers][::-1]:
            x = layer._inverse_value(x, context if layer.context_dim else None)
        return x

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        context = self.layer_context(context)
        total: Any = 0.0
        for layer in self.layers:
            z, ladj, score = layer._forward_and_score(z, score, context if layer.context_dim else None)
            total = total + ladj
        return z, total, score

    @property
    def ladj_is_exact(self) -> bool:
        return all(layer.ladj_is_exact for layer in self.layers)

    @property
    def reads_values(self) -> bool:
        return any(layer.reads_values for layer in self.layers)

    def _exact(self) -> FlowTransform:
        return Compose([layer.exact() for layer in self.layers], self.context_scale, as_given(self.context_shape))

    @property
    def adapts(self) -> bool:
        return any(layer.adapts for layer in self._parts())

    @property
    def is_adapted(self) -> bool:
        return all(layer.is_adapted for layer in self._parts())

    @property
    def adapts_to_draws(self) -> bool:
        return any(layer.adapts_to_draws for layer in self.layers)

    @property
    def is_adapted_to_draws(self) -> bool:
        return all(layer.is_adapted_to_draws for layer in self.layers)

    @property
    def observes(self) -> bool:
        return any(layer.observes for layer in self.layers)

    def _parts(self) -> list[FlowTransform]:
        return [*self.layers, *([] if self.context_scale is None else [self.context_scale])]

    @torch.no_grad()
    def adapt(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Let each layer that adapts learn from the rows as they arrive there, going from data to base.

        Layers that have adapted before stay as they are while others have not; if all have, they start anew. The first
        to learn sees all rows, and the others a part of many, since each may be behind large networks.
        """
        x = self._rows(x, context, self.event_shape, weights)
        starts_anew = self.is_adapted
        learners = [layer for layer in self.layers if layer.adapts and (starts_anew or not layer.is_adapted)]
        scale = self.context_scale
        if scale is not None and context is not None and (starts_anew or not scale.is_adapted):
            scale.adapt(context, None, weights)
        context = self.layer_context(context)
        for layer in reversed(self.layers):
            if not learners:
                break
            if layer is learners[-1]:
                learners.pop().adapt(x, _given_to(layer, context), weights)
                x, context, weights = _part_of_many(x, context, weights)
            if learners:
                x = layer.base_value(x, _given_to(layer, context))

    @torch.no_grad()
    def adapt_to_draws(self, z: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Let each layer that can learn from the draws as they arrive there, going from base to data.

        Layers that have adapted before stay as they are while others have not; if all have, they start anew.
        """
        z = self._rows(z, context, self.base_shape, weights)
        starts_anew = self.is_adapted_to_draws
        learners = [
            layer for layer in self.layers if layer.adapts_to_draws and (starts_anew or not layer.is_adapted_to_draws)
        ]
        context = self.layer_context(context)
        for layer in self.layers:
            if not learners:
                break
            if layer is learners[0]:
                learners.pop(0).adapt_to_draws(z, _given_to(layer, context), weights)
            if learners:
                z, _ = layer.forward_and_ladj(z, _given_to(layer, context))

    @torch.no_grad()
    def observe(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Let each layer that keeps statistics of data see a batch as it arrives there, going from data to base."""
        observers = [layer for layer in self.layers if layer.observes]
        x = self._rows(x, context, self.event_shape, weights)
        context = self.layer_context(context)
        for layer in reversed(self.layers):
            if not observers:
                break
            if layer is observers[-1]:
                observers.pop().observe(x, _given_to(layer, context), weights)
            if observers:
                x, _ = layer.inverse_and_ladj(x, _given_to(layer, context))


def _given_to(layer: FlowTransform, context: Tensor | None) -> Tensor | None:
    """Return the context for a layer that takes one, None for others."""
    return context if layer.context_dim else None


def _part_of_many(x: Tensor, context: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Any, Any]:
    """Return rows with their contexts and weights, or some of them, evenly spread, where there are many."""
    count = max(MIN_ADAPTED, MAX_ADAPTED // max(1, x.shape[1:].numel()))
    used = torch.arange(len(x), device=x.device) if weights is None else weights.nonzero().flatten().to(x.device)
    if len(used) <= count:
        return x, context, weights
    index = used[torch.linspace(0, len(used) - 1, count).long()]
    return (
        x[index],
        None if context is None else context.expand(len(x), *context.shape[1:])[index],
        None if weights is None else weights[index],
    )
