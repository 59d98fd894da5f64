"""Adapters that make layers of torch and Pyro transforms and of the transform of a Zuko flow."""

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
    """A layer that computes by a torch or Pyro transform.

    It finds the parameters of ``t.inv`` of a Pyro module, which Pyro itself does not. It drops the values that a Pyro
    transform caches after each call, so that the layer can be copied and is never stale.

    Args:
        transform: a bijection of vectors; or of scalars, which is then applied to each dimension.
        dim: the event size D, or the event shape, at the base end; a transform such as torch's ``ReshapeTransform``
            gives events of another shape.

    Raises:
        OptionError: if the transform is not a bijection between vectors, or between events of fewer axes.
        ShapeError: if the transform does not take events of this size or shape, or changes their number of elements.
        InversionError: at a call of the inverse, if the transform has none.

    Example:
        >>> t = Foreign(torch.distributions.transforms.ExpTransform(), dim=2)
        >>> x, ladj = t.forward_and_ladj(torch.tensor([0.0, 1.0]))
        >>> x, ladj
        (tensor([1.0000, 2.7183]), tensor(1.))
    """

    def __init__(self, transform: Transform, dim: int | Sequence[int]) -> None:
        base_shape = shape_of(dim)
        if not transform.bijective or transform.domain.event_dim > len(base_shape):
            raise OptionError(f"a flow needs bijections of vectors, but {transform} is not one")
        event_shape = _image_of(transform, base_shape)
        if event_shape is None or event_shape.numel() != base_shape.numel():
            size = as_given(base_shape)
            raise ShapeError(
                f"a flow of dim={size} needs bijections of events of that size, but {transform} is not one"
            )
        super().__init__(event_shape, base_dim=base_shape)
        self.transform = transform
        if not isinstance(transform, nn.Module) and isinstance(transform.inv, nn.Module):
            self.inverse_transform = transform.inv
        self.domain = on_events(transform.domain, len(self.base_shape))
        self.codomain = on_events(transform.codomain, len(self.event_shape))

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        x = self.transform(z)
        return x, self._ladj(z, x)

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
    """A layer that computes by the transform of a Zuko flow, which Zuko writes from data to base.

    Args:
        transform: the lazy transform of the flow, a module whose call returns the bijection from data to base.
        dim: the event size D.
    """

    def __init__(self, transform: nn.Module, dim: int) -> None:
        super().__init__(dim)
        self.transform = transform

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.transform().inv.call_and_ladj(z)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return self.transform().call_and_ladj(x)


def on_events(constraint: constraints.Constraint, num_axes: int) -> constraints.Constraint:
    """Return the constraint on events with this number of axes, each element of which meets the given constraint."""
    rest = num_axes - constraint.event_dim
    return constraints.independent(constraint, rest) if rest else constraint


def _image_of(transform: Transform, shape: torch.Size) -> torch.Size | None:
    """Return the shape to which the transform maps events of this shape, or None if it does not take them."""
    try:
        return torch.Size(transform.forward_shape(shape))
    except (RuntimeError, ValueError):  # the sizes of its own tensors do not fit
        return None


def _forget(transform: Any) -> None:
    """Drop what a Pyro transform, its parts, and the transform that it inverts cached at the last call."""
    for owner in (transform, transform._inv):
        parts = owner.modules() if isinstance(owner, nn.Module) else [owner]
        for part in parts:
            for name in getattr(part, "__dict__", {}):
                if is_cache(name):
                    setattr(part, name, (None, None) if name == "_cached_x_y" else None)


def is_cache(name: str) -> bool:
    """Return whether an attribute of this name holds what a torch or Pyro transform computed at its last call."""
    return name.startswith("_cache") and name != "_cache_size"
