"""Transforms of other libraries as layers: any torch or Pyro transform, and the transform of a Zuko flow."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pyroflows.errors import InversionError, OptionError, ShapeError
from pyroflows.shapes import as_given, shape_of
from pyroflows.transforms.base import FlowTransform, Pair


class Foreign(FlowTransform):
    """A torch or Pyro transform as a layer.

    The parameters of ``t.inv`` of a Pyro module, which Pyro does not show, are found here. Values that a Pyro transform
    caches are dropped after each call, so that the layer can be copied and is never stale.

    Args:
        transform: a bijection of vectors, or of scalars, which then acts on each dimension.
        dim: the event size D, or the event shape, at the base end; a transform such as torch's ``ReshapeTransform``
            gives events of another shape.

    Raises:
        OptionError: if the transform is not a bijection between vectors, or between events of fewer axes.
        ShapeError: if it does not map vectors of ``dim`` components, or events of that shape, to such.
        InversionError: at a call of the inverse, where the transform has none.
    """

    def __init__(self, transform: Transform, dim: int | Sequence[int]) -> None:
        base_shape = shape_of(dim)
        if not transform.bijective or transform.domain.event_dim > len(base_shape):
            raise OptionError(f"a flow needs bijections of vectors, but {transform} is none")
        event_shape = _image_of(transform, base_shape)
        if event_shape is None or event_shape.numel() != base_shape.numel():
            size = as_given(base_shape)
            raise ShapeError(f"a flow of dim={size} needs bijections of vectors of that size, but {transform} is none")
        super().__init__(event_shape, base_dim=base_shape)
        self.transform = transform
        if not isinstance(transform, nn.Module) and isinstance(transform.inv, nn.Module):
            self.inverse_transform = transform.inv
        self.domain = on_events(transform.domain, len(self.base_shape))
        self.codomain = on_events(transform.codomain, len(self.event_shape))

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        x = self.transform(z)
        ladj = self._ladj(z, x)
        return x, ladj

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        try:
            z = self.transform.inv(x)
        except (KeyError, NotImplementedError) as error:
            raise InversionError(f"{type(self.transform).__name__} cannot be inverted at a given value") from error
        return z, -self._ladj(z, x)

    def _ladj(self, z: Tensor, x: Tensor) -> Tensor:
        ladj = self.transform.log_abs_det_jacobian(z, x)
        _forget(self.transform)
        return sum_rightmost(ladj, ladj.dim() - (z.dim() - len(self.base_shape)))


class Zuko(FlowTransform):
    """The transform of a Zuko flow, which Zuko writes from data to base, as a layer from base to data."""

    def __init__(self, transform: nn.Module, dim: int) -> None:
        super().__init__(dim)
        self.transform = transform

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.transform().inv.call_and_ladj(z)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return self.transform().call_and_ladj(x)


def on_events(constraint: constraints.Constraint, num_axes: int) -> constraints.Constraint:
    """The constraint as one of events with that many axes."""
    rest = num_axes - constraint.event_dim
    return constraints.independent(constraint, rest) if rest else constraint


def _image_of(transform: Transform, shape: torch.Size) -> torch.Size | None:
    """The shape to which the transform maps events of a shape; None if it takes no such events."""
    try:
        return torch.Size(transform.forward_shape(shape))
    except (RuntimeError, ValueError):  # the sizes of its own tensors do not fit
        return None


def _forget(transform: Any) -> None:
    """Drop what a Pyro transform, those it is made of, or the one it inverts, remember of the last call."""
    for owner in (transform, transform._inv):
        parts = owner.modules() if isinstance(owner, nn.Module) else [owner]
        for part in parts:
            for name in getattr(part, "__dict__", {}):
                if name.startswith("_cache") and name != "_cache_size":
                    setattr(part, name, (None, None) if name == "_cached_x_y" else None)
