"""Reproducible random numbers that leave the caller's generators as they were."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Inside, torch's generators start at ``seed``; after, they are as before. None changes nothing."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def random_state() -> list[Tensor]:
    """The state of torch's generators, of the CPU and of each GPU."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_random_state(state: Sequence[Tensor]) -> None:
    """Put torch's generators into a state that :func:`random_state` gave, on as many GPUs."""
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1:])
