"""How the differential equation of a continuous flow is solved, by torchdiffeq."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

# Single steps are not public. The public odeint with fixed steps checks times by their values and writes the solution
# in place, so that it can neither be recorded nor run under vmap. A test compares these steps with it.
from torchdiffeq._impl.odeint import SOLVERS

from pyroflows.compiling.eager import is_transformed, runs_in_python
from pyroflows.errors import IntegrationError, OptionError, UntraceableError
from pyroflows.options import checked_int, checked_number
from pyroflows.transforms.continuous.counting import active_counts
from pyroflows.transforms.continuous.equal_steps import num_equal_steps

# Methods by name with their orders.
ADAPTIVE_METHODS = {"dopri5": 5, "dopri8": 8, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 2}
FIXED_METHODS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
# A step of this length is taken whatever its error is. It gets past jumps of the field, and its error is below any
# tolerance elsewhere; the number of evaluations is what ends a solve.
MIN_STEP = 1e-8
# Errors of steps add up, and steep fields magnify them: each step gets this share of the tolerance of a solve.
STEP_SHARE = 0.1
# Tolerances are not below so many roundings of the numbers that are integrated.
MIN_ROUNDINGS = 10

REMEDY = (
    "The field of the flow is stiff or grows without bound: use looser tolerances, FixedSteps, a smaller learning rate "
    "or smaller weights of its network, or train with kinetic_energy= and jacobian_norm="
)


class Problem(Protocol):
    """The equation that is solved, see :class:`pyroflows.transforms.continuous.equation.Equation`."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The tensors to which gradients flow."""
        ...

    @property
    def sizes(self) -> Sequence[int]:
        """The numbers of columns whose errors are controlled together."""
        ...

    def rate(self, t: Tensor, rows: Tensor) -> Tensor:
        """Return the derivatives of rows ``(*batch, num_columns)`` at a time, a scalar."""
        ...


