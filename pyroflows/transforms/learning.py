"""What a layer learns besides its gradients: before training from data or from draws, and during it from batches."""

from typing import Any

import torch
from pyro.distributions import TransformModule
from torch import Tensor

from pyroflows.errors import ShapeError


class Learning(TransformModule):
    """The part of the base class of layers that concerns state which comes from data or from draws.

    A subclass writes the hooks, and callers use the public methods, which check shapes and note in the buffer
    ``adapted`` what has happened, so that it is copied, saved and loaded with the layer.
    """

    event_shape: torch.Size
    base_shape: torch.Size
    adapted: Tensor
    _checked: Any

    # These are the hooks of a subclass.

    def _adapt(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> None:
        """Set buffers or parameters in place from rows ``(n, *event_shape)`` at the layer's data end."""

    def _adapt_to_draws(self, z: Tensor, context: Tensor | None, weights: Tensor | None) -> None:
        """Set buffers or parameters in place from draws ``(n, *base_shape)`` at the layer's base end."""

    def _observe(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> None:
        """Bring buffers up to date, in place, with a batch ``(n, *event_shape)`` at the layer's data end."""

    def before_step(self) -> None:
        """Bring the layer's state up to date, by power iterations for example. The trainer calls it before each step.

        It runs in Python, outside of what is traced, so it must change buffers in place, and persistent ones: buffers
        in no state dict are constants of a traced step.
        """

    # What follows is the same for all layers.

    def _rows(self, values: Tensor, context: Tensor | None, shape: torch.Size, weights: Tensor | None) -> Tensor:
        """Return rows ``(n, *shape)`` to learn from, if they, their contexts and weights have the right shapes."""
        name = type(self).__name__
        if values.dim() != len(shape) + 1 or not values.is_floating_point():
            rows = ", ".join(["n", *map(str, shape)])
            raise ShapeError(
                f"{name} learns from a floating-point tensor of shape ({rows}), got {values.dtype} of shape "
                f"{tuple(values.shape)}"
            )
        if weights is not None and weights.shape != values.shape[:1]:
            raise ShapeError(f"{name} got {len(values)} rows, but weights of shape {tuple(weights.shape)}")
        return self._checked(values, context, shape)

    def _register_adapted(self) -> None:
        """Register the buffer that tells whether the layer has adapted, if it ever does."""
        if self._writes("_adapt") or self._writes("_adapt_to_draws"):
            self.register_buffer("adapted", torch.tensor(0.0))  # a float, so that states can be averaged

    def _writes(self, hook: str) -> bool:
        return getattr(type(self), hook) is not getattr(Learning, hook)

    @property
    def adapts(self) -> bool:
        """Whether the layer learns from data before training."""
        return self._writes("_adapt")

    @property
    def is_adapted(self) -> bool:
        """Whether the layer has learned before training; true if it never learns from data."""
        return not self.adapts or bool(self.adapted)

    @property
    def adapts_to_draws(self) -> bool:
        """Whether the layer learns from draws before training, in flows that are trained without data."""
        return self._writes("_adapt_to_draws")

    @property
    def is_adapted_to_draws(self) -> bool:
        """Whether the layer has learned before training, from draws or data; true if it never does from draws."""
        return not self.adapts_to_draws or bool(self.adapted)

    @property
    def observes(self) -> bool:
        """Whether the layer keeps statistics of data up to date during training."""
        return self._writes("_observe")

    @torch.no_grad()
    def adapt(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Learn from data before training, for example their location and scale. A second call starts anew.

        Args:
            x: rows at the data end, ``(n, *event_shape)``.
            context: their contexts ``(n, *context_shape)``, if the layer takes one.
            weights: weights of the rows ``(n,)``, not negative; None for equal weights.

        Raises:
            ShapeError: if the rows or their contexts have another shape.
            DataError: if the layer cannot learn from these rows; the message names their columns.
        """
        if self.adapts:
            self._adapt(self._rows(x, context, self.event_shape, weights), context, weights)
            self.adapted.fill_(True)

    @torch.no_grad()
    def adapt_to_draws(self, z: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Learn from draws before training, where there are no data, as in a guide. A second call starts anew.

        Args:
            z: draws at the base end, ``(n, *base_shape)``.
            context: their contexts ``(n, *context_shape)``, if the layer takes one.
            weights: weights of the draws ``(n,)``, not negative; None for equal weights.

        Raises:
            ShapeError: if the draws or their contexts have another shape.
            DataError: if the layer cannot learn from these draws.
        """
        if self.adapts_to_draws:
            self._adapt_to_draws(self._rows(z, context, self.base_shape, weights), context, weights)
            self.adapted.fill_(True)

    @torch.no_grad()
    def observe(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Bring statistics of data up to date with a batch. :func:`pyroflows.fit_density` does so before each step.

        Args:
            x: a batch at the data end, ``(n, *event_shape)``.
            context: its contexts ``(n, *context_shape)``, if the layer takes one.
            weights: weights of the rows ``(n,)``, not negative; None for equal weights.

        Raises:
            ShapeError: if the rows or their contexts have another shape.
        """
        if self.observes:
            self._observe(self._rows(x, context, self.event_shape, weights), context, weights)
