"""One training loop: optimiser, schedule, gradient clipping, guard, stopping rule, progress, history.

It knows a step function and no objective.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor
from torch.optim import Optimizer
from tqdm.auto import tqdm

from pyroflows.errors import DivergedError, OptionError

# Fills the gradients and returns what to record, each a scalar. The value under ``monitor`` should grow.
Step = Callable[[], Mapping[str, Tensor]]
OptimizerLike: TypeAlias = Callable[[Iterable[Tensor]], Optimizer] | PyroOptim

LEARNING_RATE = 1e-2
WARM_UP = 20
WINDOW = 50
PATIENCE = 6  # windows without progress
MIN_DECAY = 200
MAX_CONSTANT = 6000
MAX_NORM = 10.0
MAX_BAD_STEPS = 25


class History(Mapping[str, np.ndarray]):
    """What a fit recorded, by name, one number a step; also ``grad_norm`` and ``learning_rate``.

    Example:
        >>> history = History({"elbo": [-3.0, -2.0]})
        >>> history["elbo"]
        array([-3., -2.])
        >>> history
        History(2 steps: elbo)
    """

    def __init__(self, records: Mapping[str, Sequence[float]] | None = None) -> None:
        self._records: dict[str, list[float]] = {name: list(values) for name, values in (records or {}).items()}

    def append(self, **values: float) -> None:
        for name, value in values.items():
            self._records.setdefault(name, []).append(value)

    def recent(self, name: str, count: int) -> np.ndarray:
        """The last ``count`` numbers, without those that are not finite."""
        values = np.asarray(self._records[name][-count:])
        return values[np.isfinite(values)]

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
        return f"History({self.num_steps} steps: {', '.join(self)})"


def train(
    step: Step,
    parameters: Iterable[Tensor],
    *,
    monitor: str,
    num_steps: int | None = None,
    optimizer: OptimizerLike | None = None,
    settled: Callable[[History], bool] = lambda history: False,
    progress_bar: bool = True,
) -> History:
    r"""Run ``step`` until the objective no longer grows.

    The learning rate rises linearly over 20 steps, stays constant, and falls to zero by a cosine. With ``num_steps``
    the fall is the second half. Without, it begins where ``settled`` says so, or where ``monitor`` has not grown for
    300 steps by more than its noise, and takes half the steps so far. A step with a non-finite loss or gradient is left
    out; after 25 of them in a row the parameters go back to the last good state.

    Args:
        step: fills the gradients of the parameters and returns numbers to record.
        parameters: what is trained.
        monitor: the recorded number that should grow.
        num_steps: number of steps; None for as many as it takes.
        optimizer: a function from parameters to a torch optimizer, or a Pyro optimizer; None for Adam at 0.01.
        settled: whether the history shows that the fit is good enough for the final decay.
        progress_bar: whether to show one.

    Raises:
        DivergedError: if steps stay non-finite; parameters are in the last good state then.
        OptionError: if ``num_steps`` is not positive.
    """
    if num_steps is not None and num_steps < 1:
        raise OptionError(f"num_steps must be positive, got {num_steps}")
    parameters = list(parameters)
    optim = _optimizer(optimizer, parameters)
    rates = [group["lr"] for group in optim.param_groups]
    history = History()
    good = _copy(parameters)
    schedule = _Schedule(num_steps)
    num_bad = 0
    with tqdm(total=num_steps, disable=not progress_bar, unit="step") as bar:
        while (factor := schedule.factor(history.num_steps)) is not None:
            for group, rate in zip(optim.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optim.zero_grad()
            try:
                record = {name: value.item() for name, value in step().items()}
            except KeyboardInterrupt:
                if num_bad:
                    _restore(parameters, good)
                raise
            norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM).item()
            is_good = math.isfinite(norm) and math.isfinite(record[monitor])
            num_bad = 0 if is_good else num_bad + 1
            history.append(**record, grad_norm=norm, learning_rate=rates[0] * factor)
            if is_good:
                # The state before the step is the one that has just shown a finite objective.
                if history.num_steps % WINDOW == 0:
                    good = _copy(parameters)
                optim.step()
            if num_bad == MAX_BAD_STEPS:
                _restore(parameters, good)
                raise DivergedError(
                    f"{MAX_BAD_STEPS} steps in a row, up to step {history.num_steps}, had a non-finite {monitor} or "
                    "gradient; the parameters are back in the last good state. Try a smaller learning rate, other "
                    "initial values (init_loc_fn), or dtype=torch.float64"
                )
            if history.num_steps % WINDOW == 0:
                schedule.look(history, monitor, settled)
            bar.update()
            bar.set_postfix({monitor: f"{record[monitor]:.2f}"}, refresh=False)
    return history


class _Schedule:
    """The factor of the learning rate at each step, and when to stop."""

    def __init__(self, num_steps: int | None) -> None:
        self._end = num_steps
        self._decay = num_steps - num_steps // 2 if num_steps is not None else None
        self._best = -math.inf
        self._stalled = 0

    def factor(self, step: int) -> float | None:
        """None when it is time to stop."""
        if self._end is not None and step >= self._end:
            return None
        warm_up = min(1.0, (step + 1) / WARM_UP)
        if self._end is None or self._decay is None or (left := self._end - step) > self._decay:
            return warm_up
        return warm_up * 0.5 * (1 - math.cos(math.pi * left / (self._decay + 1)))

    def look(self, history: History, monitor: str, settled: Callable[[History], bool]) -> None:
        """Once a window: whether the decay should begin."""
        if self._end is not None:
            return
        window = history.recent(monitor, WINDOW)
        if not len(window):
            return
        noise = window.std() / math.sqrt(len(window))
        # The bar moves only with progress that counts, so that slow growth adds up.
        grown = window.mean() > self._best + 2 * noise
        self._best, self._stalled = (window.mean(), 0) if grown else (self._best, self._stalled + 1)
        if settled(history) or self._stalled >= PATIENCE or history.num_steps >= MAX_CONSTANT:
            self._decay = max(MIN_DECAY, history.num_steps // 2)
            self._end = history.num_steps + self._decay


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


def _copy(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def _restore(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
