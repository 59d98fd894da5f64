"""Reproducible random numbers that leave the caller's generators as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Inside, torch's generators start at ``seed``; after, they are as before. None changes nothing."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield
