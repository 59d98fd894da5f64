"""The coupling structure: one part of the dimensions passes unchanged and determines the parameters of the rest."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyroflows.errors import OptionError, ShapeError
from pyroflows.nets import MLP, AngleFeatures, Parameters, Pointwise, ResidualMLP, ScaledMLP
from pyroflows.nets.checks import ConditionerFactory, checked_conditioner
from pyroflows.nets.constants import Constants
from pyroflows.shapes import axis_from_the_end, described
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.gradients import elementwise_score, pull_back
from pyroflows.transforms.triangular.masks import half
from pyroflows.transforms.univariate import UnivariateLike, univariate_named
from pyroflows.transforms.univariate.by_column import checked_columns, of_columns

_CONDITIONERS: dict[str, ConditionerFactory] = {"mlp": MLP, "residual": ResidualMLP, "scaled_mlp": ScaledMLP}


class Coupling(Constants, FlowTransform):
    r"""The coupling :math:`x_A = z_A, \; x_B = T(z_B; \theta(z_A, c))`, where the mask marks A.

    Part A passes unchanged and determines the parameters of the map of part B. A and B are parts of the dimensions of a
    vector, or of the indices of one axis of an event with more axes, such as the channels of an image ``(C, H, W)``.

    The log-determinant is :math:`\sum_{j \in B} \log T'(z_j; \theta_j)`. Both directions are parallel and cost one pass
    of the conditioner each. With the additive map this is a layer of NICE (Dinh et al. 2015, arXiv:1410.8516), with the
    affine map one of RealNVP (Dinh et al. 2017, arXiv:1605.08803).

    Args:
        dim: the event size D, or the event shape.
        univariate: the map T: "additive", "scale", "affine", "leaky_relu", "sinh_arcsinh", "spline", "circular_spline",
            "sos", "monotone", or an instance; or a list of these, one for each dimension of a vector.
        mask: one boolean for each index of the masked axis, true for those that pass, see
            :mod:`pyroflows.transforms.masks`; None lets the first half pass, which is nothing if there is one index.
        conditioner: "mlp", "scaled_mlp", "residual", or a factory that is called as
            ``factory(in_dim, out_dim, hidden_dims)``. Its module maps :math:`z_A` and the context, one after the other
            along the masked axis, to the parameters; angles are replaced by their cosines, and their sines follow. If
            there is neither, each element has parameters of its own, without a network. The named networks act along
            the masked axis and treat all places of the other axes alike, as 1 x 1 convolutions do.
        hidden_dims: widths of the conditioner's hidden layers.
        context_dim: size of the context vector c, 0 for none; the conditioner sees it at all places.
        axis: the masked axis of the event.

    Shapes: z and x are ``(..., *event_shape)``, a context is ``(..., context_dim)``. The conditioner maps
    ``(..., in_dim)`` to ``(..., out_dim)``. If the event has axes after the masked one, ``rest``, it maps
    ``(N, in_dim, *rest)`` to ``(N, out_dim, *rest)``, as convolutions do; N counts all places of the axes before the
    masked one, those of the batch and those of the event. ``in_dim`` is the number of indices that pass, of which
    angles count twice, plus ``context_dim``. ``out_dim`` is the number of indices that are transformed times the number
    of parameters of T; the first parameter of all these indices comes before the second.

    Raises:
        OptionError: if the mask does not fit or leaves nothing to pass or to transform, if the event has no such axis,
            if a name is unknown, if the context is not a vector, or if the conditioner contains dropout or batch
            normalisation.
        ShapeError: at a call, if the conditioner gives parameters of another shape.

    Example:
        >>> t = Coupling(4, mask=[True, False, True, False])
        >>> z = torch.randn(5, 4)
        >>> x = t(z)
        >>> torch.equal(x[:, ::2], z[:, ::2]), torch.allclose(t.inv(x), z, atol=1e-5)
        (True, True)
        >>> def convolutions(in_dim, out_dim, hidden_dims):
        ...     return torch.nn.Conv2d(in_dim, out_dim, kernel_size=3, padding=1)
        >>> Coupling((4, 8, 8), mask=masks.half(4), conditioner=convolutions)(torch.randn(5, 4, 8, 8)).shape
        torch.Size([5, 4, 8, 8])
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
        context_dim: int = 0,
        axis: int = 0,
    ) -> None:
        super().__init__(dim, context_dim)
        if isinstance(conditioner, str) and conditioner not in _CONDITIONERS:
            raise OptionError(f"conditioner must be one of {sorted(_CONDITIONERS)} or a factory, got {conditioner!r}")
        if len(self.context_shape) > 1:
            raise OptionError(f"Coupling takes a vector as context, but got context_dim={context_dim}")
        self.univariate = univariate_named(univariate)
        angles = checked_columns(self.univariate, self.event_shape, "Coupling")
        self.declare_angles(angles)
        self.axis = axis_from_the_end(axis, self.event_shape, "Coupling")
        size = self.event_shape[self.axis]
        self.mask = _checked_mask(half(size) if mask is None else torch.as_tensor(mask), self.event_shape, self.axis)
        self.register_constants()
        self.num_blocks = 1 + sum(a != b for a, b in pairwise(self.mask))
        self.event_axes = tuple(range(-len(self.event_shape), 0))
        # The masked axis is the last one wherever some columns are angles and others are not.
        given = [all(angles) or (any(angles) and angles[i]) for i in self.passing.tolist()]
        self.features = AngleFeatures(given, self.axis) if any(given) else None
        self.univariate_of_b = of_columns(self.univariate, self.transformed.tolist())

        self.rest = self.event_shape[len(self.event_shape) + self.axis + 1 :]
        in_dim = len(self.passing) + sum(given) + self.context_dim
        out_dim = len(self.transformed) * self.univariate_of_b.num_params
        self.theta_shape = (out_dim, *self.rest)
        self.conditioner = (
            _network(conditioner, in_dim, out_dim, hidden_dims, len(self.rest))
            if in_dim
            else Parameters(torch.zeros(self.theta_shape))
        )

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
        given = z_a if self.features is None else self.features(z_a)
        given = given if context is None else torch.cat([given, self._at_all_places(context, z_a)], self.axis)
        theta = self._parameters_at(given) if len(self.mask) > 1 or context is not None else self.conditioner()
        # Memory stays parameter-major, so that each parameter is one contiguous block over the elements.
        return theta.unflatten(self.axis, (self.univariate_of_b.num_params, -1)).movedim(self.axis - 1, -1)

    def _at_all_places(self, context: Tensor, z_a: Tensor) -> Tensor:
        """Return the context along the masked axis, repeated at each place of the other axes."""
        if len(self.event_shape) > 1:
            others = [1] * (len(self.event_shape) - 1)
            others.insert(self.axis + len(self.event_shape), self.context_dim)
            context = context.reshape(*context.shape[:-1], *others)
        return context.expand(*z_a.shape[: self.axis], self.context_dim, *self.rest)

    def _parameters_at(self, given: Tensor) -> Tensor:
        """Return what the conditioner computes, ``(..., out_dim, *rest)``."""
        batch = given.reshape(-1, *given.shape[self.axis :]) if self.rest else given
        theta = self.conditioner(batch)
        if theta.shape[self.axis :] != self.theta_shape:
            shapes = f"{tuple(batch.shape)} to (..., {', '.join(map(str, self.theta_shape))})"
            raise ShapeError(f"the conditioner of Coupling must map {shapes}, but gave {tuple(theta.shape)}")
        return theta.reshape(*given.shape[: self.axis], *self.theta_shape) if self.rest else theta

    # If A and B are one block each, split and cat take half the time of selection by index.
    def _split(self, z: Tensor) -> Pair:
        if self.num_blocks > 2:
            return z.index_select(self.axis, self.passing), z.index_select(self.axis, self.transformed)
        sizes = [len(self.passing), len(self.transformed)]
        if self.mask[0]:
            z_a, z_b = z.split(sizes, self.axis)
        else:
            z_b, z_a = z.split(sizes[::-1], self.axis)
        return z_a, z_b

    def _join(self, z_a: Tensor, x_b: Tensor) -> Tensor:
        if self.num_blocks > 2:
            return torch.cat([z_a, x_b], self.axis).index_select(self.axis, self.place)
        parts = [z_a, x_b] if self.mask[0] else [x_b, z_a]
        if self.axis == -1 and x_b.dim() > 1 and x_b.stride(-1) > x_b.stride(-2):
            return torch.cat([part.movedim(-1, 0) for part in parts]).movedim(0, -1)
        return torch.cat(parts, self.axis)


