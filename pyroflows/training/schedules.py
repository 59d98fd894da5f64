"""Decide when the learning rate of a fit falls and when training ends."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.training.history import History
from pyroflows.training.snapshot import Snapshot

WINDOW = 50  # number of steps between two checks for a plateau
PATIENCE = 6  # number of windows without progress before the decay
MIN_DECAY = 200
MAX_CONSTANT = 6000


class Schedule(Protocol):
    """A schedule says how the learning rate falls and when a fit ends; one object serves one fit."""

    @property
    def num_steps(self) -> int | None:
        """Return the number of steps of the whole fit, or None as long as it is not known."""

    def factor(self, step: int) -> float | None:
        """Return the factor of the learning rate at a step, from 0 to 1, or None if the fit ends before that step."""

    def look(self, history: History) -> None:
        """Take note of the figures recorded so far; the trainer calls this after each step."""

    def status(self, history: History) -> dict[str, str]:
        """Return the texts that the progress bar shows, by name."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that the schedule has taken note of."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` returned."""


class Plateau:
    r"""This schedule keeps the learning rate until a noisy objective no longer improves, then lowers it along a cosine.

    The decay from step b to step e multiplies the learning rate at step k by

    .. math:: \frac12 \Big(1 - \cos\Big(\pi \frac{e - k}{e - b + 1}\Big)\Big).

    With ``num_steps`` it is the second half of the fit. Otherwise it begins as soon as ``settled`` says so, the
    monitored figure has not improved by more than its noise for 300 steps, or 6000 steps have passed. It then takes
    half as many steps as there were before, at least ``min_decay``.

    Args:
        monitor: name of the recorded figure to watch.
        num_steps: number of steps, positive; None for as many as it takes.
        settled: a function that tells from the history whether the fit is good enough for the decay.
        hold: number of steps before which the decay cannot begin.
        falls: whether the figure falls as the fit gets better, instead of growing.
        min_decay: the least number of steps of the decay where ``num_steps`` is None.

    Raises:
        OptionError: if ``num_steps`` is not positive.

    Example:
        >>> schedule = Plateau("elbo", num_steps=100, falls=False)
        >>> [schedule.factor(step) for step in (0, 49, 100)]
        [1.0, 1.0, None]
        >>> 0.0 < schedule.factor(99) < schedule.factor(75) < 1.0
        True
    """

    def __init__(
        self,
        monitor: str,
        num_steps: int | None = None,
        settled: Callable[[History], bool] = lambda history: False,
        hold: int = 0,
        falls: bool = True,
        min_decay: int = MIN_DECAY,
    ) -> None:
        if num_steps is not None and num_steps < 1:
            raise OptionError(f"num_steps must be positive, got {num_steps}")
        self._monitor = monitor
        self._settled = settled
        self._hold = hold
        self._min_decay = min_decay
        self._sign = -1 if falls else 1
        self._begin = None if num_steps is None else num_steps // 2
        self._end = num_steps
        self._best = -math.inf
        self._stalled = 0

    @property
    def num_steps(self) -> int | None:
        """Return the number of steps of the whole fit, or None before the decay begins."""
        return self._end

    def factor(self, step: int) -> float | None:
        """Return 1 until the decay begins, then the cosine, and None after the end."""
        if self._begin is None or self._end is None:
            return 1.0
        return _cosine(step, self._begin, self._end)

    def look(self, history: History) -> None:
        """Decide, once in 50 steps, whether the decay should begin."""
        if self._end is not None or history.num_steps % WINDOW or history.num_steps <= self._hold:
            return
        window = self._sign * history.recent(self._monitor, WINDOW)
        if not len(window):
            return
        noise = window.std() / math.sqrt(len(window))
        # The best mean rises only with growth beyond the noise, so that slow growth adds up.
        grown = window.mean() > self._best + 2 * noise
        self._best, self._stalled = (float(window.mean()), 0) if grown else (self._best, self._stalled + 1)
        if self._settled(history) or self._stalled >= PATIENCE or history.num_steps >= MAX_CONSTANT:
            self._begin = history.num_steps
            self._end = self._begin + max(self._min_decay, self._begin // 2)

    def status(self, history: History) -> dict[str, str]:
        """Return the monitored figure of the last step."""
        return {self._monitor: f"{history.last(self._monitor):.2f}"}

    def state_dict(self) -> dict[str, Any]:
        """Return where the decay begins and ends, the best mean, and how long progress has stalled."""
        return {"begin": self._begin, "end": self._end, "best": self._best, "stalled": self._stalled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` returned."""
        self._begin, self._end = state["begin"], state["end"]
        self._best, self._stalled = state["best"], state["stalled"]


class EarlyStopping:
    """This schedule keeps the learning rate until a score on held-out data no longer improves, then lowers it to zero.

    The score is taken after each epoch; the state before training counts as epoch 0. The decay along a cosine begins
    where the score has not improved for ``patience`` epochs, or at two thirds of ``max_epochs``. It starts from the
    best state, takes half as many epochs as there were before, and stops early where the score has not improved for
    ``patience`` epochs again.

    Args:
        monitor: name of the recorded figure that the score is the held-out value of.
        score: a function that returns the score; one that is not finite counts as the worst.
        tensors: the tensors whose best values are kept, such as parameters and buffers of a flow.
        steps_per_epoch: number of steps in an epoch, at least 1.
        max_epochs: number of epochs at most, at least 1.
        patience: number of epochs without a better score, at least 1.
        falls: whether the score falls as the fit gets better, instead of growing.

    Attributes:
        epochs: the history of epochs, with means over their steps.
        best: the best score.
        best_epoch: the epoch after which it was taken.
        still_growing: whether the decay began at two thirds of ``max_epochs`` while the score still improved, that is,
            the best one came in the last third of the epochs before.

    Example:
        >>> x = torch.tensor([2.0])
        >>> schedule = EarlyStopping("log_prob", lambda: -x.item(), [x], steps_per_epoch=1, max_epochs=9, patience=2)
        >>> history = History()
        >>> for value in (1.0, 4.0):
        ...     x = x.fill_(value)  # a step
        ...     history.append(log_prob=0.0)
        ...     schedule.look(history)
        >>> schedule.restore_best()
        >>> schedule.best_epoch, x
        (1, tensor([1.]))
    """

    def __init__(
        self,
        monitor: str,
        score: Callable[[], float],
        tensors: Iterable[Tensor],
        steps_per_epoch: int,
        max_epochs: int,
        patience: int,
        falls: bool = False,
    ) -> None:
        self.epochs = History(unit="epoch")
        self._worst = math.inf if falls else -math.inf
        self.best = self._worst
        self.best_epoch = 0
        self.still_growing = False
        self._monitor = monitor
        self._score = score
        self._best_state = Snapshot(tensors)
        self._steps_per_epoch = steps_per_epoch
        self._patience = patience
        self._stalled = 0
        self._end = max_epochs
        self._begin = max_epochs - max_epochs // 3
        self._keep_if_best(score(), 0)

    @property
    def num_steps(self) -> int | None:
        """Return the largest number of steps of the whole fit, or None before the decay begins."""
        is_decaying = self.epochs.num_steps >= self._begin
        return self._end * self._steps_per_epoch if is_decaying else None

    def factor(self, step: int) -> float | None:
        """Return 1 until the decay begins, then the cosine, and None after the end."""
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
            self.still_growing = not has_stalled and self.best_epoch > 2 * epoch / 3
            self.restore_best()
            self._stalled = 0
        elif epoch > self._begin and has_stalled:
            self._end = epoch

    def restore_best(self) -> None:
        """Put the best values back into the tensors."""
        self._best_state.put_back()

    def status(self, history: History) -> dict[str, str]:
        """Return the number of epochs, and the monitored figure in training and on held-out data."""
        if not self.epochs:
            return {}
        shown = (self._monitor, f"validation_{self._monitor}")
        return {"epoch": str(self.epochs.num_steps), **{name: f"{self.epochs.last(name):.3f}" for name in shown}}

    def state_dict(self) -> dict[str, Any]:
        """Return the epochs so far, the best state and score, and where the decay begins and ends."""
        return {
            "epochs": self.epochs.as_lists(),
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_state": self._best_state.values,
            "begin": self._begin,
            "end": self._end,
            "stalled": self._stalled,
            "still_growing": self.still_growing,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` returned."""
        self.epochs = History(state["epochs"], unit="epoch")
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.still_growing = state["still_growing"]
        self._best_state.load(state["best_state"])
        self._begin, self._end, self._stalled = state["begin"], state["end"], state["stalled"]

    def _keep_if_best(self, score: float, epoch: int) -> None:
        score = score if math.isfinite(score) else self._worst
        is_better = score < self.best if self._worst > 0 else score > self.best
        if epoch == 0 or is_better:
            self._best_state.take()
            self.best, self.best_epoch, self._stalled = score, epoch, 0
        else:
            self._stalled += 1


def _cosine(step: int, begin: int, end: int) -> float | None:
    """Return 1 before step ``begin``, then a cosine that falls to 0 at step ``end``, and None from there on."""
    if step >= end:
        return None
    return 1.0 if step < begin else 0.5 * (1 - math.cos(math.pi * (end - step) / (end - begin + 1)))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
