"""Run the training loop of all fits: optimiser, gradient clipping, guard, progress bar, history."""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import pyro
import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor
from torch.optim import Optimizer

from pyroflows.compiling.check import Compiler
from pyroflows.errors import DivergedError, IntegrationError, OptionError
from pyroflows.grad_mode import isolated, require_trainable
from pyroflows.interruption import keeping
from pyroflows.progress import Progress
from pyroflows.randomness import random_state, seeded, set_random_state
from pyroflows.training.history import History
from pyroflows.training.objective import Objective
from pyroflows.training.schedules import WINDOW, Plateau, Schedule
from pyroflows.training.snapshot import Snapshot
from pyroflows.training.step import Step

OptimizerLike: TypeAlias = Callable[[Iterable[Tensor]], Optimizer] | PyroOptim

LEARNING_RATE = 1e-2
WARM_UP = 20
MAX_NORM = 10.0
MAX_BAD_STEPS = 25


class Trainer:
    r"""A trainer minimises an objective for as long as a schedule says.

    The learning rate rises linearly over 20 steps and then follows the schedule; gradients are clipped to a norm of 10
    unless told otherwise.
    A step with a non-finite gradient or monitored figure is left out. After 25 such steps in a row, or if the fit ends
    by an interrupt or another error, the flow goes back to the last good state, unless it is in a better one. A state
    is good if the mean of the monitored figure over the 50 steps before it is the best so far, up to its noise.

    Args:
        objective: the objective to minimise.
        schedule: a schedule says how the learning rate falls and when the fit ends; it serves one fit.
        optimizer: a function from parameters to a torch optimizer, or a Pyro optimizer; None for Adam.
        learning_rate: the learning rate of Adam, positive, where no optimizer is given.
        max_norm: the largest norm of a gradient, to which longer ones are clipped, positive.
        compile: "auto", "trace", "inductor" or "none", as for :class:`pyroflows.FlowVI`; or a
            :class:`pyroflows.compiling.Compiler`.
        tables: parameters of which each step reads a few rows, see :class:`pyroflows.training.step.Step`; the optimizer
            gets sparse gradients of them.
        combine_gradients: a function that changes the list of gradients in place, after they are computed and before
            they are clipped. Several processes, each with a part of the batch, can average their gradients here.
        callback: a function of the history, called once in 50 steps; training ends if it returns False.
        progress_bar: whether to show a progress bar; or a :class:`pyroflows.progress.Progress` whose present stage is
            the training.

    Attributes:
        history: the figures of all steps so far.

    Raises:
        OptionError: if the optimizer is not one, the objective has no parameters, or the mode is unknown.
        UntraceableError: if a step cannot be compiled, and the mode is not "auto".

    Example:
        >>> objective = pf.fitting.ReverseKL(pf.flows.Planar(2), lambda x: -(x**2).sum(-1))
        >>> trainer = pf.Trainer(objective, pf.training.Plateau("elbo", 50), progress_bar=False)
        >>> trainer.run()
        History(50 steps: elbo, log_weight_variance, grad_norm, learning_rate)
    """

    @isolated
    def __init__(
        self,
        objective: Objective,
        schedule: Schedule,
        optimizer: OptimizerLike | None = None,
        learning_rate: float = LEARNING_RATE,
        max_norm: float = MAX_NORM,
        compile: str | Compiler = "auto",
        tables: Sequence[Tensor] = (),
        combine_gradients: Callable[[list[Tensor]], None] | None = None,
        callback: Callable[[History], bool | None] | None = None,
        progress_bar: bool | Progress = True,
    ) -> None:
        self.history = History()
        self._objective = objective
        self._schedule = schedule
        self._step = Step(objective, compile if isinstance(compile, Compiler) else Compiler(compile), tables)
        self._optimizer = _made(
            optimizer or partial(torch.optim.Adam, lr=learning_rate, fused=True), self._step.parameters
        )
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._max_norm = max_norm
        self._combine_gradients = combine_gradients
        self._callback = callback
        self._progress_bar = progress_bar
        self._best_mean = -math.inf
        self._is_worse = False
        self._good = Snapshot([*self._step.parameters, *objective.flow.buffers()])
        self._num_bad = 0

    @isolated
    def run(self) -> History:
        """Train until the schedule ends, from the start or from the state that was loaded.

        Raises:
            DivergedError: if 25 steps in a row are not finite; the flow is then in the last good state.
            FitInterrupted: if training is interrupted, such as by Ctrl-C; its ``result`` is the history, and the flow
                is in its present state or in the last good one, if that is better.
            IntegrationError: if the solve of a continuous layer fails; the flow is then in the last good state.
            OptionError: if the objective does not record the figure that it monitors.
        """
        # The guard handles values that are not finite; validation would raise at them, and costs time in each step.
        with (
            keeping("training", lambda _: self.history),
            self._shown() as shown,
            pyro.validation_enabled(False),
            self._step.flattened(),
        ):
            try:
                while (factor := self._schedule.factor(self.history.num_steps)) is not None:
                    self._take_step(factor)
                    self._schedule.look(self.history)
                    shown.update(1, self._schedule.num_steps, **self._schedule.status(self.history))
                    if self.history.num_steps % WINDOW == 0 and self._is_told_to_end():
                        break
            except BaseException as error:
                # A field that cannot be solved is bad, though no figure of its step could say so.
                if self._num_bad or self._is_worse or isinstance(error, IntegrationError):
                    self._good.put_back()
                raise
        return self.history

    def _shown(self) -> AbstractContextManager[Progress]:
        """A bar of its own, or the one that the caller shows and closes."""
        if isinstance(self._progress_bar, Progress):
            return nullcontext(self._progress_bar)
        progress = Progress(self._progress_bar)
        progress.start("", self._schedule.num_steps, self.history.num_steps)
        return progress

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that decides how training goes on.

        This is the state of the flow, the objective, the optimiser, the schedule, the guard and torch's generators.
        """
        flow = self._objective.flow
        return {
            "flow": {name: _copy(value) for name, value in flow.state_dict().items()},
            "own_parameters": [parameter.detach().clone() for parameter in self._objective.own_parameters],
            "objective": copy.deepcopy(self._objective.state_dict()),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "schedule": copy.deepcopy(self._schedule.state_dict()),
            "last_good": list(self._good.values),
            "num_bad": self._num_bad,
            "best_mean": self._best_mean,
            "is_worse": self._is_worse,
            "history": self.history.as_lists(),
            "random_state": random_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of a trainer with the same kind of objective and schedule; :meth:`run` goes on from there.

        This also sets torch's generators, which the whole process shares.

        Args:
            state: a state that :meth:`state_dict` returned.
        """
        self._objective.flow.load_state_dict(state["flow"])
        with torch.no_grad():
            for parameter, value in zip(self._objective.own_parameters, state["own_parameters"], strict=True):
                parameter.copy_(value)
        self._objective.load_state_dict(copy.deepcopy(state["objective"]))
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self._schedule.load_state_dict(copy.deepcopy(state["schedule"]))
        self._good.load(state["last_good"])
        self._num_bad = state["num_bad"]
        self._best_mean, self._is_worse = state["best_mean"], state["is_worse"]
        self.history = History(state["history"])
        set_random_state(state["random_state"])

    def _take_step(self, factor: float) -> None:
        factor *= min(1.0, (self.history.num_steps + 1) / WARM_UP)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._objective.before_step()
        figures = self._step()
        if self._combine_gradients is not None:
            self._combine_gradients([p.grad for p in self._step.parameters if p.grad is not None])
        norm = _clipped(self._step.parameters, self._max_norm)
        is_good = math.isfinite(norm) and math.isfinite(self._monitored(figures))
        self._num_bad = 0 if is_good else self._num_bad + 1
        self.history.append(**figures, grad_norm=norm, learning_rate=self._rates[0] * factor)
        if is_good:
            # It is the state before this step that has just given a finite objective.
            if self.history.num_steps % WINDOW == 0:
                self._take_if_good()
            self._optimizer.step()
        if self._num_bad == MAX_BAD_STEPS:
            raise DivergedError(
                f"{MAX_BAD_STEPS} steps in a row, up to step {self.history.num_steps}, had a non-finite "
                f"{self._objective.monitor} or gradient; the parameters are back in the last good state. Try "
                f"{self._objective.remedy}"
            )

    def _take_if_good(self) -> None:
        """Keep the state if the last window is the best so far, up to its noise."""
        window = self.history.recent(self._objective.monitor, WINDOW)
        mean = float(window.mean()) * (-1 if self._objective.falls else 1)
        noise = float(window.std()) / math.sqrt(len(window))
        self._is_worse = mean < self._best_mean - 2 * noise
        self._best_mean = max(self._best_mean, mean)
        if not self._is_worse:
            self._good.take()

    def _is_told_to_end(self) -> bool:
        """Call the callback, whose draws do not change those of the fit."""
        if self._callback is None:
            return False
        with torch.random.fork_rng():
            return ends_training(self._callback(self.history))

    def _monitored(self, figures: Mapping[str, float]) -> float:
        monitor = self._objective.monitor
        if monitor not in figures:
            raise OptionError(
                f"{type(self._objective).__name__} monitors {monitor!r}, but its loss records {sorted(figures)}: "
                f"record {monitor!r}, or set monitor to one of these or to 'loss'"
            )
        return figures[monitor]


