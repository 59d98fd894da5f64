"""One training loop: optimiser, gradient clipping, guard, progress, history.

It knows a step function and no objective, and follows a schedule.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor
from torch.optim import Optimizer
from tqdm.auto import tqdm

from pyroflows.errors import DivergedError, OptionError

# Fills the gradients and returns what to record, each a scalar.
Step = Callable[[], Mapping[str, Tensor]]
OptimizerLike: TypeAlias = Callable[[Iterable[Tensor]], Optimizer] | PyroOptim

LEARNING_RATE = 1e-2
WARM_UP = 20
WINDOW = 50
MAX_NORM = 10.0
MAX_BAD_STEPS = 25


class History(Mapping[str, np.ndarray]):
    """What a fit recorded, by name, one number a step or epoch; also ``grad_norm`` and ``learning_rate``.

    Args:
        records: numbers by name.
        unit: what a number belongs to.

    Example:
        >>> history = History({"elbo": [-3.0, -2.0]})
        >>> history["elbo"]
        array([-3., -2.])
        >>> history
        History(2 steps: elbo)
    """

    def __init__(self, records: Mapping[str, Sequence[float]] | None = None, unit: str = "step") -> None:
        self._unit = unit
        self._records: dict[str, list[float]] = {name: list(values) for name, values in (records or {}).items()}

    def append(self, **values: float) -> None:
        for name, value in values.items():
            self._records.setdefault(name, []).append(value)

    def recent(self, name: str, count: int) -> np.ndarray:
        """The last ``count`` numbers, without those that are not finite."""
        values = np.asarray(self._records[name][-count:])
        return values[np.isfinite(values)]

    def last(self, name: str) -> float:
        return self._records[name][-1]

    @property
    def num_steps(self) -> int:
        return len(next(iter(self._records.values()), []))

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self._records[name], dtype=float)

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"History({self.num_steps} {self._unit}s: {', '.join(self)})"


class Schedule(Protocol):
    """When the learning rate falls and when a fit ends; one object serves one fit."""

    @property
    def monitor(self) -> str:
        """The recorded number that a fit is about."""

    @property
    def num_steps(self) -> int | None:
        """Of the whole fit, where it is known from the start."""

    def factor(self, step: int) -> float | None:
        """Of the learning rate at a step; None when it is time to stop."""

    def look(self, history: History) -> None:
        """At what was recorded, after each step."""

    def status(self, history: History) -> dict[str, str]:
        """What the progress bar shows."""


def train(
    step: Step,
    parameters: Iterable[Tensor],
    schedule: Schedule,
    *,
    optimizer: OptimizerLike | None = None,
    progress_bar: bool = True,
) -> History:
    r"""Run ``step`` as long as the schedule says.

    The learning rate rises linearly over 20 steps and is then the schedule's. A step with a non-finite loss or gradient
    is left out; after 25 of them in a row the parameters go back to the last good state.

    Args:
        step: fills the gradients of the parameters and returns numbers to record.
        parameters: what is trained.
        schedule: of the learning rate.
        optimizer: a function from parameters to a torch optimizer, or a Pyro optimizer; None for Adam at 0.01.
        progress_bar: whether to show one.

    Raises:
        DivergedError: if steps stay non-finite; parameters are in the last good state then.
        OptionError: if the optimizer is none.
    """
    parameters = list(parameters)
    optim = _optimizer(optimizer, parameters)
    rates = [group["lr"] for group in optim.param_groups]
    history = History()
    good = copy_of(parameters)
    num_bad = 0
    with tqdm(total=schedule.num_steps, disable=not progress_bar, unit="step") as bar:
        while (factor := schedule.factor(history.num_steps)) is not None:
            factor *= min(1.0, (history.num_steps + 1) / WARM_UP)
            for group, rate in zip(optim.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optim.zero_grad()
            try:
                record = {name: value.item() for name, value in step().items()}
            except KeyboardInterrupt:
                if num_bad:
                    restore(parameters, good)
                raise
            norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM).item()
            is_good = math.isfinite(norm) and math.isfinite(record[schedule.monitor])
            num_bad = 0 if is_good else num_bad + 1
            history.append(**record, grad_norm=norm, learning_rate=rates[0] * factor)
            if is_good:
                # The state before the step is the one that has just shown a finite objective.
                if history.num_steps % WINDOW == 0:
                    good = copy_of(parameters)
                optim.step()
            if num_bad == MAX_BAD_STEPS:
                restore(parameters, good)
                raise DivergedError(
                    f"{MAX_BAD_STEPS} steps in a row, up to step {history.num_steps}, had a non-finite "
                    f"{schedule.monitor} or gradient; the parameters are back in the last good state. Try a smaller "
                    "learning rate, other initial values (init_loc_fn of a guide), or float64"
                )
            schedule.look(history)
            bar.update()
            bar.set_postfix(schedule.status(history), refresh=False)
    return history


def _optimizer(optimizer: OptimizerLike | None, parameters: list[Tensor]) -> Optimizer:
    if optimizer is None:
        return torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
    if isinstance(optimizer, PyroOptim):
        if isinstance(optimizer, PyroLRScheduler) or optimizer.pt_clip_args or callable(optimizer.pt_optim_args):
            raise OptionError(
                "a Pyro optimizer with a schedule, with clipping, or with options by parameter cannot be used here: "
                "the fit has its own schedule and clipping; give pyro.optim.Adam({...}) or the like"
            )
        return optimizer.pt_optim_constructor(parameters, **optimizer.pt_optim_args)
    if not callable(optimizer):
        raise OptionError(
            "optimizer must be a function from parameters to a torch optimizer, such as "
            f"functools.partial(torch.optim.Adam, lr=0.01), but got {optimizer!r}"
        )
    made: Any = optimizer(parameters)
    if not isinstance(made, Optimizer):
        raise OptionError(f"optimizer must map parameters to a torch optimizer, but returned {type(made).__name__}")
    return made


def copy_of(state: Sequence[Tensor]) -> list[Tensor]:
    """The values of tensors."""
    return [tensor.detach().clone() for tensor in state]


@torch.no_grad()
def restore(state: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Put values back that :func:`copy_of` took."""
    for tensor, value in zip(state, values, strict=True):
        tensor.copy_(value)
