"""Velocity fields of any network, whose Jacobian autograd multiplies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.errors import ShapeError

# The exact divergence pulls as many vectors of the basis back at a time as keep a batch below so many elements.
MAX_ELEMENTS = 2**18


class FreeVelocity(nn.Module):
    r"""A network of any kind as the velocity of a continuous flow.

    Autograd gives the products of vectors with its Jacobian: the exact divergence takes D of them.

    Args:
        net: a module that is called as ``net(t, z, context)`` and returns the velocity.
        event_shape: the shape of an event.
        context_shape: the shape of a context, empty for none.

    Shapes: the network maps times ``(N,)``, places ``(N, *event_shape)`` and contexts ``(N, *context_shape)``, or None,
    to ``(N, *event_shape)``.

    Raises:
        ShapeError: at a call, if the network gives another shape.
    """

    def __init__(self, net: nn.Module, event_shape: torch.Size, context_shape: torch.Size) -> None:
        super().__init__()
        self.net = net
        self.event_shape = event_shape
        self.context_shape = context_shape

    def at(self, context: Tensor | None) -> "FreeField":
        """Return the velocity field at a context ``(*batch, *context_shape)``."""
        return FreeField(self, context)


@dataclass
class FreeField:
    """The velocity field of a :class:`FreeVelocity`."""

    velocity: FreeVelocity
    context: Tensor | None

    @property
    def tensors(self) -> Sequence[Tensor]:
        return [*self.velocity.parameters(), *([] if self.context is None else [self.context])]

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        shape, context, context_shape = self.velocity.event_shape, self.context, self.velocity.context_shape
        batch_shape = z.shape[: z.dim() - len(shape)]
        if context is not None:
            context = context.expand(*batch_shape, *context_shape).reshape(-1, *context_shape)
        rows = z.reshape(-1, *shape)
        velocity = self.velocity.net(t.expand(batch_shape).reshape(-1), rows, context)
        if velocity.shape != rows.shape:
            raise ShapeError(
                f"the network of a continuous flow must map places of shape {tuple(rows.shape)} to velocities of this "
                f"shape, but gave shape {tuple(velocity.shape)}"
            )
        return velocity.reshape(z.shape)

    def with_divergence(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        velocity, pull = self._pulling(t, z)
        shape = self.velocity.event_shape
        dim = shape.numel()
        basis = torch.eye(dim, dtype=z.dtype, device=z.device)
        divergence: Tensor | None = None
        for part in basis.split(max(1, MAX_ELEMENTS // max(1, z.numel()))):
            vectors = part.reshape(len(part), *[1] * (z.dim() - len(shape)), *shape)
            pulled = torch.func.vmap(lambda w: pull(w.expand_as(velocity))[0])(vectors)
            terms = (pulled * vectors).flatten(-len(shape)).sum(-1).sum(0)
            divergence = terms if divergence is None else divergence + terms
        assert divergence is not None
        return velocity, divergence

    def with_product(self, t: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        velocity, pull = self._pulling(t, z)
        return velocity, pull(w)[0]

    def _pulling(self, t: Tensor, z: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        """Return the velocity, and the function that multiplies its Jacobian from the left."""
        found: Any = torch.func.vjp(lambda z: self(t, z), z)
        return found
