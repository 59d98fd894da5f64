"""What a flow learns besides its gradients: before training from data or from draws, and during it from batches."""

from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.arrays import (
    ArrayLike,
    as_tensor,
    floating_tensor,
    require_finite,
    require_one_index,
    require_values,
)
from pyroflows.errors import DataError, OptionError, ShapeError
from pyroflows.randomness import seeded
from pyroflows.shapes import counted, described
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.discrete.stacks import maps_categories

# The number of draws of the base that layers learn from where there are no data.
NUM_DRAWS = 1000


class LearningFlow(nn.Module):
    """The part of :class:`pyroflows.Flow` that lets its layers learn, by their own methods of the same names."""

    transform: Any
    base: Any
    context_dim: Any
    context_shape: Any
    event_shape: Any

    def _note_stateful_layers(self) -> None:
        """Find the layers that keep up a state, once for all steps."""
        self._stateful = [
            layer
            for layer in self.modules()
            if isinstance(layer, FlowTransform) and type(layer).before_step is not FlowTransform.before_step
        ]

    @property
    def adapts(self) -> bool:
        """Whether a layer learns from data before training."""
        return self.transform.adapts

    @property
    def is_adapted(self) -> bool:
        """Whether all layers that learn from data before training have done so; a state that is loaded counts."""
        require_values(self)
        return self.transform.is_adapted

    def adapt(self, x: ArrayLike, context: ArrayLike | None = None, weights: ArrayLike | None = None) -> None:
        """Let the layers learn from data before training, such as their location and scale, going from data to base.

        Only values of buffers and parameters change. ``log_prob`` scores the data as they are, before standardisation.
        Layers that have adapted before stay as they are while others have not; if all have, they start anew.

        Args:
            x: rows of data ``(n, *event_shape)``.
            context: their contexts ``(n, *context_shape)``, if the flow takes one.
            weights: weights of the rows ``(n,)``, not negative; None for equal weights.

        Raises:
            ShapeError: if the rows or their contexts have another shape.
            OptionError: if the flow is on the meta device, where tensors have no values; or if it is one of categories
                without a context, which has nothing to learn before training.
            DataError: if a column, that is one element of the event, is constant or contains values on the boundary of
                the support or outside it; if a value is not finite or a weight negative; or if frames have different
                indices.

        Example:
            >>> flow = pf.flows.MAF(2)
            >>> flow.adapt(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
            >>> flow.standardization.loc
            tensor([1., 3.])
        """
        rows = self._rows(x, context, weights)
        if maps_categories(self) and not self.adapts:
            raise OptionError(
                "a flow of categories, which have no location and scale, has nothing to learn from data before "
                "training: leave adapt out, or fit the flow by fit_density"
            )
        self._adapt(*rows)

    def _adapt(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> None:
        self.transform.adapt(x, context, weights)

    def adapt_to_draws(self, context: ArrayLike | None = None) -> None:
        """Let layers learn from draws of the base where there are no data, going from base to data.

        Guides call it when they build a flow. Layers that have adapted before, to draws or to data, stay as they are,
        and so do those that learn from data alone, such as the flow's location and scale. The draws are the same at
        each call, and leave the random state as it was.

        Args:
            context: rows ``(n, *context_shape)``, if the flow takes one; a draw is made for each.

        Raises:
            ShapeError: if the rows have another shape.
            OptionError: if the flow is on the meta device, where tensors have no values.

        Example:
            >>> flow = pf.Flow([pf.transforms.ActNorm(2)], base="student_t", standardize=False)
            >>> flow.adapt_to_draws()
            >>> flow().sample((10_000,)).std(0).round()
            tensor([1., 1.])
        """
        require_values(self)
        context = None if context is None else as_tensor("context", context, floating_tensor(self))
        # The base may be made of flows, as that of a mixture is.
        for flow in reversed([module for module in self.modules() if isinstance(module, LearningFlow)]):
            flow._adapt_to_draws(context if flow.context_dim else None)

    def _adapt_to_draws(self, context: Tensor | None) -> None:
        if self.transform.is_adapted_to_draws:
            return
        with seeded(0), torch.no_grad():
            z = self.base().sample((NUM_DRAWS if context is None else len(context),))
        self.transform.adapt_to_draws(z, context)

    @property
    def reads_values(self) -> bool:
        """Whether a layer decides by the values of its tensors what to do, so that no step of training records it."""
        return self.transform.reads_values

    @property
    def observes(self) -> bool:
        """Whether a layer keeps statistics of data up to date during training."""
        return self.transform.observes

    def observe(self, x: ArrayLike, context: ArrayLike | None = None, weights: ArrayLike | None = None) -> None:
        """Bring the statistics of layers such as ``BatchNorm`` up to date with a batch, going from data to base.

        :func:`pyroflows.fit_density` does so before each step. Training loops of your own call it before they compute
        the loss of the batch.

        Args:
            x: a batch ``(n, *event_shape)``.
            context: its contexts ``(n, *context_shape)``, if the flow takes one.
            weights: weights of the rows ``(n,)``, not negative; None for equal weights.

        Raises:
            ShapeError: if the rows or their contexts have another shape.
            DataError: if a value is not finite or a weight negative, or if frames have different indices.
        """
        self._observe(*self._rows(x, context, weights))

    def _observe(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> None:
        self.transform.observe(x, context, weights)

    def _rows(
        self, x: ArrayLike, context: ArrayLike | None, weights: ArrayLike | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return rows ``(n, *event_shape)`` with their contexts and weights as tensors, if one can learn from them."""
        require_values(self)
        require_one_index(x=x, context=context, weights=weights)
        like = floating_tensor(self)
        x = as_tensor("x", x, like)
        if x.shape[1:] != self.event_shape or not x.dim():
            rows = ", ".join(["n", *map(str, self.event_shape)])
            raise ShapeError(f"this flow learns from rows of shape ({rows}), got shape {tuple(x.shape)}")
        require_finite("x", x, len(self.event_shape))
        if (context is None) == bool(self.context_dim):
            needs = f"needs contexts of {described(self.context_shape)}" if self.context_dim else "takes no context"
            raise ShapeError(f"this flow {needs}, but got {'none' if context is None else 'one'}")
        if context is not None:
            context = as_tensor("context", context, like)
            require_finite("context", context, len(self.context_shape))
        if weights is not None:
            weights = as_tensor("weights", weights, like)
            if weights.shape != x.shape[:1]:
                raise ShapeError(f"x has {counted(len(x), 'row')}, but weights have shape {tuple(weights.shape)}")
            if not bool((weights >= 0).all()):
                raise DataError("weights must be finite and not negative")
        return x, context, weights

    def before_step(self) -> None:
        """Bring the state of all layers that keep one up to date. The trainer calls it before each step."""
        for layer in self._stateful:
            layer.before_step()
