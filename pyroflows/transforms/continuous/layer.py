"""The continuous layer."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.errors import OptionError
from pyroflows.nets.checks import checked_conditioner, checked_factory
from pyroflows.nets.velocity import Field, FreeVelocity, VelocityConv, VelocityMLP
from pyroflows.options import checked_number, kind
from pyroflows.shapes import as_given
from pyroflows.transforms.autocast import without_autocast
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.continuous.counting import active_penalties
from pyroflows.transforms.continuous.equation import Equation
from pyroflows.transforms.continuous.partway import PartwayField
from pyroflows.transforms.continuous.solvers import Adaptive, FixedSteps, Solver
from pyroflows.transforms.views import View

# It makes the network of a layer from the size or shape of events, the widths, and the size or shape of contexts.
VelocityFactory = Callable[..., nn.Module]
TRACES = ("auto", "exact", "hutchinson")
# Where a trace costs products with the Jacobian, "auto" takes the trace itself in up to so many dimensions.
MAX_EXACT = 8


class Continuous(FlowTransform):
    r"""The continuous layer (Chen et al. 2018, arXiv:1806.07366; Grathwohl et al. 2019, arXiv:1810.01367):

    .. math::
        \frac{dz}{dt} = v(z, t, c), \quad z(0) = z, \quad x = z(1), \qquad
        \log\left|\det \frac{\partial x}{\partial z}\right|
        = \int_0^1 \operatorname{tr} \frac{\partial v}{\partial z}(z(t), t, c)\, dt

    where v is one free-form network, see :class:`pyroflows.nets.velocity.VelocityMLP` for vectors and
    :class:`pyroflows.nets.velocity.VelocityConv` for arrays ``(C, ...)``. Both directions are solves, forwards and
    backwards in time, whose time grows with the number of evaluations of v; :class:`Evaluations` counts them. Values
    and log-determinants are right to the tolerance of a solve. The layer starts at the identity.

    The trace is exact, or Hutchinson's estimate :math:`\epsilon^\top (\partial v / \partial z)\, \epsilon` with signs
    :math:`\epsilon` that are drawn once for a solve. "auto" is the exact one where that costs little: vectors with one
    or two hidden layers, whose trace has a closed form, and few dimensions. :meth:`exact` is a view with the exact
    trace by an adaptive solve; log-densities of flows, and all that is reported, use it.

    Two penalties keep paths short and straight, and so the number of evaluations low (Finlay et al. 2020,
    arXiv:2002.02798), as means over rows: :math:`\int |v|^2 dt`, and Hutchinson's estimate of
    :math:`\int \|\partial v / \partial z\|_F^2\, dt`. Fits of the library add them to their loss; see
    :class:`Penalties` for other loops, such as Pyro's ``SVI``, which does not see them.

    Args:
        dim: the event size D, or the event shape, such as (C, H, W) or (C, L).
        hidden_dims: widths, or channels, of the hidden layers of v.
        context_dim: size of the context c, 0 for none; for arrays also the shape (channels, ...) of a context that has
            the places of an event.
        solver: solves from z to x; None for ``Adaptive()``.
        inverse_solver: solves from x to z; None for the same.
        exact_solver: the adaptive solver of the exact view; None for that of the direction, where it is adaptive, and
            ``Adaptive()`` in the place of fixed steps.
        trace: "auto", "exact" or "hutchinson".
        net: a function that makes a network of your own, called as ``net(dim, hidden_dims, context_dim)``; the network
            is called as ``network(t, z, context)``. None for the library's.
        kinetic_energy: the coefficient of the first penalty.
        jacobian_norm: the coefficient of the second one.

    Shapes: z and x are ``(..., *event_shape)``, a context is ``(..., *context_shape)``. A network of your own maps
    times ``(N,)``, places ``(N, *event_shape)`` and contexts ``(N, *context_shape)``, or None, to velocities
    ``(N, *event_shape)``.

    Raises:
        OptionError: if an option is unknown, or the network contains dropout or batch normalisation.
        IntegrationError: at a call, if a solve fails.

    Example:
        >>> t = Continuous(2, hidden_dims=(16, 16))
        >>> z = torch.randn(5, 2)
        >>> torch.allclose(t.inv(t(z)), z, atol=1e-4)
        True
    """

    def __init__(
        self,
        dim: int | Sequence[int],
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int | Sequence[int] = 0,
        solver: Solver | None = None,
        inverse_solver: Solver | None = None,
        exact_solver: Adaptive | None = None,
        trace: str = "auto",
        net: VelocityFactory | None = None,
        kinetic_energy: float = 0.0,
        jacobian_norm: float = 0.0,
    ) -> None:
        super().__init__(dim, context_dim)
        self.solver = _checked_solver("solver", solver, Adaptive())
        self.inverse_solver = _checked_solver("inverse_solver", inverse_solver, self.solver)
        if exact_solver is not None and not isinstance(exact_solver, Adaptive):
            raise OptionError(f"exact_solver must be an Adaptive solver, got {kind(exact_solver)}")
        self.exact_solver = exact_solver
        if trace not in TRACES:
            raise OptionError(f"trace must be one of {TRACES}, got {trace!r}")
        self.net: Any = self._network(net, hidden_dims)
        self._stop = 1.0
        self.trace = self._cheaper_trace() if trace == "auto" else trace
        self.kinetic_energy = _checked_coefficient("kinetic_energy", kinetic_energy)
        self.jacobian_norm = _checked_coefficient("jacobian_norm", jacobian_norm)

    def _network(self, net: VelocityFactory | None, hidden_dims: Sequence[int]) -> nn.Module:
        if net is not None:
            context_dim = as_given(self.context_shape) if self.context_dim else 0
            own = checked_factory(net, "net")(as_given(self.event_shape), hidden_dims, context_dim)
            return FreeVelocity(checked_conditioner(own, "the network of a continuous layer"), *self._shapes)
        if len(self.event_shape) > 1:
            return FreeVelocity(VelocityConv(self.event_shape, hidden_dims, self.context_shape), *self._shapes)
        return VelocityMLP(self.dim, hidden_dims, self.context_dim)

    @property
    def _shapes(self) -> tuple[torch.Size, torch.Size]:
        return self.event_shape, self.context_shape

    def _cheaper_trace(self) -> str:
        has_closed_form = isinstance(self.net, VelocityMLP) and len(self.net.hidden_dims) <= 2
        return "exact" if has_closed_form or self.dim <= MAX_EXACT else "hutchinson"

    @property
    def ladj_is_exact(self) -> bool:
        solvers = (self.solver, self.inverse_solver)
        return self.trace == "exact" and all(isinstance(solver, Adaptive) for solver in solvers)

    @property
    def reads_values(self) -> bool:
        return any(isinstance(solver, Adaptive) for solver in (self.solver, self.inverse_solver))

    @property
    def value_is_exact(self) -> bool:
        return isinstance(self.solver, Adaptive) and isinstance(self.inverse_solver, Adaptive)

    def _exact(self) -> FlowTransform:
        return ExactContinuous(self)

    def until(self, time: float) -> "Continuous":
        """Return the layer that shares the parameters of this one and stops at a time on the way from base to data.

        It shows the transport: flows of it have the law of z at that time.

        Args:
            time: the time, above 0 and at most 1.

        Raises:
            OptionError: if the time is not in this range.

        Example:
            >>> t = Continuous(2)
            >>> halfway = t.until(0.5)
            >>> pf.Flow([halfway])().sample((7,)).shape
            torch.Size([7, 2])
        """
        if not 0 < time <= 1:
            raise OptionError(f"time must be above 0 and at most 1, got {time!r}")
        made = copy.copy(self)
        made._inv, made._stop = None, float(time) * self._stop
        return made

    def field(self, context: Tensor | None = None) -> Field:
        """Return the velocity field of this layer at a context.

        Args:
            context: contexts ``(*batch, *context_shape)``, one for all rows or one for each; None without contexts.

        Example:
            >>> field = Continuous(2).field()
            >>> field(torch.tensor(0.5), torch.randn(5, 2)).shape
            torch.Size([5, 2])
        """
        if context is not None and isinstance(self.net, VelocityMLP):
            context = context.flatten(-len(self.context_shape))
        field = self.net.at(context)
        return field if self._stop == 1 else PartwayField(field, self._stop)

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self._pair(z, context, self.solver, self.trace, backwards=False)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return self._pair(x, context, self.inverse_solver, self.trace, backwards=True)

    def _forward_value(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._value(z, context, self.solver, backwards=False)

    def _inverse_value(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self._value(x, context, self.inverse_solver, backwards=True)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        return self._triple(z, score, context, self.solver, self.trace)

    # What follows is the same for the layer and its exact view.

    @without_autocast
    def _value(self, start: Tensor, context: Tensor | None, solver: Solver, backwards: bool) -> Tensor:
        batch_shape = self._batch_shape(start)
        start, context, are_finite = self._finite_rows(start, context)
        equation = Equation(self.field(context), self.event_shape, has_ladj=False)
        rows = solver.solve(equation, equation.start(start), backwards)
        return torch.where(are_finite.unsqueeze(-1), rows, torch.nan).reshape(batch_shape + self.event_shape)

    @without_autocast
    def _pair(self, start: Tensor, context: Tensor | None, solver: Solver, trace: str, backwards: bool) -> Pair:
        batch_shape = self._batch_shape(start)
        start, context, are_finite = self._finite_rows(start, context)
        equation = self._equation(start, context, trace)
        rows = solver.solve(equation, equation.start(start), backwards)
        self._report_penalties(equation, rows[:, self.dim + 1 :], are_finite)
        rows = torch.where(are_finite.unsqueeze(-1), rows, torch.nan)
        return rows[:, : self.dim].reshape(batch_shape + self.event_shape), rows[:, self.dim].reshape(batch_shape)

    @without_autocast
    def _triple(self, z: Tensor, score: Tensor, context: Tensor | None, solver: Solver, trace: str) -> Triple:
        batch_shape = self._batch_shape(z)
        z, context, are_finite = self._finite_rows(z, context)
        equation = self._equation(z, context, trace, has_score=True)
        score = score.reshape(len(z), *self.event_shape)
        rows = solver.solve(equation, equation.start(z, score), backwards=False)
        self._report_penalties(equation, rows[:, 2 * self.dim + 1 :], are_finite)
        rows = torch.where(are_finite.unsqueeze(-1), rows, torch.nan)
        x, ladj, score = rows[:, : 2 * self.dim + 1].split([self.dim, 1, self.dim], -1)
        shape = batch_shape + self.event_shape
        return x.reshape(shape), ladj.reshape(batch_shape), score.detach().reshape(shape)

    def _batch_shape(self, events: Tensor) -> torch.Size:
        return events.shape[: events.dim() - len(self.event_shape)]

    def _finite_rows(self, start: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return rows ``(N, *event_shape)``, their contexts, and which rows are finite.

        A row that is not finite is replaced by zeros, so that the solve, whose steps are those of all rows, does not
        see it; the layer gives NaN for it. One context for all rows stays one.
        """
        batch_shape = self._batch_shape(start)
        start = start.reshape(-1, *self.event_shape)
        are_finite = start.isfinite().flatten(1).all(-1)
        if context is not None:
            shape = self.context_shape
            if context.shape == shape:
                are_finite = are_finite & context.isfinite().all()
            else:
                context = context.expand(batch_shape + shape).reshape(len(start), *shape)
                are_finite = are_finite & context.isfinite().flatten(1).all(-1)
            context = torch.where(context.isfinite(), context, 0.0)
        mask = are_finite.reshape(-1, *[1] * len(self.event_shape))
        return torch.where(mask, start, 0.0), context, are_finite

    def _equation(self, start: Tensor, context: Tensor | None, trace: str, has_score: bool = False) -> Equation:
        is_penalised = active_penalties() is not None and torch.is_grad_enabled()
        probe = _signs(start) if trace == "hutchinson" else None
        jacobian_probe = None
        if is_penalised and self.jacobian_norm:
            jacobian_probe = _signs(start) if probe is None else probe
        return Equation(
            self.field(context),
            self.event_shape,
            has_ladj=True,
            probe=probe,
            has_score=has_score,
            has_kinetic_energy=is_penalised and self.kinetic_energy > 0,
            jacobian_probe=jacobian_probe,
        )

    def _report_penalties(self, equation: Equation, integrals: Tensor, are_finite: Tensor) -> None:
        penalties = active_penalties()
        if penalties is None or not integrals.shape[-1]:
            return
        coefficients = [self.kinetic_energy] if equation.has_kinetic_energy else []
        coefficients += [self.jacobian_norm] if equation.jacobian_probe is not None else []
        # Backwards in time the integrals are negative.
        terms = sum(c * part for c, part in zip(coefficients, integrals.abs().unbind(-1), strict=True))
        assert isinstance(terms, Tensor)
        penalties.found.append(torch.where(are_finite, terms, 0.0).sum() / are_finite.sum().clamp(min=1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, solver={self.solver}, trace={self.trace!r}"


class ExactContinuous(View):
    """The view of a continuous layer with the exact trace by an adaptive solve; :meth:`Continuous.exact` makes it."""

    layer: Continuous
    ladj_is_exact = True
    reads_values = True

    def __init__(self, layer: Continuous) -> None:
        super().__init__(layer, layer.event_shape, layer.context_shape, layer.base_shape)

    def _solver(self, solver: Solver) -> Adaptive:
        if self.layer.exact_solver is not None:
            return self.layer.exact_solver
        return solver if isinstance(solver, Adaptive) else Adaptive()

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.layer._pair(z, context, self._solver(self.layer.solver), "exact", backwards=False)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return self.layer._pair(x, context, self._solver(self.layer.inverse_solver), "exact", backwards=True)

    def _forward_value(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.layer._value(z, context, self._solver(self.layer.solver), backwards=False)

    def _inverse_value(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.layer._value(x, context, self._solver(self.layer.inverse_solver), backwards=True)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        return self.layer._triple(z, score, context, self._solver(self.layer.solver), "exact")


def _signs(like: Tensor) -> Tensor:
    """Draw independent signs, which estimate traces with the least variance among independent elements."""
    return 2 * torch.randint(2, like.shape, dtype=like.dtype, device=like.device) - 1


def _checked_solver(name: str, solver: Any, default: Solver) -> Solver:
    if solver is None:
        return default
    if not isinstance(solver, Adaptive | FixedSteps):
        raise OptionError(f"{name} must be an instance of Adaptive or FixedSteps, got {kind(solver)}")
    return solver


def _checked_coefficient(name: str, value: Any) -> float:
    return 0.0 if value == 0 else checked_number(name, value)
