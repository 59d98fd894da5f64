"""The autoregressive structure: the parameters of each dimension depend on the dimensions before it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflows.compiling.eager import is_transformed
from pyroflows.errors import FlowError, OptionError, ShapeError
from pyroflows.nets import MADE, CausalConv, OnAngles, ParameterSteps, ResMADE, ScaledMADE
from pyroflows.nets.checks import ConditionerFactory, checked_conditioner, checked_factory
from pyroflows.shapes import as_given, axis_from_the_end, described
from pyroflows.transforms.base import Pair, Triple
from pyroflows.transforms.gradients import attached, pull_back
from pyroflows.transforms.triangular.base import TriangularTransform
from pyroflows.transforms.triangular.transposed_solve import Solver, parameters_and_solver
from pyroflows.transforms.univariate import AffineMap, UnivariateLike, univariate_named
from pyroflows.transforms.univariate.by_column import checked_columns, of_column

_CONDITIONERS: dict[str, ConditionerFactory] = {
    "made": MADE,
    "scaled_made": ScaledMADE,
    "residual": ResMADE,
    "causal_conv": CausalConv,
}


class Autoregressive(TriangularTransform):
    r"""The autoregressive layer :math:`x_j = T(z_j; \theta_j(z_{<j}, c))`; one network computes all :math:`\theta_j`.

    Events are vectors, or have more axes, one of which is ordered: then :math:`z_j` are all elements at index j of that
    axis, and their parameters depend on all elements at earlier indices. In a sequence ``(channels, length)``, j is a
    time.

    The log-determinant is :math:`\sum_j \log T'(z_j; \theta_j)`. The forward direction is parallel; the inverse
    computes one index after the other. If the conditioner can be evaluated place by place
    (:class:`pyroflows.nets.Incremental`), as the named ones can, the whole inverse costs about one pass through it,
    otherwise one pass for each index. With the affine map, a stack of these layers is an inverse autoregressive flow
    (Kingma et al. 2016, arXiv:1606.04934), and a stack of their inverses a masked autoregressive flow (Papamakarios et
    al. 2017, arXiv:1705.07057).

    Args:
        dim: the event size D, or the event shape.
        univariate: the map T: "additive", "scale", "affine", "leaky_relu", "sinh_arcsinh", "spline", "circular_spline",
            "sos", "monotone", or an instance; or a list of these, one for each dimension of a vector.
        order: a permutation of ``range(D)``, or of the indices of the ordered axis; ``order[i]`` is the index at
            place i, and its parameters depend on those at the places before. None for ascending order.
        conditioner: "made", "scaled_made" or "residual" for vectors, "causal_conv" for vectors and events with two
            axes, such as ``(channels, length)``; or a factory that is called as
            ``factory(order, num_params, hidden_dims, context_dim)``. Its module maps ``(z, context)`` to
            ``(*z.shape, num_params)``, autoregressively in that order along the last axis of z. If the event has more
            axes, the layer moves the ordered one to the end: the network sees ``(..., *channels, length)``, and the
            factory also gets ``channels=``, a number if there is one such axis and a tuple if there are several. If T
            maps angles, the network sees their cosines and sines: there are twice as many channels of the first such
            axis, or two for vectors, and of its parameters those of the first half count.
        hidden_dims: widths of the conditioner's hidden layers.
        context_dim: size of the context c, 0 for none; with "causal_conv" also ``(context_channels, length)``, a
            sequence that is known in full.
        axis: the ordered axis of the event.

    Shapes: z and x are ``(..., *event_shape)``, a context is ``(..., *context_shape)``.

    Raises:
        OptionError: if ``order`` is not a permutation, a name is unknown, the event has no such axis, the conditioner
            contains dropout or batch normalisation, or it does not take the event or the context.
        ShapeError: at a call, if the conditioner gives parameters of another shape.

    Example:
        >>> iaf = Autoregressive(3)          # samples in one pass
        >>> maf = Autoregressive(3).inv      # scores in one pass
        >>> z = torch.randn(5, 3)
        >>> torch.allclose(maf.inv(maf(z)), z, atol=1e-5)
        True
        >>> wavenet = Autoregressive((2, 50), conditioner="causal_conv", hidden_dims=[16] * 6, context_dim=(1, 50))
        >>> wavenet.condition(torch.randn(1, 50))(torch.randn(5, 2, 50)).shape
        torch.Size([5, 2, 50])
        >>> time_first = Autoregressive((50, 2), conditioner="causal_conv", hidden_dims=[16] * 6, axis=0)
        >>> time_first(torch.randn(5, 50, 2)).shape
        torch.Size([5, 50, 2])
    """

    def __init__(
        self,
        dim: int | Sequence[int],
        univariate: UnivariateLike = "affine",
        order: Sequence[int] | None = None,
        conditioner: str | ConditionerFactory = "made",
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int | Sequence[int] = 0,
        axis: int = -1,
    ) -> None:
        super().__init__(dim, context_dim)
        self.axis = axis_from_the_end(axis, self.event_shape, "Autoregressive")
        channels = list(self.event_shape)
        length = channels.pop(self.axis)
        order = list(range(length)) if order is None else list(order)
        if sorted(order) != list(range(length)):
            raise OptionError(f"the order of Autoregressive must be a permutation of 0 to {length - 1}, got {order}")
        self.order = order
        self.univariate = univariate_named(univariate)
        angles = checked_columns(self.univariate, self.event_shape, "Autoregressive")
        self.declare_angles(angles)
        arguments = (order, self.univariate.num_params, hidden_dims, as_given(self.context_shape))
        factory = self._factory(conditioner)
        if any(angles):
            # If only some columns are angles, events are vectors, and the ordered axis is the last.
            is_angle = [True] * length if all(angles) else angles
            self.conditioner: nn.Module = OnAngles(factory, is_angle, *arguments, channels)
        else:
            options = {"channels": as_given(torch.Size(channels))} if channels else {}
            self.conditioner = factory(*arguments, **options)
        checked_conditioner(self.conditioner)

    def _factory(self, conditioner: str | ConditionerFactory) -> ConditionerFactory:
        """Return the factory of this name if its networks take the event and the context, or the user's own factory."""
        if not isinstance(conditioner, str):
            return checked_factory(conditioner)
        if conditioner not in _CONDITIONERS:
            raise OptionError(f"conditioner must be one of {sorted(_CONDITIONERS)} or a factory, got {conditioner!r}")
        num_axes, num_context_axes = len(self.event_shape), len(self.context_shape)
        given = f"but got events of {described(self.event_shape)}"
        if num_context_axes:
            given += f" and a context of {described(self.context_shape)}"
        if conditioner != "causal_conv" and max(num_axes, num_context_axes) > 1:
            raise OptionError(
                f'Autoregressive with conditioner={conditioner!r} takes vectors, {given}: use "causal_conv" for '
                "sequences, or a factory"
            )
        if max(num_axes, num_context_axes) > 2:
            raise OptionError(
                f'Autoregressive with conditioner="causal_conv" takes vectors or (channels, length), {given}: use a '
                "factory"
            )
        return _CONDITIONERS[conditioner]

    @property
    def triangular_order(self) -> tuple[int, ...]:
        # The axis is negative and indices are not, so orders along different axes differ.
        return tuple(self.order) if self.axis == -1 else (*self.order, self.axis)

    @property
    def is_affine(self) -> bool:
        return isinstance(self.univariate, AffineMap)

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        x, log_slopes = self._forward_along_last_axis(self._axis_last(z), context)
        return self._axis_back(x), self._axis_back(log_slopes)

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        z, log_slopes = self._inverse_along_last_axis(self._axis_last(x), context)
        return self._axis_back(z), self._axis_back(log_slopes)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        x, log_slopes, score = self._score_along_last_axis(self._axis_last(z), self._axis_last(score), context)
        return self._axis_back(x), self._summed(log_slopes), self._axis_back(score)

    def _axis_last(self, t: Tensor) -> Tensor:
        return t if self.axis == -1 else t.movedim(self.axis, -1)

    def _axis_back(self, t: Tensor) -> Tensor:
        return t if self.axis == -1 else t.movedim(-1, self.axis)

    # In the methods below the ordered axis of every tensor is its last.

    def _forward_along_last_axis(self, z: Tensor, context: Tensor | None) -> Pair:
        theta = self.conditioner(z, context)
        if theta.shape != (*z.shape, self.univariate.num_params):
            raise ShapeError(
                f"the conditioner of Autoregressive must map {tuple(z.shape)} to "
                f"{(*z.shape, self.univariate.num_params)}, but gave {tuple(theta.shape)}"
            )
        return self.univariate.forward_and_ladj(z, theta)

    def _score_along_last_axis(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        theta, solve = self._parameters_and_solver(z, context)
        direct = z.view_as(z)  # the argument of T, apart from the input of the network
        x, log_slopes = self.univariate.forward_and_ladj(direct, theta)
        with torch.no_grad():
            ones = torch.ones_like(x)
            (x_by_theta,) = pull_back((x,), (ones,), (theta,))
            by_z, by_theta = pull_back((log_slopes,), (ones,), (direct, theta))
            score = solve(score - by_z, torch.exp(log_slopes), x_by_theta, by_theta)
        return x, log_slopes, score

    def _inverse_along_last_axis(self, x: Tensor, context: Tensor | None) -> Pair:
        if is_transformed():
            return self._inverse_by_passes(x, context)
        z, log_slopes = self._solve(x, context)
        if torch.is_grad_enabled():
            z = self._attached(z, x, context)
            log_slopes = -self._forward_along_last_axis(z, context)[1]
        return z, log_slopes

    def _inverse_by_passes(self, x: Tensor, context: Tensor | None) -> Pair:
        """Invert by one pass of the network for each place, which works for any conditioner and can be traced."""
        # theta_j depends on z_<j only, so it does not matter that later places hold zeros.
        columns = [torch.zeros_like(x[..., 0])] * len(self.order)
        log_slopes = columns.copy()
        for j in self.order:
            theta = self.conditioner(torch.stack(columns, -1), context)
            univariate = of_column(self.univariate, j)
            columns[j], log_slopes[j] = univariate.inverse_and_ladj(x[..., j], theta[..., j, :])
        return torch.stack(columns, -1), torch.stack(log_slopes, -1)

    def _solve(self, x: Tensor, context: Tensor | None) -> Pair:
        """Invert without gradients, by incremental evaluation of the network if it offers that."""
        incremental = getattr(self.conditioner, "incremental", None)
        if incremental is None:
            with torch.no_grad():
                return self._inverse_by_passes(x, context)
        with torch.inference_mode():  # half the overhead of no_grad; what leaves it is cloned
            rows = x.reshape(-1, *x.shape[-len(self.event_shape) :])
            steps = incremental(len(rows), self._context_rows(x, context))
            z, log_slopes = self._solve_by_steps(rows, steps)
        z, log_slopes = (t.clone(memory_format=torch.contiguous_format) for t in (z, log_slopes))
        return z.reshape(x.shape), log_slopes.reshape(x.shape)

    def _context_rows(self, x: Tensor, context: Tensor | None) -> Tensor | None:
        """Return the context as ``(N, *context_shape)``, or ``(1, *context_shape)`` if all rows have the same."""
        if context is not None and context.numel() != self.context_dim:
            context = context.expand(*x.shape[: -len(self.event_shape)], *self.context_shape)
        return None if context is None else context.reshape(-1, *self.context_shape)

    def _solve_by_steps(self, x: Tensor, steps: ParameterSteps) -> Pair:
        """Invert rows ``(N, *channels, length)``."""
        # The first axis of the tensors below counts places.
        index_of_place = torch.as_tensor(self.order, device=x.device)
        values = x.transpose(0, -1)[index_of_place]
        parameters_last = (*range(1, x.dim()), 0)
        log_slopes = []
        for i, (value, z) in enumerate(zip(values.unbind(), steps.inputs.unbind(), strict=True)):
            univariate = of_column(self.univariate, self.order[i])
            root, log_slope = univariate.inverse_and_ladj(value, steps.parameters_at(i).permute(parameters_last))
            z.copy_(root)
            log_slopes.append(log_slope)
        place = index_of_place.argsort()
        return steps.inputs[place].transpose(0, -1), torch.stack(log_slopes)[place].transpose(0, -1)

    def _attached(self, z: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """Return z with the gradients of the inverse."""
        theta, solve = self._parameters_and_solver(z, context)
        residual = self.univariate.forward_and_ladj(z, theta)[0] - x

        def solve_transposed(gradient: Tensor) -> Tensor:
            # once_differentiable would not do: torch.autograd.functional.hessian then returns zeros.
            if torch.is_grad_enabled():
                raise FlowError(
                    "create_graph=True gives no second derivatives of the inverse of Autoregressive: use torch.func, "
                    "or a flow that is parallel in this direction, which is MAF for log_prob and IAF for rsample"
                )
            inputs = z.detach(), theta.detach()
            derivatives = torch.func.vjp(lambda *args: self.univariate.forward_and_ladj(*args)[0], *inputs)[1]
            slope, x_by_theta = derivatives(torch.ones_like(z))
            # Where the map does not change with z, as far from the data, z has no gradient.
            slope = torch.where(slope == 0, torch.inf, slope)
            return solve(gradient, slope, x_by_theta, gradient.new_zeros(theta.shape))

        return attached(z, residual, solve_transposed)

    def _parameters_and_solver(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Solver]:
        return parameters_and_solver(self.conditioner, z, context, self.order, len(self.event_shape))
