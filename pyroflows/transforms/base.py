"""What every layer is: a Pyro ``TransformModule`` whose value and log-determinant come in pairs.

A transform maps base to data, ``x = t(z)``. A subclass writes ``_forward_and_ladj`` and ``_inverse_and_ladj``, and the
other hooks where it has them; shape and context checks, ``t.inv``, ``t.condition``, ``log_abs_det_jacobian`` and
caching are written here, once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.errors import InexactError, OptionError, ShapeError
from pyroflows.shapes import as_given, described, shape_of
from pyroflows.transforms.memory import Memory

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


class FlowTransform(TransformModule):
    r"""A bijection of vectors, or of arrays with more axes, with parameters, optionally dependent on a context.

    A subclass writes :meth:`_forward_and_ladj` and :meth:`_inverse_and_ladj`. It may also write
    :meth:`_forward_and_score`, where it has a cheaper score than by its inverse; :meth:`_exact`, where its own
    log-determinant is an estimate; :meth:`_adapt`, where it learns from data before training; and
    :meth:`before_step`, where it keeps up a state during training.

    Layers are stateless: nothing is remembered between calls, so that copies, pickles and log-densities are never
    stale. :meth:`with_cache` gives a view that remembers.

    Args:
        dim: the event size D, or the event shape, such as ``(channels, height, width)``, at the data end.
        context_dim: size or shape of the context that the parameters depend on, 0 for none.
        base_dim: the event size or shape at the base end, where the layer changes it; it has as many elements.

    Shapes: z is ``(..., *base_shape)``, x is ``(..., *event_shape)``, a context is ``(..., *context_shape)``; batch
    shapes broadcast; a log-determinant has the batch shape.

    Attributes:
        event_shape: the shape of x without its batch shape, ``(D,)`` for vectors.
        base_shape: the shape of z without its batch shape; equal to ``event_shape`` in most layers.
        dim: the number of elements of an event.
        context_shape: empty for none.
        context_dim: the number of elements of a context, 0 for none.

    Raises:
        OptionError: if a size is not positive.
        ShapeError: if events have different numbers of elements at the two ends; at a call, if the event shape or the
            context does not fit.

    Example:
        >>> class Halve(pf.transforms.FlowTransform):
        ...     def _forward_and_ladj(self, z, context):
        ...         return z / 2, -self.dim * torch.full(z.shape[:-1], 2.0).log()
        ...     def _inverse_and_ladj(self, x, context):
        ...         return 2 * x, self.dim * torch.full(x.shape[:-1], 2.0).log()
        >>> x, ladj = Halve(2).forward_and_ladj(torch.ones(5, 2))
        >>> x[0].tolist(), ladj.shape
        ([0.5, 0.5], torch.Size([5]))
    """

    bijective = True
    domain: constraints.Constraint = constraints.real_vector
    codomain: constraints.Constraint = constraints.real_vector
    adapted: Tensor

    def __init__(
        self,
        dim: int | Sequence[int],
        context_dim: int | Sequence[int] = 0,
        base_dim: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = shape_of(dim)
        self.base_shape = self.event_shape if base_dim is None else shape_of(base_dim)
        self.context_shape = shape_of(context_dim) if context_dim else torch.Size()
        if not self.event_shape or min(self.event_shape + self.base_shape + self.context_shape) < 1:
            raise OptionError(f"{type(self).__name__} needs dim >= 1 and context_dim >= 0, got {dim}, {context_dim}")
        self.dim = self.event_shape.numel()
        self.context_dim = self.context_shape.numel() if self.context_shape else 0
        if self.base_shape.numel() != self.dim:
            raise ShapeError(
                f"{type(self).__name__} cannot map events of {described(self.base_shape)} to events of "
                f"{described(self.event_shape)}: a bijection keeps the number of elements"
            )
        if len(self.base_shape) > 1:
            self.domain = constraints.independent(constraints.real, len(self.base_shape))
        if len(self.event_shape) > 1:
            self.codomain = constraints.independent(constraints.real, len(self.event_shape))
        if type(self)._adapt is not FlowTransform._adapt:
            self.register_buffer("adapted", torch.tensor(False))

    # What a subclass writes.

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        """``x = t(z)`` and ``log |det dx/dz|``."""
        raise NotImplementedError

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        """``z = t.inv(x)`` and ``log |det dz/dx|``."""
        raise NotImplementedError

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        """The same as :meth:`forward_and_score`, for a z that requires gradients."""
        x, ladj = self._forward_and_ladj(z, context)
        at = x.detach().requires_grad_()
        z_again, inverse_ladj = self._inverse_and_ladj(at, context)
        (score,) = pull_back((z_again, inverse_ladj), (score, torch.ones_like(ladj)), (at,))
        return x, ladj, score

    def _exact(self) -> "FlowTransform":
        """The view that :meth:`exact` returns, where :attr:`ladj_is_exact` is false."""
        raise InexactError(
            f"the log-determinant of {type(self).__name__} is an estimate, and the layer has no exact one: use it for "
            "training only, or choose a layer that has one"
        )

    def _adapt(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> None:
        """Set buffers or parameters in place, from rows as they arrive at the layer's data end."""

    def before_step(self) -> None:
        """Bring state up to date, such as power iterations; the trainer calls it before each step.

        It runs in Python, outside of what is traced, and changes buffers in place. They must be persistent: those in no
        state dict are constants of a traced step.
        """

    @property
    def ladj_is_exact(self) -> bool:
        """Whether log-determinants are exact, rather than unbiased estimates."""
        return True

    # What is written once.

    def exact(self) -> "FlowTransform":
        """The layer with exact log-determinants: itself, or a view of the same parameters.

        Raises:
            InexactError: if the layer has none.
        """
        return self if self.ladj_is_exact else self._exact()

    @property
    def adapts(self) -> bool:
        """Whether the layer learns something from data before training."""
        return "adapted" in self._buffers

    @property
    def is_adapted(self) -> bool:
        """Whether :meth:`adapt` was called, or a state was loaded of a layer of which it was; true where none adapts.

        The buffer ``adapted`` holds it, so that it is saved and copied with the layer.
        """
        return not self.adapts or bool(self.adapted)

    @torch.no_grad()
    def adapt(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Learn from data before training, such as their location and scale. A second call starts anew.

        Args:
            x: rows at the data end, ``(n, *event_shape)``.
            context: their contexts ``(n, *context_shape)``, if the layer takes one.
            weights: weights of the rows ``(n,)``, not negative; None for equal weights.

        Raises:
            DataError: if the rows do not allow it; names their columns.
        """
        if self.adapts:
            self._adapt(self._checked(x, context, self.event_shape), context, weights)
            self.adapted.fill_(True)

    def forward_and_ladj(self, z: Tensor, context: Tensor | None = None) -> Pair:
        """``x = t(z)`` and ``log |det dx/dz|``."""
        return self._forward_and_ladj(self._checked(z, context, self.base_shape), context)

    def inverse_and_ladj(self, x: Tensor, context: Tensor | None = None) -> Pair:
        """``z = t.inv(x)`` and ``log |det dz/dx|``."""
        return self._inverse_and_ladj(self._checked(x, context, self.event_shape), context)

    def forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        r"""``x = t(z)``, ``log |det dx/dz|``, and the score of the law of x from that of the law of z.

        .. math:: \nabla_x \log q(x) = J^{-\top} (\nabla_z \log p(z) - \nabla_z \log|\det J|), \qquad
            J = \partial x / \partial z

        (Vaitl et al. 2024, arXiv:2403.15881). It holds z and all parameters fixed: no gradients flow through a score.
        Where a layer has nothing better, it costs a pass through the inverse and back. It does not run under
        ``torch.func``.

        Args:
            z: ``(..., *base_shape)``.
            score: :math:`\nabla_z \log p(z)`, of the shape of z.
            context: ``(..., *context_shape)``, if the layer takes one.

        Example:
            >>> t = Planar(3)
            >>> z = torch.randn(5, 3)
            >>> x, ladj, score = t.forward_and_score(z, -z)  # z is standard normal
            >>> x.shape, ladj.shape, score.shape
            (torch.Size([5, 3]), torch.Size([5]), torch.Size([5, 3]))
        """
        z = self._checked(z, context, self.base_shape)
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

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape of x for a z of this shape."""
        return torch.Size(shape)[: len(shape) - len(self.base_shape)] + self.event_shape

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape of z for an x of this shape."""
        return torch.Size(shape)[: len(shape) - len(self.event_shape)] + self.base_shape

    def __getstate__(self) -> dict[str, Any]:
        drop_param_store_references(self)
        return super().__getstate__()

    def _call(self, z: Tensor) -> Tensor:
        return self.forward_and_ladj(z)[0]

    def _inverse(self, x: Tensor) -> Tensor:
        return self.inverse_and_ladj(x)[0]

    def _checked(self, value: Tensor, context: Tensor | None, shape: torch.Size) -> Tensor:
        """The value, whose events have this shape, expanded to the batch shape it has together with the context."""
        name = type(self).__name__
        num_axes = len(shape)
        if value.shape[-num_axes:] != shape:
            raise ShapeError(f"{name} has event {described(shape)}, but got a tensor of shape {tuple(value.shape)}")
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
        return value.expand(batch_shape + shape)

    def extra_repr(self) -> str:
        base = f", base_dim={as_given(self.base_shape)}" if self.base_shape != self.event_shape else ""
        context = f", context_dim={as_given(self.context_shape)}" if self.context_dim else ""
        return f"dim={as_given(self.event_shape)}{base}{context}"

    __repr__ = nn.Module.__repr__


class _View(FlowTransform):
    """A layer seen in another way; its parameters are the layer's."""

    def __init__(self, layer: FlowTransform, event_shape: torch.Size, context_dim: Any, base_shape: torch.Size) -> None:
        super().__init__(event_shape, context_dim, base_shape)
        self.layer = layer

    @property
    def ladj_is_exact(self) -> bool:
        return self.layer.ladj_is_exact


class Inverse(_View):
    """The inverse of a layer; its parameters are the layer's. It does not adapt to data, even if the layer does."""

    def __init__(self, layer: FlowTransform) -> None:
        super().__init__(layer, layer.base_shape, layer.context_shape, layer.event_shape)

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.layer._inverse_and_ladj(z, context)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return self.layer._forward_and_ladj(x, context)

    def _exact(self) -> FlowTransform:
        return self.layer.exact().inv

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
        super().__init__(layer, layer.event_shape, (), layer.base_shape)
        self.context = context

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.layer.forward_and_ladj(z, self.context)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return self.layer.inverse_and_ladj(x, self.context)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        return self.layer.forward_and_score(z, score, self.context)

    def _exact(self) -> FlowTransform:
        return self.layer.exact().condition(self.context)


class Cached(_View):
    """A view of a layer that remembers its last (z, x, log |det dx/dz|), as ``NeuTraReparam`` wants it.

    The memory is dropped by deepcopy and pickle, and does not count once a value, a parameter or a buffer has changed.
    """

    def __init__(self, layer: FlowTransform) -> None:
        super().__init__(layer, layer.event_shape, layer.context_shape, layer.base_shape)
        self.domain, self.codomain = layer.domain, layer.codomain
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


def drop_param_store_references(module: nn.Module) -> None:
    """Make the parameters of a module that stands in Pyro's param store fit for pickle.

    The store hangs a weak reference on each parameter that it hands out, and does so again at the next access.
    """
    for parameter in module.parameters():
        vars(parameter).pop("unconstrained", None)
