"""Maximum likelihood on batches of data, as an objective."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyroflows.flows import Flow
from pyroflows.training.data import Data, ShuffledBatches
from pyroflows.training.objective import Figures, Objective


class MaximumLikelihood(Objective):
    r"""Maximises :math:`\sum_i w_i \log q(x_i \mid c_i)` over a flow q.

    It records ``log_prob``, the weighted mean over the batch in nats a row, the weights divided by their mean over all
    training rows.

    Args:
        flow: the flow q.
        data: all rows.
        index: those to train on, ``(n,)``.
        batch_size: rows a step, n at most.
    """

    monitor, falls = "log_prob", False

    def __init__(self, flow: Flow, data: Data, index: Tensor, batch_size: int) -> None:
        super().__init__(flow)
        self._data = data
        self._mean_weight = data.rows.weights[index].mean()
        self._batches = ShuffledBatches(index, batch_size)

    def draw(self) -> list[Tensor]:
        """The next batch: rows, their weights, and their contexts if there are any."""
        rows = self._data.batch(next(self._batches))
        return [rows.x, rows.weights / self._mean_weight, *([] if rows.context is None else [rows.context])]

    def loss(self, x: Tensor, weights: Tensor, *context: Tensor) -> tuple[Tensor, Figures]:
        """Minus the mean log-density."""
        log_prob = (weights * self.flow(*context).estimated().log_prob(x)).mean()
        return -log_prob, {"log_prob": log_prob}

    def state_dict(self) -> dict[str, Any]:
        """The place in the shuffled data."""
        return self._batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._batches.load_state_dict(state)