@dataclass(frozen=True)
class Adaptive:
    r"""Steps whose local error stays below a tenth of a tolerance at each row, so that their sum is about as large.

    A step is taken if, at each row, the estimated error e of what is integrated, y, satisfies
    :math:`10\, |e_j| \le \mathrm{atol} + \mathrm{rtol}\, |y_j|` for the log-determinant, and in the root mean square
    over the elements of z. So a row has its tolerance whatever the other rows are; the steps themselves are those of
    all rows together. In float32 an error below :math:`10^{-6}`, ten roundings, is not asked for.

    Steps follow values, which no program can record. Under ``vmap``, ``torch.func.grad``, ``torch.compile`` and
    ``make_fx`` equal steps of "rk4" take their place, as many as the tolerance has a fourth root:
    :math:`n = \mathrm{rtol}^{-1/4}`, 18 for :math:`10^{-5}`.

    Args:
        rtol: the relative tolerance.
        atol: the absolute tolerance.
        method: "dopri5", "dopri8" for small tolerances, "bosh3", "fehlberg2" or "adaptive_heun".
        max_evaluations: the number of evaluations of the network after which a solve is given up.
        adjoint: whether gradients come from the adjoint equation, in the memory of one step, instead of from the steps.
            They have no gradients themselves.

    Raises:
        OptionError: if a tolerance or the number of evaluations is not positive, or there is no such method.
        IntegrationError: at a solve, if it takes more evaluations, or meets values that are not finite.

    Example:
        >>> pf.transforms.Continuous(2, solver=Adaptive(rtol=1e-4, atol=1e-4)).ladj_is_exact
        True
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    method: str = "dopri5"
    max_evaluations: int = 10_000
    adjoint: bool = False

    def __post_init__(self) -> None:
        checked_number("rtol", self.rtol)
        checked_number("atol", self.atol)
        checked_int("max_evaluations", self.max_evaluations)
        _check_method(self.method, ADAPTIVE_METHODS)

    def solve(self, problem: Problem, rows: Tensor, backwards: bool) -> Tensor:
        """Return the rows ``(*batch, num_columns)`` at t = 1 of those at t = 0, or the other way round."""
        num_steps = num_equal_steps() or (self.num_fixed_steps if is_transformed() else None)
        if num_steps is not None:
            return FixedSteps(num_steps).solve(problem, rows, backwards)
        if not runs_in_python():
            raise UntraceableError(
                "steps of an Adaptive solver follow the values of tensors, so that a continuous flow cannot be "
                "recorded with it: use FixedSteps, or do not compile"
            )
        if not rows.numel():
            return rows
        least = MIN_ROUNDINGS * torch.finfo(rows.dtype).eps
        rtol, atol = max(STEP_SHARE * self.rtol, least), max(STEP_SHARE * self.atol, least)
        rate = _Counted(problem, self, backwards)
        # The first step is what the tolerance lets a field of order one take. torchdiffeq's own guess would evaluate
        # fields that are nearly zero far outside of the unit interval.
        first_step = min(1.0, rtol ** (1 / ADAPTIVE_METHODS[self.method]))
        options = {"first_step": first_step, "min_step": MIN_STEP}
        start, end = _ends(rows, backwards)
        times, keywords = torch.stack([start, end]), {"rtol": rtol, "atol": atol, "method": self.method}
        norm = _LargestRow(problem.sizes)
        with _named_failures(rate):
            if not self.adjoint:
                options |= {"norm": norm, "step_t": end.reshape(1)}
                return odeint(rate, rows, times, options=options, **keywords)[-1]
            # Losses are means over rows, so that gradients by a row are so much smaller than it.
            keywords |= {"adjoint_rtol": rtol, "adjoint_atol": atol / max(1, rows.shape[:-1].numel())}
            # Integrals over time, as the gradients by parameters are, need no control of their own (Kidger et al. 2021,
            # arXiv:2009.09457).
            # Times are negative in the adjoint of a solve backwards.
            back_at = -start if backwards else start
            adjoint_options = {**options, "norm": "seminorm", "step_t": back_at.reshape(1)}
            options |= {"norm": norm, "step_t": end.reshape(1)}
            tensors = tuple(tensor for tensor in problem.tensors if tensor.requires_grad)
            found = odeint_adjoint(
                rate, rows, times, options=options, adjoint_params=tensors, adjoint_options=adjoint_options, **keywords
            )[-1]
        return _by_adjoint_only(found, rate)

    @property
    def num_fixed_steps(self) -> int:
        """The number of equal steps that take the place of adaptive ones in programs."""
        return math.ceil(self.rtol**-0.25)


@dataclass(frozen=True)
class FixedSteps:
    """Equal steps, whatever the error is. Training compiles with them, and takes the same time at each step.

    Their log-determinants count as estimates, since nothing bounds their error: :meth:`Continuous.exact`, which all
    that is reported uses, solves adaptively.

    Args:
        num_steps: the number of steps.
        method: "euler", "midpoint", "heun2", "heun3" or "rk4", with 1, 2, 2, 3 and 4 evaluations a step.
        adjoint: as for :class:`Adaptive`.

    Raises:
        OptionError: if the number of steps is not positive, or there is no such method.
        IntegrationError: at a solve, if it gives values that are not finite; programs give these values.

    Example:
        >>> pf.transforms.Continuous(2, solver=FixedSteps(8)).ladj_is_exact
        False
    """

    num_steps: int = 8
    method: str = "rk4"
    adjoint: bool = False

    def __post_init__(self) -> None:
        checked_int("num_steps", self.num_steps)
        _check_method(self.method, FIXED_METHODS)

    def solve(self, problem: Problem, rows: Tensor, backwards: bool) -> Tensor:
        """Return the rows ``(*batch, num_columns)`` at t = 1 of those at t = 0, or the other way round."""
        rate = _Counted(problem, self, backwards)
        found = self._by_adjoint(rate, rows) if self.adjoint and not is_transformed() else self._by_steps(rate, rows)
        if runs_in_python() and not found.isfinite().all():
            rate.fail("gave values that are not finite")
        return found

    def _by_steps(self, rate: "_Counted", rows: Tensor) -> Tensor:
        # The steps are torchdiffeq's. Its loop over them writes in place, which vmap does not permit.
        solver = SOLVERS[self.method](func=rate, y0=rows, atol=0.0)
        times = [k / self.num_steps for k in range(self.num_steps + 1)]
        for start, end in pairwise(times[::-1] if rate.backwards else times):
            rows = rows + solver._step_func(rate, start, end - start, end, rows)[0]
        return rows

    def _by_adjoint(self, rate: "_Counted", rows: Tensor) -> Tensor:
        def grid(_: Any, y: Tensor, t: Tensor) -> Tensor:
            return t[0] + (t[-1] - t[0]) * torch.linspace(0, 1, self.num_steps + 1, dtype=t.dtype, device=t.device)

        tensors = tuple(tensor for tensor in rate.problem.tensors if tensor.requires_grad)
        keywords = {"method": self.method, "options": {"grid_constructor": grid}, "adjoint_params": tensors}
        times = torch.stack(_ends(rows, rate.backwards))
        return _by_adjoint_only(odeint_adjoint(rate, rows, times, **keywords)[-1], rate)


Solver = Adaptive | FixedSteps


class _Counted:
    """The rate of an equation that counts its evaluations, and gives up beyond the most that a solver allows."""

    def __init__(self, problem: Problem, solver: Solver, backwards: bool) -> None:
        self.problem, self.solver, self.backwards = problem, solver, backwards
        self.count = 0
        self.reached: Tensor | float = 0.0
        self._counts = active_counts()
        self._is_adjoint = False
        self._most = solver.max_evaluations if isinstance(solver, Adaptive) else math.inf

    def __call__(self, t: Tensor | float, rows: Tensor, **_: Any) -> Tensor:
        self.count += 1
        if self.count > self._most:
            self.fail(f"took more than {self._most} evaluations, and had come to t = {float(t):.3g}")
        kind = "adjoint" if self._is_adjoint else "inverse" if self.backwards else "forward"
        for count in self._counts:
            setattr(count, kind, getattr(count, kind) + 1)
        return self.problem.rate(t if isinstance(t, Tensor) else rows.new_full((), t), rows)

    def callback_step(self, t: Tensor, *_: Any) -> None:
        """Note the time of a step; torchdiffeq calls this before each."""
        self.reached = t

    def callback_step_adjoint(self, t: Tensor, rows: Any, _: Tensor) -> None:
        """Check the values themselves: a failed assertion of a backward pass comes up far from here."""
        if isinstance(self.solver, Adaptive) and not all(part.isfinite().all() for part in rows):
            self.fail(f"met values that are not finite at t = {abs(float(t)):.3g}")

    def turn_to_adjoint(self) -> None:
        """Count anew, since the adjoint equation is what comes after the solve."""
        self.count, self._is_adjoint = 0, True

    def fail(self, what: str) -> None:
        """Raise the error of a solve that failed, of which this is what happened."""
        solver = self.solver
        way = "from data to base" if self.backwards else "from base to data"
        how = (
            f"with {solver.method} at tolerances rtol={solver.rtol:g} and atol={solver.atol:g}"
            if isinstance(solver, Adaptive)
            else f"with {solver.num_steps} steps of {solver.method}"
        )
        of = "the adjoint equation of a continuous flow" if self._is_adjoint else "a continuous flow"
        raise IntegrationError(f"solving {of} {way} {how} {what}, after {self.count} evaluations. {REMEDY}")


class _LargestRow:
    """The norm of errors: the largest one of a row, so that each row keeps the tolerance by itself.

    The error of a row is the largest root mean square of its groups of columns.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = list(sizes)

    @torch.no_grad()
    def __call__(self, error: Tensor) -> Tensor:
        controlled = error[..., : sum(self._sizes)].square()
        if len(self._sizes) == 1:
            return controlled.mean(-1).max().sqrt()
        return torch.stack([part.mean(-1).max() for part in controlled.split(self._sizes, -1)]).max().sqrt()


