"""One thread at a time where a call changes what all threads share: Pyro's handlers, torch's generators, validation."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from pyroflows.errors import warn

# Seconds after which a waiting thread says for what it waits.
PATIENCE = 60.0

# A fit may call other functions of the package, which enter again.
_lock = threading.RLock()
_is_free = threading.Event()
_is_free.set()
_holder: threading.Thread | None = None


@contextmanager
def exclusive() -> Iterator[None]:
    """Wait until no other thread is in such a block, and keep other threads out until the end of this one.

    A thread that is in such a block may enter further ones. Ctrl-C ends the wait.

    Example:
        >>> with exclusive(), exclusive():
        ...     pyro.settings.get("validate_distributions_pyro")
        True
    """
    global _holder
    this, holder = threading.current_thread(), _holder
    if holder not in (None, this) and not _is_free.wait(PATIENCE):
        warn(
            f"this call in thread '{this.name}' waits for a call of pyroflows in thread '{holder.name}', since one "
            "thread at a time can run Pyro's models; if that one waits for this one in turn, neither will ever end: "
            "make the calls one after the other"
        )
    # No signal can come between the acquisition of the lock and the block that releases it.
    with _lock:
        outer, _holder = _holder, this
        _is_free.clear()
        try:
            yield
        finally:
            _holder = outer
            if outer is None:
                _is_free.set()


class exclusive_property(cached_property):
    """A ``cached_property`` that is computed by one thread at a time.

    The standard library's own has a lock in Python 3.11, in which a thread would wait for another one that holds
    :func:`exclusive` and waits for that lock.
    """

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        with exclusive():
            return super().__get__(instance, owner)


def _free_in_child() -> None:
    """Free the lock in a process that was forked while another thread held it, and that does not have that thread."""
    global _lock, _holder
    _lock, _holder = threading.RLock(), None
    _is_free.set()


if hasattr(os, "register_at_fork"):  # which Windows lacks
    os.register_at_fork(after_in_child=_free_in_child)
