"""What every layer is: a Pyro ``TransformModule`` whose value and log-determinant come in pairs.

A transform maps base to data, ``x = t(z)``. A subclass writes ``_forward_and_ladj`` and ``_inverse_and_ladj``, and
``_forward_and_score`` where it has a cheaper one; shape and context checks, ``t.inv``, ``t.condition``,
``log_abs_det_jacobian`` and caching are written here, once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyroflows.errors import OptionError, ShapeError
from pyroflows.shapes import as_given, described, shape_of

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


class FlowTransform(TransformModule):
    r"""A bijection of vectors, or of arrays with more axes, with parameters, optionally dependent on a context.

    Layers are stateless: nothing is remembered between calls, so that copies, pickles and log-densities are never
    stale. See :meth:`with_cache` for a view that remembers.

    Args:
        dim: the event size D, or the event shape, such as ``(channels, length)``.
        context_dim: size or shape of the context that the parameters depend on, 0 for none.

    Shapes: z and x are ``(..., *event_shape)``, a context is ``(..., *context_shape)``; batch shapes broadcast; a
    log-determinant has the batch shape.

    Attributes:
        event_shape: ``(D,)`` for vectors.
        dim: the number of elements of an event.
        context_shape: empty for none.
        context_dim: the number of elements of a context, 0 for none.

    Raises:
        OptionError: if a size is not positive.
        ShapeError: at a call, if the event shape or the context does not fit.
    """

    bijective = True
    domain: constraints.Constraint = constraints.real_vector
    codomain: constraints.Constraint = constraints.real_vector

    def __init__(self, dim: int | Sequence[int], context_dim: int | Sequence[int] = 0) -> None:
        super().__init__()
        self.event_shape = shape_of(dim)
        self.context_shape = shape_of(context_dim) if context_dim else torch.Size()
        if not self.event_shape or min(self.event_shape + self.context_shape) < 1:
            raise OptionError(f"{type(self).__name__} needs dim >= 1 and context_dim >= 0, got {dim}, {context_dim}")
        self.dim = self.event_shape.numel()
        self.context_dim = self.context_shape.numel() if self.context_shape else 0
        if len(self.event_shape) > 1:
            self.domain = self.codomain = constraints.independent(constraints.real, len(self.event_shape))

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        raise NotImplementedError

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        raise NotImplementedError

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        """x and ``log |dx_j/dz_j|``, of the event's shape, where :attr:`triangular_order` is not None."""
        raise NotImplementedError

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        """z and ``log |dz_j/dx_j|``, of the event's shape, where :attr:`triangular_order` is not None."""
        raise NotImplementedError

    @property
    def triangular_order(self) -> tuple[int, ...] | None:
        r"""The order of the event's last axis in which the Jacobian is triangular, None if there is none known.

        :math:`x_j` depends on :math:`z_j` and on what stands at places before j in this order; empty where it depends
        on :math:`z_j` alone, which fits any order.
        """
        return None

    @property
    def is_affine(self) -> bool:
        r"""Whether :math:`x_j` is affine in :math:`z_j`, the other elements and the context held fixed."""
        return False

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        """As :meth:`forward_and_score`; z requires gradients."""
        x, ladj = self._forward_and_ladj(z, context)
        at = x.detach().requires_grad_()
        z_again, inverse_ladj = self._inverse_and_ladj(at, context)
        (score,) = pull_back((z_again, inverse_ladj), (score, torch.ones_like(ladj)), (at,))
        return x, ladj, score

    def forward_and_ladj(self, z: Tensor, context: Tensor | None = None) -> Pair:
        """``x = t(z)`` and ``log |det dx/dz|``."""
        return self._forward_and_ladj(self._checked(z, context), context)

    def inverse_and_ladj(self, x: Tensor, context: Tensor | None = None) -> Pair:
        """``z = t.inv(x)`` and ``log |det dz/dx|``."""
        return self._inverse_and_ladj(self._checked(x, context), context)

    def forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        r"""``x = t(z)``, ``log |det dx/dz|``, and the score of the law of x from that of the law of z.

        .. math:: \nabla_x \log q(x) = J^{-\top} (\nabla_z \log p(z) - \nabla_z \log|\det J|), \qquad
            J = \partial x / \partial z

        (Vaitl et al. 2024, arXiv:2403.15881). It holds z and all parameters fixed: no gradients flow through a score.
        Where a layer has nothing better, it costs a pass through the inverse and back. Not for use under
        ``torch.func``.

        Args:
            z: ``(..., *event_shape)``.
            score: :math:`\nabla_z \log p(z)`, of the shape of z.
            context: ``(..., *context_shape)``, if the layer takes one.

        Example:
            >>> t = Planar(3)
            >>> z = torch.randn(5, 3)
            >>> x, ladj, score = t.forward_and_score(z, -z)  # z is standard normal
            >>> x.shape, ladj.shape, score.shape
            (torch.Size([5, 3]), torch.Size([5]), torch.Size([5, 3]))
        """
        z = self._checked(z, context)
        score = score.detach().expand_as(z)
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            x, ladj, score = self._forward_and_score(z, score, context)
        return (x, ladj, score) if torch.is_grad_enabled() else (x.detach(), ladj.detach(), score)

    def log_abs_det_jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        """``log |det dx/dz|`` at z; x is not needed."""
        return self.forward_and_ladj(z)[1]

    @property
    def inv(self) -> "FlowTransform":
        """The inverse, a module with the same parameters. ``t.inv.inv is t``."""
        # A new object each time: it refers to its layer, and a layer that owned it in turn would recurse for ever.
        return Inverse(self)

    def condition(self, context: Tensor) -> "FlowTransform":
        """The plain transform at one context ``(..., *context_shape)``."""
        return Conditioned(self, context)

    def with_cache(self, cache_size: int = 1) -> "FlowTransform":
        """A view that remembers its last pair of values (``cache_size=1``), or the layer itself (0)."""
        return Cached(self) if cache_size else self

    def __getstate__(self) -> dict[str, Any]:
        drop_param_store_references(self)
        return super().__getstate__()

    def _call(self, z: Tensor) -> Tensor:
        return self.forward_and_ladj(z)[0]

    def _inverse(self, x: Tensor) -> Tensor:
        return self.inverse_and_ladj(x)[0]

    def _checked(self, value: Tensor, context: Tensor | None) -> Tensor:
        """The value expanded to the batch shape it has together with the context."""
        name = type(self).__name__
        num_axes = len(self.event_shape)
        if value.shape[-num_axes:] != self.event_shape:
            event = described(self.event_shape)
            raise ShapeError(f"{name} has event {event}, but got a tensor of shape {tuple(value.shape)}")
        if not self.context_dim:
            if context is not None:
                raise ShapeError(f"{name} takes no context, got one of shape {tuple(context.shape)}: set context_dim")
            return value
        if context is None:
            raise ShapeError(f"{name} needs a context of {described(self.context_shape)}: use t.condition(context)")
        num_context_axes = len(self.context_shape)
        if context.shape[-num_context_axes:] != self.context_shape:
            expected = described(self.context_shape)
            raise ShapeError(f"{name} has context {expected}, but got shape {tuple(context.shape)}")
        value_batch, context_batch = value.shape[:-num_axes], context.shape[:-num_context_axes]
        try:
            batch_shape = torch.broadcast_shapes(value_batch, context_batch)
        except RuntimeError:
            raise ShapeError(
                f"{name}: batch shapes of the value, {tuple(value_batch)}, and of the context, "
                f"{tuple(context_batch)}, do not broadcast"
            ) from None
        return value.expand(batch_shape + self.event_shape)

    def extra_repr(self) -> str:
        context = f", context_dim={as_given(self.context_shape)}" if self.context_dim else ""
        return f"dim={as_given(self.event_shape)}{context}"

    __repr__ = nn.Module.__repr__


