"""The exceptions that pyroflows raises, and how it warns.

Each message says what was wrong, where, and what to do. Every exception is a :class:`FlowError` and also the built-in
error that fits, so that ``except ValueError`` works as usual. Every warning points at the user's line.
"""

import sys
import warnings

# Frames of these packages stand between a warning and the line of the user's that led to it.
_OURS = ("pyroflows", "pyro", "torch")


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


def warn(message: str) -> None:
    """Issue a ``UserWarning`` that points at the innermost line outside of pyroflows, Pyro and torch.

    A fixed ``stacklevel`` would not do: decorators add frames, and one warning can be reached in several ways.

    Args:
        message: what was noticed, and what to do.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
