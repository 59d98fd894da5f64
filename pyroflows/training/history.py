"""Keep the figures that a fit records."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pyroflows.shapes import counted


class History(Mapping[str, np.ndarray]):
    """A history maps the name of each figure that a fit recorded to its numbers, one for each step or epoch.

    It is the attribute ``history`` of what a fit returns, and reads like a dictionary: ``history["elbo"]`` is an array
    ``(num_steps,)``, and ``list(history)`` are the names. Besides the figures of the objective it has ``grad_norm``,
    the norm of the gradient before clipping, and ``learning_rate``. :class:`pyroflows.FlowVI` records ``elbo``, in
    nats, and ``log_weight_variance``, about twice the KL divergence to the posterior where it is small.

    Args:
        records: the numbers of each figure by name, all of one length; None for none.
        unit: "step" or "epoch", to which one number belongs.

    Example:
        >>> history = History({"elbo": [-3.0, -2.0]})
        >>> history["elbo"]
        array([-3., -2.])
        >>> history
        History(2 steps: elbo)
    """

    def __init__(self, records: Mapping[str, Sequence[float]] | None = None, unit: str = "step") -> None:
        self._unit = unit
        self._records: dict[str, list[float]] = {name: list(values) for name, values in (records or {}).items()}

    def append(self, **values: float) -> None:
        """Record the figures of one more step; a new figure gets NaN for the steps before."""
        num_steps = self.num_steps
        for name, value in values.items():
            self._records.setdefault(name, [math.nan] * num_steps).append(value)

    def recent(self, name: str, count: int) -> np.ndarray:
        """Return the last ``count`` numbers of a figure, without those that are not finite."""
        values = np.asarray(self._records[name][-count:])
        return values[np.isfinite(values)]

    def last(self, name: str) -> float:
        """Return the last number of a figure."""
        return self._records[name][-1]

    def as_lists(self) -> dict[str, list[float]]:
        """Return copies of all numbers by name, from which ``History`` can be made again."""
        return {name: list(values) for name, values in self._records.items()}

    @property
    def num_steps(self) -> int:
        """The number of steps, or of epochs, that were recorded; the length of a history is its number of figures."""
        return len(next(iter(self._records.values()), []))

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self._records[name], dtype=float)

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"History({counted(self.num_steps, self._unit)}: {', '.join(self)})"