class _View(FlowTransform):
    """A layer seen in another way; its parameters are the layer's."""

    def __init__(self, layer: FlowTransform, context_dim: Sequence[int]) -> None:
        super().__init__(layer.event_shape, context_dim)
        self.layer = layer

    @property
    def triangular_order(self) -> tuple[int, ...] | None:
        return self.layer.triangular_order

    @property
    def is_affine(self) -> bool:
        return self.layer.is_affine


class Inverse(_View):
    """The inverse of a layer; its parameters are the layer's."""

    def __init__(self, layer: FlowTransform) -> None:
        super().__init__(layer, layer.context_shape)

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.layer._inverse_and_ladj(z, context)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return self.layer._forward_and_ladj(x, context)

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.layer._inverse_and_log_slopes(z, context)

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        return self.layer._forward_and_log_slopes(x, context)

    # Through the layer's own calls, so that one that remembers does so in both directions.
    def _call(self, z: Tensor) -> Tensor:
        return self.layer._inverse(z)

    def _inverse(self, x: Tensor) -> Tensor:
        return self.layer._call(x)

    def log_abs_det_jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        """``log |det dx/dz|``, from the layer's own forward direction at x."""
        return -self.layer.log_abs_det_jacobian(x, z)

    @property
    def inv(self) -> FlowTransform:
        return self.layer


