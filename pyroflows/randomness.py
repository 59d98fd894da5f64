"""Seeds that leave the caller's random generators as they were."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.exclusive import exclusive
from pyroflows.options import as_int, kind


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Start torch's generators at a seed inside a ``with`` block, and restore them after it.

    Another thread with a seed waits until the end of the block, since all threads share the generators.

    Args:
        seed: the seed; None to leave the generators alone, so that draws inside advance them as usual.

    Raises:
        OptionError: if the seed is neither None nor an integer that fits into 64 bits.

    Example:
        >>> with seeded(0):
        ...     first = torch.rand(2)
        >>> with seeded(0):
        ...     second = torch.rand(2)
        >>> torch.equal(first, second)
        True
    """
    if seed is None:
        yield
        return
    seed = _checked_seed(seed)
    with exclusive(), torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        yield


def _checked_seed(seed: Any) -> int:
    number = as_int(seed)
    if number is None or not -(2**63) <= number < 2**64:
        got = kind(seed) if isinstance(seed, Tensor) else repr(seed)
        raise OptionError(f"seed must be None or an integer that fits into 64 bits, got {got}")
    return number


def random_state() -> list[Tensor]:
    """The states of torch's generators, that of the CPU first, then those of all GPUs."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_random_state(state: Sequence[Tensor]) -> None:
    """Set torch's generators to states from :func:`random_state`.

    Args:
        state: the states, from a machine with the same number of GPUs.
    """
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1:])
