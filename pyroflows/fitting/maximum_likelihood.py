"""Define the objective that maximises the likelihood of batches of data."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyroflows.flows import Flow
from pyroflows.training.data import Data, Rows
from pyroflows.training.objective import Figures, Objective
from pyroflows.training.shuffling import ShuffledBatches

# Where no gradient is needed, this many rows are scored at once, or as many as have this many elements.
MAX_SCORED, MAX_SCORED_ELEMENTS = 4096, 2**18


class MaximumLikelihood(Objective):
    r"""This objective maximises the log-likelihood :math:`\sum_i w_i \log q(x_i \mid c_i)` over a flow q.

    A step records ``log_prob``, the weighted mean :math:`\frac1B \sum_i \frac{w_i}{\bar w} \log q(x_i \mid c_i)` over a
    batch in nats per row, where :math:`\bar w` is the mean weight of all training rows.

    Args:
        flow: the flow q.
        data: all rows.
        index: indices ``(n,)`` of the rows to train on.
        batch_size: number B of rows in a step, from 1 to n.

    Shapes: a step draws x ``(B, *event_shape)``, weights ``(B,)`` and, if there are any, contexts
    ``(B, *context_shape)``.

    Example:
        >>> from pyroflows.training.data import load
        >>> flow = pf.flows.MAF(2, num_layers=2, hidden_dims=(8,))
        >>> objective = MaximumLikelihood(flow, load(flow, torch.randn(100, 2)), torch.arange(100), batch_size=10)
        >>> pf.train(objective, num_steps=20, progress_bar=False)
        History(20 steps: log_prob, grad_norm, learning_rate)
    """

    monitor, falls = "log_prob", False
    remedy = "a smaller learning rate or float64, and look for outliers in x and context"

    def __init__(self, flow: Flow, data: Data, index: Tensor, batch_size: int) -> None:
        super().__init__(flow)
        self._data = data
        self._mean_weight = data.rows.weights[index].mean()
        self._batches = ShuffledBatches(index, batch_size)
        self._observes = flow.observes
        # The batch of the coming step, where the flow has seen it.
        self._seen: list[Tensor] | None = None

    def before_step(self) -> None:
        """Prepare a step. A flow that keeps statistics of data sees the batch of the step first."""
        super().before_step()
        if self._observes:
            self._seen = self._drawn()
            x, weights, *context = self._seen
            self.flow.observe(x, context[0] if context else None, weights)

    def draw(self) -> list[Tensor]:
        """Draw the next batch: rows, their weights, and their contexts if there are any."""
        drawn, self._seen = self._seen or self._drawn(), None
        return drawn

    def _drawn(self) -> list[Tensor]:
        rows = self._data.batch(next(self._batches))
        return [rows.x, rows.weights / self._mean_weight, *([] if rows.context is None else [rows.context])]

    def loss(self, x: Tensor, weights: Tensor, *context: Tensor) -> tuple[Tensor, Figures]:
        """Compute minus the weighted mean log-density of a batch."""
        log_prob = (weights * self.flow(*context).estimated().log_prob(x)).mean()
        return -log_prob, {"log_prob": log_prob}

    def log_prob(self, rows: Rows) -> Tensor:
        """Return the exact log-densities ``(n,)`` of rows, without gradients; few rows are scored at once."""
        return log_probs(self.flow, rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the shuffled data."""
        return self._batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` returned."""
        self._batches.load_state_dict(state)


@torch.no_grad()
def log_probs(flow: Flow, rows: Rows) -> Tensor:
    """Return the log-densities ``(n,)`` of rows under a flow, of which few are scored at once.

    Example:
        >>> from pyroflows.training.data import load
        >>> flow = pf.flows.MAF(2)
        >>> log_probs(flow, load(flow, torch.randn(10, 2)).rows).shape
        torch.Size([10])
    """
    return torch.cat([flow(part.context).log_prob(part.x) for part in parts(rows, flow.dim)])


def parts(rows: Rows, dim: int) -> list[Rows]:
    """Divide rows of ``dim`` elements into parts that can be scored at once."""
    size = num_scored(dim)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def num_scored(dim: int) -> int:
    """Return how many rows of ``dim`` elements are scored at once, so that networks on images need little memory.

    Example:
        >>> num_scored(2), num_scored(3 * 32 * 32)
        (4096, 85)
    """
    return max(1, min(MAX_SCORED, MAX_SCORED_ELEMENTS // dim))