def _by_adjoint_only(found: Tensor, rate: _Counted) -> Tensor:
    """Prepare for the backward pass of rows that were found, which solves the adjoint equation."""
    rate.turn_to_adjoint()
    if found.requires_grad:
        found.register_hook(_refuse_second_derivatives)
    return found


def _refuse_second_derivatives(_: Tensor) -> None:
    if torch.is_grad_enabled():  # by create_graph=True
        raise OptionError(
            "gradients of a continuous flow by the adjoint equation have no derivatives themselves: give its solver "
            "adjoint=False where create_graph=True, or second derivatives, are needed"
        )


def _ends(rows: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
    """Return the times of start and end."""
    ends = rows.new_zeros(()), rows.new_ones(())
    return (ends[1], ends[0]) if backwards else ends


@contextmanager
def _named_failures(rate: _Counted) -> Iterator[None]:
    """Turn failed assertions of torchdiffeq into errors that say what to do.

    Before each step it asserts that values are finite; their list, which it adds, would tell little.
    """
    try:
        yield
    except AssertionError as error:
        at = f"at t = {abs(float(rate.reached)):.3g}"
        is_finite = "non-finite" not in str(error)
        rate.fail(f"failed {at}: {error}" if is_finite else f"met values that are not finite {at}")


def _check_method(method: Any, methods: dict[str, int]) -> None:
    if method not in methods:
        raise OptionError(f"method must be one of {sorted(methods)}, got {method!r}")
