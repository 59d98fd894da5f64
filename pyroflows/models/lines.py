"""Find the line of a user's model at which something happened, and show it in a message."""

import linecache
from traceback import walk_stack, walk_tb
from types import FrameType

from pyroflows.errors import is_ours


def line_of_error(error: BaseException) -> str:
    """Show the line outside of pyroflows, Pyro and torch that led to an error, as a part of a sentence.

    Returns:
        Words such as " at model.py:12, `mean = X @ b`"; empty if there is no such line.
    """
    shown = [_shown(frame, line) for frame, line in walk_tb(error.__traceback__) if not is_ours(frame)]
    return shown[-1] if shown else ""


def line_of_frame(frame: FrameType) -> str:
    """Show the line outside of pyroflows, Pyro and torch that led to a frame, as :func:`line_of_error` does."""
    return next((_shown(outer, line) for outer, line in walk_stack(frame) if not is_ours(outer)), "")


def _shown(frame: FrameType, line: int) -> str:
    source = linecache.getline(frame.f_code.co_filename, line).strip()
    place = f" at {frame.f_code.co_filename.rpartition('/')[2]}:{line}"
    return f"{place}, `{source}`" if source else place
