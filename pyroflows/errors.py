"""The exceptions that pyroflows raises, and how it warns.

Each message says what was wrong, where, and what to do. Every exception is a :class:`FlowError` and also the built-in
error that fits, so that ``except ValueError`` works as usual. Every warning points at the user's line.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

# Frames of these packages stand between a warning and the line of the user's that led to it, as do their decorators.
_OURS = ("pyroflows", "pyro", "torch", "contextlib", "functools")


class FlowError(Exception):
    """The base class of every error that pyroflows raises on purpose.

    Example:
        >>> try:
        ...     pf.transforms.Permutation([0, 0])
        ... except pf.FlowError as error:
        ...     print(error)
        order must be a permutation of 0 to 1, got [0, 0]
    """


class ShapeError(FlowError, ValueError):
    """The shape of a tensor does not fit: an event or a context has another one, or batch shapes do not broadcast."""


class OptionError(FlowError, ValueError):
    """An option has a value outside its range, or a name that does not exist."""


class NotCalledError(FlowError, AttributeError):
    """A flow was used as a distribution: a call of the flow returns its distribution."""


class InversionError(FlowError, RuntimeError):
    """A layer could not be inverted at a value to the precision of its dtype."""


class IntegrationError(FlowError, RuntimeError):
    """The differential equation of a continuous flow could not be solved to its tolerance."""


class InexactError(FlowError, RuntimeError):
    """An exact log-determinant was asked for, but a layer has only an estimate of it."""


class ModelError(FlowError, ValueError, RuntimeError):
    """A Pyro model cannot be fitted as it is; the message names the site.

    It is both a ``ValueError`` and a ``RuntimeError``, since Pyro's own guides raise either.
    """


class DataError(FlowError, ValueError):
    """The data given to a model or a fit contain values that cannot be used, such as NaN."""


class DivergedError(FlowError, RuntimeError):
    """A fit met non-finite losses too many times in a row; the last good state was restored."""

    #: What :meth:`pyroflows.FlowVI.run` would have returned, from the best state that it found; None elsewhere.
    result: Any = None


class FitInterrupted(KeyboardInterrupt):
    """A fit or chains were interrupted, by Ctrl-C or by the stop button of a notebook.

    It is a ``KeyboardInterrupt``, so that it ends a program as usual.

    Args:
        message: what was interrupted, and where the result is.
        result: what the call would have returned, from the best state that was found so far; None if there was none.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


class UntraceableError(FlowError, RuntimeError):
    """A model's code depends on the values of its latents, so that one recording cannot stand for all of its runs."""


class CheckpointError(FlowError, ValueError):
    """A file cannot be read, or does not belong to this model or guide."""


class StateError(CheckpointError, RuntimeError):
    """A state dict is that of another flow; the message names the first difference.

    It is also a ``RuntimeError``, as torch raises for states that do not fit.
    """


class PlotError(FlowError, ImportError):
    """A plot was asked for, but matplotlib is not installed or there is nothing to draw."""


# The warnings that need not be repeated in the present context.
_SAID: ContextVar[set[str] | None] = ContextVar("said", default=None)


@contextmanager
def each_said_once(said: set[str]) -> Iterator[None]:
    """Let :func:`warn` say each message once inside a ``with`` block, in place of once for each reason.

    A fit may meet the same reason for each of its candidates, and again where it is repeated in float64.

    Args:
        said: the messages that were said before, to which those of the block are added.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught, each_said_once(set()):
        ...     warnings.simplefilter("always")
        ...     for message in ("slow", "slow", "flat"):
        ...         warn(message)
        >>> [str(warning.message) for warning in caught]
        ['slow', 'flat']
    """
    token = _SAID.set(said)
    try:
        yield
    finally:
        _SAID.reset(token)


def warn(message: str) -> None:
    """Issue a ``UserWarning`` that points at the innermost line outside of pyroflows, Pyro and torch.

    A fixed ``stacklevel`` would not do: decorators add frames, and one warning can be reached in several ways.

    Args:
        message: what was noticed, and what to do.
    """
    said = _SAID.get()
    if said is not None:
        if message in said:
            return
        said.add(message)
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and is_ours(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def is_ours(frame: FrameType) -> bool:
    """Tell whether a frame runs code of pyroflows, Pyro or torch, or of a decorator, rather than the user's."""
    return frame.f_globals.get("__name__", "").partition(".")[0] in _OURS