class Conditioned(_View):
    """A layer at one context. Gradients flow into the context."""

    def __init__(self, layer: FlowTransform, context: Tensor) -> None:
        super().__init__(layer, ())
        self.context = context

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.layer.forward_and_ladj(z, self.context)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return self.layer.inverse_and_ladj(x, self.context)

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.layer._forward_and_log_slopes(self.layer._checked(z, self.context), self.context)

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        return self.layer._inverse_and_log_slopes(self.layer._checked(x, self.context), self.context)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        return self.layer.forward_and_score(z, score, self.context)


class Cached(_View):
    """A view of a layer that remembers its last (z, x, log |det dx/dz|), as ``NeuTraReparam`` wants it.

    The memory is dropped by deepcopy and pickle, and does not count once a value or a parameter has changed.
    """

    def __init__(self, layer: FlowTransform) -> None:
        super().__init__(layer, layer.context_shape)
        self.codomain = layer.codomain
        self._last: tuple[Tensor, Tensor, Tensor, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last": None}

    def _state_of(self, z: Tensor, x: Tensor) -> Any:
        return z._version, x._version, torch.is_grad_enabled(), state_of(self.layer)

    def _remember(self, z: Tensor, x: Tensor, ladj: Tensor) -> None:
        self._last = z, x, ladj, self._state_of(z, x)

    def _remembered(self, z: Tensor | None, x: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
        """The last triple, if it belongs to z or x and to today's parameters."""
        if self._last is None:
            return None
        last_z, last_x, ladj, state = self._last
        fits = (z is None or z is last_z) and (x is None or x is last_x)
        return (last_z, last_x, ladj) if fits and state == self._state_of(last_z, last_x) else None

    def _call(self, z: Tensor) -> Tensor:
        if (last := self._remembered(z, None)) is not None:
            return last[1]
        x, ladj = self.layer.forward_and_ladj(z)
        self._remember(z, x, ladj)
        return x

    def _inverse(self, x: Tensor) -> Tensor:
        if (last := self._remembered(None, x)) is not None:
            return last[0]
        z, ladj = self.layer.inverse_and_ladj(x)
        self._remember(z, x, -ladj)
        return z

    def log_abs_det_jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        if (last := self._remembered(z, x)) is not None:
            return last[2]
        return self.layer.log_abs_det_jacobian(z, x)

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.layer._forward_and_ladj(z, context)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return self.layer._inverse_and_ladj(x, context)

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.layer._forward_and_log_slopes(z, context)

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        return self.layer._inverse_and_log_slopes(x, context)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        return self.layer._forward_and_score(z, score, context)

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        return self if cache_size else self.layer


def pull_back(outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The cotangents of the inputs, zero for what is not used; the graph of the outputs stays."""
    pairs = [(output, cotangent) for output, cotangent in zip(outputs, cotangents, strict=True) if output.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(value) for value in inputs)
    outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outputs, inputs, cotangents, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def elementwise_score(z: Tensor, ladj: Tensor, score: Tensor) -> Tensor:
    """The score of elementwise ``x_j = T(z_j)`` from that of z, ladj being ``log dx_j/dz_j``."""
    with torch.no_grad():
        (slope_of_ladj,) = pull_back((ladj,), (torch.ones_like(ladj),), (z,))
        return (score - slope_of_ladj) * torch.exp(-ladj)


_num_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _num_optimizer_steps
    _num_optimizer_steps += 1


# Fused optimisers, and those that write through ``.data``, leave no trace in a tensor's version counter.
register_optimizer_step_post_hook(_count_step)


def state_of(module: nn.Module) -> tuple[Any, ...]:
    """What is another whenever the parameters of a module are other tensors or have been updated."""
    return _num_optimizer_steps, *((id(p), p._version) for p in module.parameters())


def drop_param_store_references(module: nn.Module) -> None:
    """Make the parameters of a module that stands in Pyro's param store fit for pickle.

    The store hangs a weak reference on each parameter that it hands out, and does so again at the next access.
    """
    for parameter in module.parameters():
        vars(parameter).pop("unconstrained", None)