@isolated
def train(
    objective: Objective,
    num_steps: int | None = None,
    *,
    optimizer: OptimizerLike | None = None,
    compile: str | Compiler = "auto",
    seed: int | None = None,
    progress_bar: bool = True,
) -> History:
    """Train the flow of an objective in place.

    The learning rate is constant in the first half of the steps, and falls to zero along a cosine in the second half.

    Args:
        objective: the objective to minimise.
        num_steps: number of steps, positive; None to go on until the monitored figure has not improved by more than its
            noise for 300 steps, and then half as many steps again.
        optimizer: a function from parameters to a torch optimizer, or a Pyro optimizer; None for Adam at 0.01.
        compile: "auto", "trace", "inductor" or "none", as for :class:`pyroflows.FlowVI`; or a
            :class:`pyroflows.compiling.Compiler`.
        seed: makes the fit reproducible and leaves the global generator as it was; None to draw from the global one.
        progress_bar: whether to show a progress bar.

    Returns:
        The figures of all steps.

    Raises:
        OptionError: if an option is outside its range.
        UntraceableError: if a step cannot be compiled, and the mode is not "auto".
        DivergedError: if 25 steps in a row are not finite; the flow is then in the last good state.
        FitInterrupted: if training is interrupted, such as by Ctrl-C; its ``result`` is the history, and the flow is in
            its present state or in the last good one, if that is better.

    Example:
        >>> flow = pf.flows.Planar(2)
        >>> pf.train(pf.fitting.ReverseKL(flow, lambda x: -(x**2).sum(-1)), num_steps=50, progress_bar=False)
        History(50 steps: elbo, log_weight_variance, grad_norm, learning_rate)
    """
    if not isinstance(objective, Objective):
        raise OptionError(f"train needs a pyroflows.Objective, got {type(objective).__name__}")
    require_trainable(objective.flow)
    schedule = Plateau(objective.monitor, num_steps, falls=objective.falls)
    with seeded(seed):
        return Trainer(objective, schedule, optimizer, compile=compile, progress_bar=progress_bar).run()


