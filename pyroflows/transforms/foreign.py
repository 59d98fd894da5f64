"""Adapters that make layers of torch and Pyro transforms and of the transform of a Zuko flow."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pyroflows.constraints import on_events
from pyroflows.errors import InversionError, OptionError, ShapeError
from pyroflows.shapes import as_given, shape_of
from pyroflows.transforms.base import FlowTransform, Pair
from pyroflows.transforms.held import Held


class Foreign(FlowTransform):
    """A layer that computes by a torch or Pyro transform.

    It finds the parameters of ``t.inv`` of a Pyro module, which Pyro itself does not. It drops the values that a Pyro
    transform caches after each call, so that the layer can be copied and is never stale.

    Args:
        transform: a bijection of vectors; or of scalars, which is then applied to each dimension.
        dim: the event size D, or the event shape, at the base end; a transform such as torch's ``ReshapeTransform``
            gives events of another shape.
        codomain: where x lies, if the transform's own codomain does not say it; None for that.

    Attributes:
        transform: the transform, with its tensors as they are now.

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

    def __init__(
        self, transform: Transform, dim: int | Sequence[int], codomain: constraints.Constraint | None = None
    ) -> None:
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
        self.held = transform if isinstance(transform, nn.Module) else Held(transform)
        self.held_codomain = None if codomain is None else Held(codomain)

    @property
    def transform(self) -> Transform:
        held: Any = self.held
        return held() if isinstance(held, Held) else held

    # They are properties, since their bounds can be tensors that move, cast and load.
    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return on_events(self.transform.domain, len(self.base_shape))

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        codomain = self.transform.codomain if self.held_codomain is None else self.held_codomain()
        return on_events(codomain, len(self.event_shape))

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        transform = self.transform
        x = transform(z)
        return x, self._ladj(transform, z, x)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        transform = self.transform
        try:
            z = transform.inv(x)
        except (KeyError, NotImplementedError) as error:
            raise InversionError(f"{type(transform).__name__} cannot be inverted at a given value") from error
        return z, -self._ladj(transform, z, x)

    @property
    def is_elementwise(self) -> bool:
        """Whether the transform maps scalars, so that x_j depends on z_j alone."""
        transform = self.transform
        return transform.domain.event_dim == transform.codomain.event_dim == 0

    @property
    def triangular_order(self) -> tuple[int, ...]:
        """The order in which an elementwise transform is triangular, which is any; see ``TriangularTransform``."""
        return ()

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        transform = self.transform
        x = transform(z)
        return x, self._log_slopes(transform, z, x)

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        transform = self.transform
        z = transform.inv(x)
        return z, -self._log_slopes(transform, z, x)

    def _ladj(self, transform: Transform, z: Tensor, x: Tensor) -> Tensor:
        if not z.numel():  # torch cannot form the sums of no rows
            return z.flatten(-len(self.base_shape)).sum(-1)
        ladj = self._log_slopes(transform, z, x)
        return sum_rightmost(ladj, ladj.dim() - (z.dim() - len(self.base_shape)))

    def _log_slopes(self, transform: Transform, z: Tensor, x: Tensor) -> Tensor:
        """Return what the transform gives as log-determinants, one for each scalar if it is elementwise."""
        ladj = transform.log_abs_det_jacobian(z, x)
        _forget(transform, self.held)
        return ladj


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


def _image_of(transform: Transform, shape: torch.Size) -> torch.Size | None:
    """Return the shape to which the transform maps events of this shape, or None if it does not take them."""
    try:
        return torch.Size(transform.forward_shape(shape))
    except (RuntimeError, ValueError):  # the sizes of its own tensors do not fit
        return None


def _forget(transform: Any, held: nn.Module) -> None:
    """Drop what a transform, the one that it inverts, and Pyro's modules among its parts cached at the last call."""
    for owner in (transform, transform._inv, *held.modules()):
        for name in getattr(owner, "__dict__", {}):
            if is_cache(name):
                setattr(owner, name, (None, None) if name == "_cached_x_y" else None)


def is_cache(name: str) -> bool:
    """Return whether an attribute of this name holds what a torch or Pyro transform computed at its last call."""
    return name.startswith("_cache") and name != "_cache_size"