def _network(
    conditioner: str | ConditionerFactory, in_dim: int, out_dim: int, hidden_dims: Sequence[int], num_axes: int
) -> nn.Module:
    """Return the network of a factory or a name; a named one acts at each place of the axes after the masked one."""
    if not isinstance(conditioner, str):
        return checked_conditioner(conditioner(in_dim, out_dim, hidden_dims))
    net = _CONDITIONERS[conditioner](in_dim, out_dim, hidden_dims)
    return Pointwise(net, num_axes) if num_axes else net


def _checked_mask(mask: Tensor, event_shape: torch.Size, axis: int) -> list[bool]:
    """Return the mask as a list if it has a boolean for each index and lets some pass, but not all."""
    values, size = mask.tolist(), event_shape[axis]
    num_axes = len(event_shape)
    where = "dimensions" if num_axes == 1 else f"indices of axis {num_axes + axis}"
    layer = f"Coupling with events of {described(event_shape)}"
    if mask.dtype != torch.bool or mask.shape != (size,):
        what = f"{size} booleans, true for the {where} that pass unchanged"
        raise OptionError(f"{layer}: the mask must be {what}, got {values}")
    if all(values):
        raise OptionError(f"{layer}: a mask that is true everywhere transforms nothing: make it false for some {where}")
    if size > 1 and not any(values):
        raise OptionError(
            f"{layer}: a mask that is false everywhere leaves nothing to condition on: make it true for some {where}, "
            "or use Elementwise"
        )
    return values
