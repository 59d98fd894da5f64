"""What a law is: it samples, it scores, and it does both in one pass."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import constraints


class Law(Protocol):
    r"""A distribution whose draws come with their log-densities, as a call of a flow makes it.

    Whoever reports a number asks for exact log-densities: weights, evidence, chains, held-out scores. A law gives them
    by default. Training may use :meth:`estimated`, where log-densities may be unbiased estimates at less cost.

    Attributes:
        batch_shape: as in torch.
        event_shape: as in torch.
        support: where the density is positive.
        has_rsample: whether gradients flow through draws.

    Example:
        >>> law: Law = pf.flows.IAF(2)()
        >>> x, log_q = law.estimated().rsample_and_log_prob((5,))
        >>> torch.allclose(law.log_prob(x), log_q, atol=1e-5), law.is_exact
        (True, True)
    """

    @property
    def batch_shape(self) -> torch.Size: ...

    @property
    def event_shape(self) -> torch.Size: ...

    @property
    def support(self) -> constraints.Constraint: ...

    @property
    def has_rsample(self) -> bool: ...

    @property
    def is_exact(self) -> bool:
        """Whether its log-densities are exact, rather than unbiased estimates."""

    def sample(self, sample_shape: Any = ...) -> Tensor:
        """Draws ``(*sample_shape, *batch_shape, *event_shape)`` without gradients."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-densities of ``(..., *event_shape)``, of the batch shape."""

    def rsample_and_log_prob(self, sample_shape: Any = ...) -> tuple[Tensor, Tensor]:
        """Draws and their log-densities in one pass; the draws carry gradients where ``has_rsample``."""

    def estimated(self) -> "Law":
        """The law for training: log-densities as the layers give them, estimates where these are no exact ones."""
