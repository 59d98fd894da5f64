"""The base class of layers, a Pyro ``TransformModule`` that computes a value and its log-determinant in one pass.

A transform maps base to data, ``x = t(z)``. A subclass writes ``_forward_and_ladj`` and ``_inverse_and_ladj``, and
further hooks where it needs them; shape and context checks, ``t.inv``, ``t.condition``, ``log_abs_det_jacobian`` and
caching are written here, once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.constraints import angles_and_reals, angles_in, without_angles
from pyroflows.errors import InexactError, OptionError, ShapeError
from pyroflows.shapes import as_given, described, expanded_to_context, shape_of
from pyroflows.transforms.codomain import is_inside, is_unbounded, moved_inside
from pyroflows.transforms.gradients import pull_back
from pyroflows.transforms.learning import Learning

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


class FlowTransform(Learning):
    r"""The base class of layers: a bijection :math:`x = t(z)` of vectors or arrays, which may depend on a context.

    A subclass writes :meth:`_forward_and_ladj` and :meth:`_inverse_and_ladj`. It may also write

    * :meth:`_forward_and_score`, if it can compute a score more cheaply than through its inverse;
    * :meth:`_forward_value` and :meth:`_inverse_value`, if a value alone costs much less than with its log-determinant;
    * :meth:`_exact` and :attr:`ladj_is_exact`, if its log-determinant is an estimate;
    * :attr:`reads_values`, if Python decides by the values of its tensors what to do, as adaptive solvers do;
    * :meth:`_adapt`, if it learns from data before training, and :meth:`_adapt_to_draws`, if it can learn from draws
      where there are no data;
    * :meth:`_observe`, if it keeps statistics of data up to date during training;
    * :meth:`before_step`, if it keeps another state that changes during training, such as that of power iterations.

    A layer remembers nothing between calls, so that copies, pickles and log-densities are never stale.
    :meth:`with_cache` returns a view that remembers.

    Args:
        dim: the event size D, or the event shape, such as ``(channels, height, width)``, at the data end.
        context_dim: size or shape of the context that the parameters depend on, 0 for none.
        base_dim: the event size or shape at the base end, with as many elements; None if the layer does not change it.

    Shapes: z is ``(..., *base_shape)``, x is ``(..., *event_shape)``, a context is ``(..., *context_shape)``; batch
    shapes broadcast; a log-determinant has the batch shape.

    Attributes:
        event_shape: the shape of x without its batch shape, ``(D,)`` for vectors.
        base_shape: the shape of z without its batch shape; equal to ``event_shape`` in most layers.
        dim: the number of elements of an event.
        context_shape: the shape of a context without its batch shape, empty if the layer takes none.
        context_dim: the number of elements of a context, 0 if the layer takes none.

    Raises:
        OptionError: if a size of events or contexts is not positive.
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
            raise OptionError(f"{type(self).__name__} needs dim >= 1 and context_dim >= 0, got {dim} and {context_dim}")
        self.dim = self.event_shape.numel()
        self.context_dim = self.context_shape.numel() if self.context_shape else 0
        if self.base_shape.numel() != self.dim:
            raise ShapeError(
                f"{type(self).__name__} cannot map events of {described(self.base_shape)} to events of "
                f"{described(self.event_shape)}: a bijection keeps the number of elements"
            )
        # A subclass may have properties in their place.
        if len(self.base_shape) > 1 and type(self).domain is FlowTransform.domain:
            self.domain = constraints.independent(constraints.real, len(self.base_shape))
        if len(self.event_shape) > 1 and type(self).codomain is FlowTransform.codomain:
            self.codomain = constraints.independent(constraints.real, len(self.event_shape))
        self._register_adapted()

    def declare_angles(self, angles: Sequence[bool]) -> None:
        r"""Declare that the layer maps angles to angles at some indices along the last axis, and reals elsewhere.

        Its map must commute with whole turns there, :math:`t(z + 2\pi k) = t(z) + 2\pi k`, and be periodic in what else
        it computes from these elements. A constructor calls this.
        """
        if any(angles):
            self.domain = angles_and_reals(angles, len(self.base_shape))
            self.codomain = angles_and_reals(angles, len(self.event_shape))

    # These are the hooks of a subclass: it must write the first two.

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        """Return ``x = t(z)`` and ``log |det dx/dz|``, for arguments that were checked."""
        raise NotImplementedError

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        """Return ``z = t.inv(x)`` and ``log |det dz/dx|``, for arguments that were checked and an x in the codomain."""
        raise NotImplementedError

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        """Return what :meth:`forward_and_score` does, for a z that requires gradients and under ``enable_grad``."""
        x, ladj = self._forward_and_ladj(z, context)
        at = x.detach().requires_grad_()
        z_again, inverse_ladj = self._inverse_and_ladj(at, context)
        (score,) = pull_back((z_again, inverse_ladj), (score, torch.ones_like(ladj)), (at,))
        return x, ladj, score

    def _forward_value(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Return x alone. Layers whose log-determinant is dear write it without that."""
        return self._forward_and_ladj(z, context)[0]

    def _inverse_value(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return z alone, for x inside of the codomain."""
        return self._inverse_and_ladj(x, context)[0]

    def _exact(self) -> "FlowTransform":
        """Return a view with the exact log-determinant; it is called only if :attr:`ladj_is_exact` is false."""
        raise InexactError(
            f"the log-determinant of {type(self).__name__} is an estimate, and the layer has no exact one: write its "
            "_exact, or train it by an objective of your own that uses flow().estimated()"
        )

    @property
    def ladj_is_exact(self) -> bool:
        """Whether the log-determinants are exact, rather than estimates."""
        return True

    @property
    def value_is_exact(self) -> bool:
        """Whether values are exact, rather than approximations that are good enough for training.

        Where they are not, neither are the log-determinants, and :meth:`exact` gives a view with better values.
        """
        return self.ladj_is_exact or all(
            part.value_is_exact for part in self.modules() if isinstance(part, FlowTransform) and part is not self
        )

    @property
    def reads_values(self) -> bool:
        """Whether a call depends on the values of tensors by more than tensor operations, so that none records it."""
        return False

    @property
    def is_bounding(self) -> bool:
        """Whether some numbers x have no base value, since the codomain is bounded.

        Layers that map angles to angles are maps of all numbers, which commute with whole turns. Discrete layers take
        categories alone, and no number nearby could stand for another.
        """
        if is_unbounded(self.codomain) or self.codomain.is_discrete:
            return False
        keeps_angles = angles_in(self.domain, self.base_shape[-1]) == angles_in(self.codomain, self.event_shape[-1])
        return not (keeps_angles and is_unbounded(without_angles(self.codomain)))

    @property
    def is_onto_reals(self) -> bool:
        """Whether every real x has a base value, so that no log-determinant of the inverse is -inf."""
        return not self.is_bounding

    # What follows is the same for all layers.

    def exact(self) -> "FlowTransform":
        """Return this layer if its log-determinants are exact, else a view of the same parameters whose are.

        Raises:
            InexactError: if the layer has no exact log-determinant.
        """
        return self if self.ladj_is_exact else self._exact()

    def _checked_pair(self, value: Tensor, ladj: Tensor, shape: torch.Size) -> Pair:
        """Return what a method of a subclass gave, if it is events of this shape with one log-determinant each."""
        batch_shape = value.shape[: value.dim() - len(shape)]
        if value.shape[len(batch_shape) :] != shape or ladj.shape != batch_shape:
            raise ShapeError(
                f"{type(self).__name__} gave a value of shape {tuple(value.shape)} with log-determinants of shape "
                f"{tuple(ladj.shape)}: it must give events of {described(shape)}, and a log-determinant for each event"
            )
        return value, ladj

    def forward_and_ladj(self, z: Tensor, context: Tensor | None = None) -> Pair:
        """Return ``x = t(z)`` and ``log |det dx/dz|``, from one pass.

        Args:
            z: ``(..., *base_shape)``.
            context: ``(..., *context_shape)``, if the layer takes one.

        Raises:
            ShapeError: if z or the context has another shape, or their batch shapes do not broadcast.
        """
        return self._forward_and_ladj(self._checked(z, context, self.base_shape), context)

    def inverse_and_ladj(self, x: Tensor, context: Tensor | None = None) -> Pair:
        """Return ``z = t.inv(x)`` and ``log |det dz/dx|``, from one pass.

        Where x is outside of the codomain or on its boundary, there is no z: the log-determinant is -inf, so that
        the density is zero, and z is the base value of some other x, so that the gradients of other rows stay finite.

        Args:
            x: ``(..., *event_shape)``.
            context: ``(..., *context_shape)``, if the layer takes one.

        Raises:
            ShapeError: if x or the context has another shape, or their batch shapes do not broadcast.
            InversionError: if the layer inverts by a search that misses its target.
        """
        x = self._checked(x, context, self.event_shape)
        return self._guarded(x, context) if self.is_bounding else self._inverse_and_ladj(x, context)

    def _guarded(self, x: Tensor, context: Tensor | None) -> Pair:
        """Return what :meth:`_inverse_and_ladj` does, with log-determinant -inf outside of the codomain."""
        num_axes = len(self.event_shape)
        is_in = is_inside(self.codomain, x, num_axes)
        z, ladj = self._inverse_and_ladj(moved_inside(self.codomain, x, is_in, num_axes), context)
        return z, torch.where(is_in, ladj, -torch.inf)

    def base_value(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return ``z = t.inv(x)``; NaN where there is none, since x is outside of the codomain.

        Args:
            x: ``(..., *event_shape)``.
            context: ``(..., *context_shape)``, if the layer takes one.

        Example:
            >>> t = pf.Flow([Planar(1)], support=constraints.positive).transform
            >>> t.base_value(torch.tensor([[1.0], [-1.0]])).tolist()
            [[0.0], [nan]]
        """
        if self.is_onto_reals:
            return self._inverse_value(self._checked(x, context, self.event_shape), context)
        z, ladj = self.inverse_and_ladj(x, context)
        return torch.where((ladj == -torch.inf).reshape(*ladj.shape, *[1] * len(self.base_shape)), torch.nan, z)

    def forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        r"""Return ``x = t(z)``, ``log |det dx/dz|``, and the score of the law of x, given that of the law of z.

        .. math:: \nabla_x \log q(x) = J^{-\top} (\nabla_z \log p(z) - \nabla_z \log|\det J|), \qquad
            J = \partial x / \partial z

        (Vaitl et al. 2024, arXiv:2403.15881). The score treats z and all parameters as constants: no gradients flow
        through it. By default it costs a pass through the inverse and a backward pass; layers with a cheaper formula
        write it. The method does not run under ``torch.func``.

        Args:
            z: ``(..., *base_shape)``.
            score: :math:`\nabla_z \log p(z)`, of the shape of z.
            context: ``(..., *context_shape)``, if the layer takes one.

        Raises:
            InexactError: if the layer maps categories, whose law has no score.

        Example:
            >>> t = Planar(3)
            >>> z = torch.randn(5, 3)
            >>> x, ladj, score = t.forward_and_score(z, -z)  # z is standard normal
            >>> x.shape, ladj.shape, score.shape
            (torch.Size([5, 3]), torch.Size([5]), torch.Size([5, 3]))
        """
        if self.domain.is_discrete or self.codomain.is_discrete:
            raise InexactError(f"{type(self).__name__} maps categories, whose law has no density, and so no score")
        z = self._checked(z, context, self.base_shape)
        score = score.detach().expand_as(z)
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            x, ladj, score = self._forward_and_score(z, score, context)
        return (x, ladj, score) if torch.is_grad_enabled() else (x.detach(), ladj.detach(), score)

    def log_abs_det_jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        """Return ``log |det dx/dz|`` at z; x is an argument because torch passes it, and is not used."""
        return self.forward_and_ladj(z)[1]

    @property
    def inv(self) -> "FlowTransform":
        """The inverse as a layer, a module with the same parameters; ``t.inv.inv is t``."""
        # A new object each time: it refers to its layer, and a layer that owned it in turn would recurse for ever.
        return Inverse(self)

    def layer_context(self, context: Tensor | None) -> Tensor | None:
        """Return a context as the layer's own computation takes it; a composition may take off location and scale."""
        return context

    def condition(self, context: Tensor) -> "FlowTransform":
        """Return the layer at one context ``(..., *context_shape)``, which takes no context itself."""
        return Conditioned(self, context)

    def with_cache(self, cache_size: int = 1) -> "FlowTransform":
        """Return a view that remembers its last pair of values for ``cache_size=1``, the layer itself for 0."""
        return Cached(self) if cache_size else self

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """Return the shape of x for a z of this shape."""
        return torch.Size(shape)[: len(shape) - len(self.base_shape)] + self.event_shape

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """Return the shape of z for an x of this shape."""
        return torch.Size(shape)[: len(shape) - len(self.event_shape)] + self.base_shape

    # torch.jit asks a module for all names that its class has, by hasattr, which lets other errors than AttributeError
    # through. Torch's own properties raise such errors where they make no sense.
    @property
    def sign(self) -> int:
        raise AttributeError(f"{type(self).__name__} maps vectors or arrays, so it has no sign")

    @property
    def event_dim(self) -> int:
        if len(self.base_shape) != len(self.event_shape):
            raise AttributeError(f"{type(self).__name__} changes the number of dimensions of an event")
        return len(self.event_shape)

    def __getstate__(self) -> dict[str, Any]:
        drop_param_store_references(self)
        return super().__getstate__()

    def _call(self, z: Tensor) -> Tensor:
        return self._data_value(z, None)

    def _inverse(self, x: Tensor) -> Tensor:
        return self.base_value(x)

    def _data_value(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Return ``x = t(z)`` at a context."""
        return self._forward_value(self._checked(z, context, self.base_shape), context)

    def _checked(self, value: Tensor, context: Tensor | None, shape: torch.Size) -> Tensor:
        return expanded_to_context(value, context, shape, self.context_shape, type(self).__name__)

    def extra_repr(self) -> str:
        base = f", base_dim={as_given(self.base_shape)}" if self.base_shape != self.event_shape else ""
        context = f", context_dim={as_given(self.context_shape)}" if self.context_dim else ""
        return f"dim={as_given(self.event_shape)}{base}{context}"

    __repr__ = nn.Module.__repr__


def drop_param_store_references(module: nn.Module) -> None:
    """Make a module whose parameters are in Pyro's param store fit for pickle.

    The store attaches a weak reference, which pickle refuses, to each parameter that it returns. It does so again at
    the next access, so that nothing is lost.
    """
    for parameter in module.parameters():
        vars(parameter).pop("unconstrained", None)


# The views are layers themselves, so that their file needs the class above, whose methods make them.
from pyroflows.transforms.views import Cached, Conditioned, Inverse  # noqa: E402
