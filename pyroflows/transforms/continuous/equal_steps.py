"""Equal steps in the place of adaptive ones, for a while: where one smooth map is needed, or a recording."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

NUMBERS_OF_STEPS = (4, 8, 16, 32, 64, 128)

_num_steps: ContextVar[int | None] = ContextVar("num_steps", default=None)


@contextmanager
def equal_steps(num_steps: int | None) -> Iterator[None]:
    """Let adaptive solves take so many equal steps inside of this context; None leaves them adaptive.

    The steps of an adaptive solve depend on all rows of a batch, and they change from one place to the next: within its
    tolerance the result is no function of a row. Equal steps make one smooth map of it, and can be recorded.
    """
    token = _num_steps.set(num_steps)
    try:
        yield
    finally:
        _num_steps.reset(token)


def num_equal_steps() -> int | None:
    """Return the number of equal steps that adaptive solves take here, or None."""
    return _num_steps.get()


def enough_steps(solve: Callable[[], Sequence[Tensor]], tolerance: float) -> int | None:
    """Return the smallest number of equal steps that agree with adaptive ones; None if the largest does not.

    Args:
        solve: a function without arguments that solves adaptively, and returns tensors.
        tolerance: the largest difference of any element.

    Example:
        >>> flow = pf.flows.CNF(2)
        >>> z = torch.randn(100, 2)
        >>> enough_steps(lambda: flow.transform.forward_and_ladj(z), tolerance=1e-3)
        4
    """
    exact = solve()
    for num_steps in NUMBERS_OF_STEPS:
        with equal_steps(num_steps):
            found = solve()
        if all(bool(((a - b).abs() < tolerance).all()) for a, b in zip(found, exact, strict=True)):
            return num_steps
    return None
