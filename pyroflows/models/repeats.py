"""Whether a model that runs again gives the same, as it has to where its sites have the same values."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyroflows.errors import ModelError
from pyroflows.models.run import SiteValues
from pyroflows.randomness import random_state, seeded

# A model that draws random numbers of its own, such as dropout with a small rate, repeats itself by chance only rarely.
NUM_REPEATS, SEED_OF_REPEATS = 10, 20_011
NOT_FIXED = (
    "the model has no fixed log joint: two runs at equal values of all sites give site '{}' other log-densities, since "
    "the model draws random numbers outside of pyro.sample, or at a site that poutine.block hides, or since it changes "
    "what later runs see, such as data in place or a counter. Take rows by "
    "pyro.plate(..., subsample_size=...) instead of torch.randperm, noise by pyro.sample instead of torch.randn, and "
    "call .eval() on a module with dropout"
)


def require_same(log_probs: SiteValues, again: Callable[[], SiteValues]) -> None:
    """Raise if a repeated run, with other random numbers, has other log-densities."""
    with seeded(SEED_OF_REPEATS):
        for _ in range(NUM_REPEATS):
            state = random_state()
            others = again()
            for name, log_prob in log_probs.items():
                if name in others and not close(log_prob, others[name]):
                    raise ModelError(NOT_FIXED.format(name))
            # A model that draws no numbers of torch's has now shown what it does.
            if not differs(state, random_state()):
                break


def differs(state: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two states of torch's generators differ."""
    return not all(map(torch.equal, state, other))


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape, and the same numbers up to rounding."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = torch.finfo(torch.promote_types(a.dtype, b.dtype)).eps ** 0.5
    return torch.allclose(a.to(b.dtype), b, rtol=tolerance, atol=tolerance, equal_nan=True)
