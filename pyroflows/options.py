"""Checks of options that many layers and flows share: whole numbers, fractions, instances where a class was given."""

import math
import operator
from numbers import Real
from typing import Any

from pyroflows.errors import OptionError


def checked_int(name: str, value: Any, least: int = 1) -> int:
    """Return an option as an int, if it is a whole number of at least ``least``.

    Args:
        name: the name of the option, for the message.
        value: what the user gave; integers of NumPy and torch count, bools and floats do not.
        least: the smallest number that is allowed.

    Raises:
        OptionError: if it is not.

    Example:
        >>> checked_int("num_layers", np.int64(3))
        3
        >>> try:
        ...     checked_int("num_layers", 2.5)
        ... except pf.FlowError as error:
        ...     print(error)
        num_layers must be an integer of at least 1, got 2.5
    """
    number = as_int(value)
    if number is None:
        raise OptionError(f"{name} must be an integer of at least {least}, got {value!r}")
    if number < least:
        raise OptionError(f"{name} must be at least {least}, got {number}")
    return number


def as_int(value: Any) -> int | None:
    """Return a whole number as an int; None for anything else, such as a bool or a float.

    Example:
        >>> as_int(np.int64(3)), as_int(True), as_int(2.0)
        (3, None, None)
    """
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):  # torch raises RuntimeError for tensors of several elements
        return None


def checked_fraction(name: str, value: Any) -> float:
    """Return an option, if it is a fraction of the rows between 0 and 1.

    Args:
        name: the name of the option, for the message.
        value: what the user gave.

    Raises:
        OptionError: if it is not.

    Example:
        >>> try:
        ...     checked_fraction("validation", torch.zeros(5, 2))
        ... except pf.FlowError as error:
        ...     print(error)
        validation must be a fraction of the rows, between 0 and 1, got Tensor
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 < value < 1:
        got = value if is_number or value is None else kind(value)
        raise OptionError(f"{name} must be a fraction of the rows, between 0 and 1, got {got}")
    return float(value)


def checked_number(name: str, value: Any, above: float = 0.0, below: float = math.inf) -> float:
    """Return an option, if it is a number between two others.

    Args:
        name: the name of the option, for the message.
        value: what the user gave.
        above: the number that it must exceed.
        below: the number that it must stay below.

    Raises:
        OptionError: if it is not.

    Example:
        >>> try:
        ...     checked_number("coefficient", 1.5, below=1.0)
        ... except pf.FlowError as error:
        ...     print(error)
        coefficient must be a number above 0 and below 1, got 1.5
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not above < value < below:
        limit = "finite" if below == math.inf else f"below {below:g}"
        got = value if is_number or value is None else kind(value)
        raise OptionError(f"{name} must be a number above {above:g} and {limit}, got {got}")
    return float(value)


def kind(value: Any) -> str:
    """Return in words what a value is, for messages that expected another thing.

    Example:
        >>> kind(2.0), kind(pf.flows.MAF)
        ('float', 'the class MAF: make an instance first, MAF(...)')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}: make an instance first, {value.__name__}(...)"
    return type(value).__name__
