"""What solves of continuous flows report to whoever asks: their numbers of evaluations, and penalties of their fields.

Layers stay stateless: a context manager stands in a variable of its own thread or task, and solves add to it.
"""

from contextvars import ContextVar, Token
from typing import Any

from torch import Tensor

_evaluations: ContextVar[tuple["Evaluations", ...]] = ContextVar("evaluations", default=())
_penalties: ContextVar["Penalties | None"] = ContextVar("penalties", default=None)


class Evaluations:
    """A context manager that counts how often solves of continuous flows evaluate their networks.

    A program that was compiled before counts nothing.

    Attributes:
        forward: evaluations from base to data.
        inverse: evaluations from data to base.
        adjoint: evaluations of adjoint equations, in backward passes of what was solved inside.

    Example:
        >>> flow = pf.flows.CNF(2)
        >>> with Evaluations() as count:
        ...     _ = flow().log_prob(torch.zeros(5, 2))
        >>> count
        Evaluations(forward=0, inverse=..., adjoint=0)
    """

    def __init__(self) -> None:
        self.forward, self.inverse, self.adjoint = 0, 0, 0
        self._token: Token[Any] | None = None

    @property
    def total(self) -> int:
        """The number of all evaluations."""
        return self.forward + self.inverse + self.adjoint

    def __enter__(self) -> "Evaluations":
        self._token = _evaluations.set((*_evaluations.get(), self))
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._token is not None
        _evaluations.reset(self._token)

    def __repr__(self) -> str:
        return f"Evaluations(forward={self.forward}, inverse={self.inverse}, adjoint={self.adjoint})"


class Penalties:
    """A context manager that collects the penalties of continuous layers, which are computed only inside of one.

    The trainer of the library adds them to the loss of each step. A loop of one's own does the same:

    Example:
        >>> flow = pf.Flow([pf.transforms.Continuous(2, kinetic_energy=0.01)])
        >>> with Penalties() as penalties:
        ...     loss = -flow().log_prob(torch.zeros(5, 2)).mean()
        >>> loss = loss + penalties.total
    """

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self._token: Token[Any] | None = None

    @property
    def total(self) -> Tensor | float:
        """The sum of the penalties; 0 if there was none."""
        return sum(self.found[1:], self.found[0]) if self.found else 0.0

    def __enter__(self) -> "Penalties":
        self._token = _penalties.set(self)
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._token is not None
        _penalties.reset(self._token)


def active_counts() -> tuple[Evaluations, ...]:
    """Return the counts that a solve adds to."""
    return _evaluations.get()


def active_penalties() -> Penalties | None:
    """Return what collects penalties here, if anything does."""
    return _penalties.get()
