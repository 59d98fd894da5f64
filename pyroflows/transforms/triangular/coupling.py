"""The coupling structure: one part of the dimensions passes unchanged and determines the parameters of the rest."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyroflows.errors import OptionError, ShapeError
from pyroflows.nets import MLP, AngleFeatures, Conv, Parameters, Pointwise, ResidualConv, ResidualMLP, ScaledMLP
from pyroflows.nets.checks import ConditionerFactory, checked_conditioner, checked_factory
from pyroflows.nets.constants import Constants
from pyroflows.shapes import axis_from_the_end, described
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.gradients import elementwise_score, pull_back
from pyroflows.transforms.triangular.masks import half
from pyroflows.transforms.univariate import UnivariateLike, univariate_named
from pyroflows.transforms.univariate.by_column import checked_columns, of_columns
from pyroflows.transforms.univariate.layout import joined, split

_POINTWISE: dict[str, ConditionerFactory] = {"mlp": MLP, "residual": ResidualMLP, "scaled_mlp": ScaledMLP}
_CONVOLUTIONAL: dict[str, ConditionerFactory] = {"conv": Conv, "residual_conv": ResidualConv}


class Coupling(Constants, FlowTransform):
    r"""The coupling :math:`x_A = z_A, \; x_B = T(z_B; \theta(z_A, c))`, where the mask marks A.

    Part A passes unchanged and determines the parameters of the map of part B. A and B are parts of the dimensions of a
    vector, or of the indices of one axis of an event with more axes, such as the channels of an image ``(C, H, W)``, or
    of the places of the axes after it, such as the squares of a checkerboard.

    The log-determinant is :math:`\sum_{j \in B} \log T'(z_j; \theta_j)`. Both directions are parallel and cost one pass
    of the conditioner each. With the additive map this is a layer of NICE (Dinh et al. 2015, arXiv:1410.8516), with the
    affine map one of RealNVP (Dinh et al. 2017, arXiv:1605.08803).

    Args:
        dim: the event size D, or the event shape.
        univariate: the map T: "additive", "scale", "affine", "leaky_relu", "sinh_arcsinh", "spline", "circular_spline",
            "sos", "monotone", or an instance; or a list of these, one for each dimension of a vector.
        mask: one boolean for each index of the masked axis, true for those that pass, see
            :mod:`pyroflows.transforms.masks`; None lets the first half pass, which is nothing if there is one index. Or
            booleans ``(1, *rest)``, where ``rest`` are the axes after the masked one: those places pass for all
            indices, as with :func:`pyroflows.transforms.masks.checkerboard`.
        conditioner: "mlp", "scaled_mlp", "residual", "conv", "residual_conv", or a factory that is called as
            ``factory(in_dim, out_dim, hidden_dims)``. Its module maps :math:`z_A` and the context, one after the other
            along the masked axis, to the parameters; angles are replaced by their cosines, and their sines follow. If
            there is neither, each element has parameters of its own, without a network. The first three named networks
            act along the masked axis and treat all places of the other axes alike, as 1 x 1 convolutions do. The last
            two are convolutions over ``rest``, :class:`pyroflows.nets.Conv` and :class:`pyroflows.nets.ResidualConv`.
        hidden_dims: widths of the conditioner's hidden layers.
        context_dim: size of the context vector c, 0 for none; the conditioner sees it at all places. Or the shape
            ``(channels, *rest)`` of a context that it sees place by place, such as an image.
        axis: the masked axis of the event.

    Shapes: z and x are ``(..., *event_shape)``, a context is ``(..., *context_shape)``. The conditioner maps
    ``(..., in_dim)`` to ``(..., out_dim)``. If the event has axes after the masked one, it maps
    ``(N, in_dim, *rest)`` to ``(N, out_dim, *rest)``, as convolutions do; N counts all places of the axes before the
    masked one, those of the batch and those of the event. ``in_dim`` is the number of indices that pass, of which
    angles count twice, plus the size of a context vector or the channels of a context. ``out_dim`` is the number of
    indices that are transformed times the number of parameters of T; the first parameter of all these indices comes
    before the second. With a mask of places all indices count in both, and the conditioner sees zeros at the places
    that are transformed.

    Raises:
        OptionError: if the mask does not fit or leaves nothing to pass or to transform, if the event has no such axis,
            if a name is unknown, or of a network that cannot act there or would see nothing, if the context has another
            shape, or if the conditioner contains dropout or batch normalisation.
        ShapeError: at a call, if the conditioner gives parameters of another shape.

    Example:
        >>> t = Coupling(4, mask=[True, False, True, False])
        >>> z = torch.randn(5, 4)
        >>> x = t(z)
        >>> torch.equal(x[:, ::2], z[:, ::2]), torch.allclose(t.inv(x), z, atol=1e-5)
        (True, True)
        >>> images = torch.randn(5, 4, 8, 6)
        >>> Coupling((4, 8, 6), mask=masks.half(4), conditioner="conv")(images).shape
        torch.Size([5, 4, 8, 6])
        >>> t = Coupling((4, 8, 6), mask=masks.checkerboard(8, 6), conditioner="conv", context_dim=(1, 8, 6))
        >>> t.condition(torch.randn(5, 1, 8, 6))(images).shape
        torch.Size([5, 4, 8, 6])
    """

    passing: Tensor
    transformed: Tensor
    place: Tensor

    def __init__(
        self,
        dim: int | Sequence[int],
        univariate: UnivariateLike = "affine",
        mask: Sequence[bool] | Tensor | None = None,
        conditioner: str | ConditionerFactory = "mlp",
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int | Sequence[int] = 0,
        axis: int = 0,
    ) -> None:
        super().__init__(dim, context_dim)
        self.univariate = univariate_named(univariate)
        angles = checked_columns(self.univariate, self.event_shape, "Coupling")
        self.declare_angles(angles)
        self.axis = axis_from_the_end(axis, self.event_shape, "Coupling")
        size = self.event_shape[self.axis]
        self.rest = self.event_shape[len(self.event_shape) + self.axis + 1 :]
        if len(self.context_shape) > 1 and self.context_shape[1:] != self.rest:
            raise OptionError(_wrong_context(self.context_shape, self.event_shape, self.rest))
        mask = half(size) if mask is None else torch.as_tensor(mask)
        self.mask = _checked_mask(mask, self.event_shape, self.axis)
        self.masks_places = mask.dim() > 1
        # Parts of the places are parts of one axis, once the axes after the masked one are flattened.
        self.split_axis = -1 if self.masks_places else self.axis
        self.register_constants()
        self.num_blocks = 1 + sum(a != b for a, b in pairwise(self.mask))
        num_axes = len(self.event_shape) - (len(self.rest) - 1 if self.masks_places else 0)
        self.event_axes = tuple(range(-num_axes, 0))
        # The masked axis is the last one wherever some columns are angles and others are not.
        seen = range(size) if self.masks_places else self.passing.tolist()
        given = [all(angles) or (any(angles) and angles[i]) for i in seen]
        self.features = AngleFeatures(given, self.axis) if any(given) else None
        self.univariate_of_b = of_columns(self.univariate, self.transformed.tolist())

        self.context_channels = self.context_shape[0] if self.context_shape else 0
        self.in_dim = len(given) + sum(given) + self.context_channels
        num_transformed = size if self.masks_places else len(self.transformed)
        self.theta_shape = (num_transformed * self.univariate_of_b.num_params, *self.rest)
        if not self.in_dim and isinstance(conditioner, str) and conditioner in _CONVOLUTIONAL and self.rest:
            raise OptionError(
                f"Coupling with events of {described(self.event_shape)} cannot split one index along its axis "
                f"{len(self.event_shape) + self.axis}, so that conditioner={conditioner!r} would see nothing: use "
                f"mask=masks.checkerboard{tuple(self.rest)}, or Squeeze, which makes channels of an image's pixels"
            )
        self.conditioner = (
            self._network(conditioner, hidden_dims) if self.in_dim else Parameters(torch.zeros(self.theta_shape))
        )

    def _network(self, conditioner: str | ConditionerFactory, hidden_dims: Sequence[int]) -> nn.Module:
        """Return the network of a factory or a name."""
        sizes, num_axes = (self.in_dim, self.theta_shape[0], hidden_dims), len(self.rest)
        if not isinstance(conditioner, str):
            return checked_conditioner(checked_factory(conditioner)(*sizes))
        if conditioner not in {**_POINTWISE, **_CONVOLUTIONAL}:
            names = sorted([*_POINTWISE, *_CONVOLUTIONAL])
            raise OptionError(f"conditioner must be one of {names} or a factory, got {conditioner!r}")
        if conditioner in _POINTWISE and self.masks_places:
            raise OptionError(
                f"Coupling with a mask of places needs a conditioner that looks at other places, but {conditioner!r} "
                f"treats each alone: use one of {sorted(_CONVOLUTIONAL)}, or a factory"
            )
        if conditioner in _CONVOLUTIONAL:
            if not 1 <= num_axes <= 3:
                raise OptionError(
                    f"Coupling with conditioner={conditioner!r} convolves over one to three axes after the masked one, "
                    f"but events of {described(self.event_shape)} have {num_axes}"
                )
            return _CONVOLUTIONAL[conditioner](*sizes, num_axes)
        net = _POINTWISE[conditioner](*sizes)
        return Pointwise(net, num_axes) if num_axes else net

    def constants(self) -> dict[str, Tensor | None]:
        mask = torch.tensor(self.mask)
        passing, transformed = mask.nonzero().squeeze(-1), (~mask).nonzero().squeeze(-1)
        place = torch.cat([passing, transformed]).argsort()
        return {"passing": passing, "transformed": transformed, "place": place}

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        z_a, z_b = self._split(z)
        x_b, log_slopes = self.univariate_of_b.forward_and_ladj(z_b, self._theta(z_a, context))
        return self._join(z_a, x_b), log_slopes.sum(self.event_axes)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        x_a, x_b = self._split(x)
        z_b, log_slopes = self.univariate_of_b.inverse_and_ladj(x_b, self._theta(x_a, context))
        return self._join(x_a, z_b), log_slopes.sum(self.event_axes)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        z_a, z_b = self._split(z)
        x_b, log_slopes = self.univariate_of_b.forward_and_ladj(z_b, self._theta(z_a, context))
        score_a, score_b = self._split(score)
        score_b = elementwise_score(z_b, log_slopes, score_b)
        # log q depends on z_A through x_B and the log-determinant; one backward pass of the conditioner gives both.
        (through_b,) = pull_back((x_b, log_slopes), (score_b, torch.ones_like(log_slopes)), (z_a,))
        return self._join(z_a, x_b), log_slopes.sum(self.event_axes), self._join(score_a - through_b, score_b)

    def _theta(self, z_a: Tensor, context: Tensor | None) -> Tensor:
        """Return the parameters of T at z_B, ``(*z_b.shape, num_params)``."""
        theta = self._parameters_at(self._seen(z_a, context)) if self.in_dim else self.conditioner()
        axis = self.axis
        if self.masks_places:
            theta, axis = theta.flatten(axis + 1).index_select(-1, self.transformed), axis + len(self.rest) - 1
        # Memory stays parameter-major, so that each parameter is one contiguous block over the elements.
        return theta.unflatten(axis, (self.univariate_of_b.num_params, -1)).movedim(axis - 1, -1)

    def _seen(self, z_a: Tensor, context: Tensor | None) -> Tensor:
        """Return what the conditioner sees, ``(..., in_dim, *rest)``."""
        if self.masks_places:
            z_a = self._join(z_a, z_a.new_zeros(*z_a.shape[:-1], len(self.transformed)))
        seen = z_a if self.features is None else self.features(z_a)
        if context is None:
            return seen
        # A vector is repeated at all places of the axes after the masked one; both, at those of the axes before it.
        num_before = len(self.event_shape) - 1 - len(self.rest)
        by_place = context.shape[context.dim() - len(self.context_shape) + 1 :] or (1,) * len(self.rest)
        batch_shape = context.shape[: context.dim() - len(self.context_shape)]
        context = context.reshape(*batch_shape, *[1] * num_before, self.context_channels, *by_place)
        return torch.cat([seen, context.expand(*seen.shape[: self.axis], -1, *self.rest)], self.axis)

    def _parameters_at(self, given: Tensor) -> Tensor:
        """Return what the conditioner computes, ``(..., out_dim, *rest)``."""
        is_batch = not self.rest or given.dim() == 1 - self.axis
        batch = given if is_batch else given.reshape(-1, *given.shape[self.axis :])
        theta = self.conditioner(batch)
        if theta.shape[self.axis :] != self.theta_shape:
            shapes = f"{tuple(batch.shape)} to (..., {', '.join(map(str, self.theta_shape))})"
            raise ShapeError(f"the conditioner of Coupling must map {shapes}, but gave {tuple(theta.shape)}")
        return theta if is_batch else theta.reshape(*given.shape[: self.axis], *self.theta_shape)

    # If A and B are one block each, split and cat take half the time of selection by index.
    def _split(self, z: Tensor) -> Pair:
        axis = self.split_axis
        if self.masks_places:
            z = z.flatten(self.axis + 1)
        if self.num_blocks > 2:
            return z.index_select(axis, self.passing), z.index_select(axis, self.transformed)
        sizes = [len(self.passing), len(self.transformed)]
        if self.mask[0]:
            z_a, z_b = split(z, sizes, axis)
        else:
            z_b, z_a = split(z, sizes[::-1], axis)
        return z_a, z_b

    def _join(self, z_a: Tensor, x_b: Tensor) -> Tensor:
        if self.masks_places:
            return torch.cat([z_a, x_b], -1).index_select(-1, self.place).unflatten(-1, self.rest)
        if self.num_blocks > 2:
            return torch.cat([z_a, x_b], self.axis).index_select(self.axis, self.place)
        return joined([z_a, x_b] if self.mask[0] else [x_b, z_a], self.axis, x_b)


def _wrong_context(context_shape: torch.Size, event_shape: torch.Size, rest: torch.Size) -> str:
    """Return the message for contexts that are neither vectors nor have the places of an event."""
    fitting = f" or has the shape (channels, {', '.join(map(str, rest))})" if rest else ""
    return (
        f"a context of Coupling with events of {described(event_shape)} is a vector{fitting}, but got "
        f"context_dim={tuple(context_shape)}"
    )


def _checked_mask(mask: Tensor, event_shape: torch.Size, axis: int) -> list[bool]:
    """Return the mask as a list if it fits, has a boolean for each index or place, and lets some pass, but not all."""
    size, num_axes = event_shape[axis], len(event_shape)
    rest = event_shape[num_axes + axis + 1 :]
    values = mask.flatten().tolist()
    where = "dimensions" if num_axes == 1 else f"indices of axis {num_axes + axis}"
    layer = f"Coupling with events of {described(event_shape)}"
    if mask.dtype != torch.bool or mask.shape not in ((size,), (1, *rest) if rest else (size,)):
        what = f"{size} booleans, true for the {where} that pass unchanged"
        places = f", or booleans of shape {(1, *rest)}, true for the places that do" if rest else ""
        raise OptionError(f"{layer}: the mask must be {what}{places}, got {mask.tolist()}")
    where = where if mask.dim() == 1 else "places"
    if all(values):
        raise OptionError(f"{layer}: a mask that is true everywhere transforms nothing: make it false for some {where}")
    if len(values) > 1 and not any(values):
        raise OptionError(
            f"{layer}: a mask that is false everywhere leaves nothing to condition on: make it true for some {where}, "
            "or use Elementwise"
        )
    return values
