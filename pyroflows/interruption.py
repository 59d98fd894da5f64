"""Keep what a call has found where Ctrl-C or divergence ends it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyroflows.errors import DivergedError, FitInterrupted


@contextmanager
def keeping(what: str, found: Callable[[Any], Any], least: str = "anything") -> Iterator[None]:
    """Give the result so far to the exception that ends a ``with`` block, in its attribute ``result``.

    A ``KeyboardInterrupt`` becomes a :class:`FitInterrupted`; a :class:`DivergedError` stays what it is.

    Args:
        what: what the block is, as the subject of a sentence.
        found: a function that returns what the block has found so far, as the call would have returned it, or None if
            that is too little. It gets the result of an inner block that was interrupted or diverged; None if there was
            none.
        least: what a result needs at least.

    Example:
        >>> draws = []
        >>> try:
        ...     with keeping("drawing", lambda _: draws or None, least="a draw"):
        ...         draws.append(0.5)
        ...         raise KeyboardInterrupt
        ... except pf.FitInterrupted as interrupted:
        ...     print(interrupted, interrupted.result)
        drawing was interrupted; what it had found by then is the attribute result of this exception [0.5]
    """
    try:
        yield
    except KeyboardInterrupt as error:
        result = found(getattr(error, "result", None))
        if result is None:
            message = f"{what} was interrupted before it had {least}, so that there is no result"
        else:
            message = f"{what} was interrupted; what it had found by then is the attribute result of this exception"
        raise FitInterrupted(message, result) from None
    except DivergedError as error:
        error.result = found(error.result)
        raise