def ends_training(answer: Any) -> bool:
    """Whether the answer of a callback is False, that of NumPy or of torch included; None is not.

    Example:
        >>> ends_training(None), ends_training(torch.tensor(1.0) > 2)
        (False, True)
    """
    return answer is not None and not answer


def _clipped(parameters: Sequence[Tensor], max_norm: float) -> float:
    """Scale the gradients of parameters so that their norm is at most so large; return what it was."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    # Those of tables are coalesced, so that their values are the entries that are not zero.
    values = [gradient.values() if gradient.is_sparse else gradient for gradient in gradients]
    norm = torch.nn.utils.get_total_norm(values).item()
    if norm > max_norm:
        for value in values:
            value.mul_(max_norm / (norm + 1e-6))
    return norm


def _copy(value: Any) -> Any:
    """Copy an entry of a state dict; what a module's ``get_extra_state`` gave may be no tensor."""
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _made(optimizer: OptimizerLike, parameters: list[Tensor]) -> Optimizer:
    if isinstance(optimizer, PyroOptim):
        if isinstance(optimizer, PyroLRScheduler) or optimizer.pt_clip_args or callable(optimizer.pt_optim_args):
            raise OptionError(
                "a Pyro optimizer with a schedule, with clipping, or with options by parameter cannot be used here: "
                "the fit has its own schedule and clipping; give pyro.optim.Adam({...}) or the like"
            )
        return _without_closure(optimizer.pt_optim_constructor(parameters, **optimizer.pt_optim_args))
    if not callable(optimizer):
        raise OptionError(
            "optimizer must be a function from parameters to a torch optimizer, such as "
            f"functools.partial(torch.optim.Adam, lr=0.01), but got {optimizer!r}"
        )
    made: Any = optimizer(parameters)
    if not isinstance(made, Optimizer):
        raise OptionError(f"optimizer must map parameters to a torch optimizer, but returned {type(made).__name__}")
    return _without_closure(made)


def _without_closure(made: Optimizer) -> Optimizer:
    """Return the optimizer if it makes a step from the gradients alone."""
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise OptionError(
            f"{type(made).__name__} evaluates the loss several times in a step, but each step of a fit has one batch "
            "or sample of its own: use an optimizer that needs no closure, such as torch.optim.Adam"
        )
    return made
