"""Schedules of a fit: when the learning rate falls and when training ends."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.training.history import History
from pyroflows.training.snapshot import Snapshot

WINDOW = 50  # steps between two looks
PATIENCE = 6  # windows without progress
MIN_DECAY = 200
MAX_CONSTANT = 6000


class Schedule(Protocol):
    """Says how the learning rate falls and when a fit ends; one object serves one fit."""

    @property
    def num_steps(self) -> int | None:
        """The number of steps of the whole fit, or None where that shows only on the way."""

    def factor(self, step: int) -> float | None:
        """What the learning rate is multiplied by at a step; None where the fit ends before it."""

    def look(self, history: History) -> None:
        """Take note of what was recorded; called after each step."""

    def status(self, history: History) -> dict[str, str]:
        """What the progress bar shows, by name."""

    def state_dict(self) -> dict[str, Any]:
        """All that the schedule has taken note of."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""


class Plateau:
    """A constant learning rate, then a cosine to zero, for an objective that is noisy and never the same twice.

    With ``num_steps`` the fall is the second half. Without, it begins where ``settled`` says so, or where the monitored
    figure has not got better for 300 steps by more than its noise, and takes half the steps so far.

    Args:
        monitor: name of the recorded figure that is watched.
        num_steps: number of steps; None for as many as it takes.
        settled: whether the history shows that the fit is good enough for the final decay.
        hold: number of steps before which the decay cannot begin.
        falls: whether the figure falls as the fit gets better, instead of growing.

    Raises:
        OptionError: if ``num_steps`` is not positive.
    """

    def __init__(
        self,
        monitor: str,
        num_steps: int | None = None,
        settled: Callable[[History], bool] = lambda history: False,
        hold: int = 0,
        falls: bool = True,
    ) -> None:
        if num_steps is not None and num_steps < 1:
            raise OptionError(f"num_steps must be positive, got {num_steps}")
        self.num_steps = num_steps
        self._monitor = monitor
        self._settled = settled
        self._hold = hold
        self._sign = -1 if falls else 1
        self._begin = None if num_steps is None else num_steps // 2
        self._end = num_steps
        self._best = -math.inf
        self._stalled = 0

    def factor(self, step: int) -> float | None:
        """One until the decay begins; see :class:`Schedule`."""
        if self._begin is None or self._end is None:
            return 1.0
        return _cosine(step, self._begin, self._end)

    def look(self, history: History) -> None:
        """Decide, once a window, whether the decay should begin."""
        if self._end is not None or history.num_steps % WINDOW or history.num_steps <= self._hold:
            return
        window = self._sign * history.recent(self._monitor, WINDOW)
        if not len(window):
            return
        noise = window.std() / math.sqrt(len(window))
        # The bar moves only with progress that counts, so that slow growth adds up.
        grown = window.mean() > self._best + 2 * noise
        self._best, self._stalled = (float(window.mean()), 0) if grown else (self._best, self._stalled + 1)
        if self._settled(history) or self._stalled >= PATIENCE or history.num_steps >= MAX_CONSTANT:
            self._begin = history.num_steps
            self._end = self._begin + max(MIN_DECAY, self._begin // 2)

    def status(self, history: History) -> dict[str, str]:
        """The monitored figure of the last step."""
        return {self._monitor: f"{history.last(self._monitor):.2f}"}

    def state_dict(self) -> dict[str, Any]:
        """Where the decay begins and ends, and how long progress has stalled."""
        return {"begin": self._begin, "end": self._end, "best": self._best, "stalled": self._stalled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._begin, self._end = state["begin"], state["end"]
        self._best, self._stalled = state["best"], state["stalled"]


class EarlyStopping:
    """A constant learning rate, then a cosine to zero, by a score on held-out data that is taken after each epoch.

    The fall begins where the score has not grown for ``patience`` epochs, or at two thirds of ``max_epochs``. It begins
    at the best state, takes half the epochs so far, and stops early where the score has not grown for ``patience``
    epochs again. The state before training counts as epoch 0.

    Args:
        monitor: name of the recorded figure whose score on held-out data is taken.
        score: takes the score, which should grow.
        tensors: those of which the best values are kept.
        steps_per_epoch: number of steps in an epoch.
        max_epochs: number of epochs at most.
        patience: number of epochs without a better score.

    Attributes:
        epochs: the history of epochs, with means over their steps.
        best: the best score.
        best_epoch: the epoch after which it was taken.
    """

    num_steps = None

    def __init__(
        self,
        monitor: str,
        score: Callable[[], float],
        tensors: Iterable[Tensor],
        steps_per_epoch: int,
        max_epochs: int,
        patience: int,
    ) -> None:
        self.epochs = History(unit="epoch")
        self.best = -math.inf
        self.best_epoch = 0
        self._monitor = monitor
        self._score = score
        self._best_state = Snapshot(tensors)
        self._steps_per_epoch = steps_per_epoch
        self._patience = patience
        self._stalled = 0
        self._end = max_epochs
        self._begin = max_epochs - max_epochs // 3
        self._keep_if_best(score(), 0)

    def factor(self, step: int) -> float | None:
        """One until the decay begins; see :class:`Schedule`."""
        return _cosine(step, self._begin * self._steps_per_epoch, self._end * self._steps_per_epoch)

    def look(self, history: History) -> None:
        """Decide, once an epoch, whether the state is the best so far, and whether the decay should begin or end."""
        epoch, step_of_epoch = divmod(history.num_steps, self._steps_per_epoch)
        if step_of_epoch:
            return
        score = self._score()
        means = {name: _mean(history.recent(name, self._steps_per_epoch)) for name in history}
        self.epochs.append(**means, **{f"validation_{self._monitor}": score})
        self._keep_if_best(score, epoch)
        has_stalled = self._stalled >= self._patience
        if epoch < self._begin and has_stalled:
            self._begin, self._end = epoch, epoch + max(1, epoch // 2)
        if epoch == self._begin:
            self.restore_best()
            self._stalled = 0
        elif epoch > self._begin and has_stalled:
            self._end = epoch

    def restore_best(self) -> None:
        """Put the best values back into the tensors."""
        self._best_state.put_back()

    def status(self, history: History) -> dict[str, str]:
        """The number of epochs, and the monitored figure in training and on held-out data."""
        if not self.epochs:
            return {}
        shown = (self._monitor, f"validation_{self._monitor}")
        return {"epoch": str(self.epochs.num_steps), **{name: f"{self.epochs.last(name):.3f}" for name in shown}}

    def state_dict(self) -> dict[str, Any]:
        """The epochs so far, the best state and score, and where the decay begins and ends."""
        return {
            "epochs": self.epochs.as_lists(),
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_state": self._best_state.values,
            "begin": self._begin,
            "end": self._end,
            "stalled": self._stalled,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.epochs = History(state["epochs"], unit="epoch")
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self._best_state.load(state["best_state"])
        self._begin, self._end, self._stalled = state["begin"], state["end"], state["stalled"]

    def _keep_if_best(self, score: float, epoch: int) -> None:
        score = score if math.isfinite(score) else -math.inf
        if epoch == 0 or score > self.best:
            self._best_state.take()
            self.best, self.best_epoch, self._stalled = score, epoch, 0
        else:
            self._stalled += 1


def _cosine(step: int, begin: int, end: int) -> float | None:
    """1 up to ``begin``, then down to 0 at ``end``; None from there on."""
    if step >= end:
        return None
    return 1.0 if step < begin else 0.5 * (1 - math.cos(math.pi * (end - step) / (end - begin + 1)))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
