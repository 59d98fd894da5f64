"""The protocol of laws: distributions that sample, score, and do both in one pass."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import constraints


class Law(Protocol):
    r"""A distribution whose draws come with their log-densities, such as a call of a flow returns.

    Every number that is reported needs exact log-densities: weights, evidence, chains, held-out scores. A law gives
    them by default. Training may use :meth:`estimated`, whose log-densities may be unbiased estimates at less cost.

    Attributes:
        batch_shape: the shape of independent laws, as for a torch distribution.
        event_shape: the shape of one draw from one law, as for a torch distribution.
        support: the constraint that holds where the density is positive.
        has_rsample: whether gradients flow through draws.

    Shapes: draws are ``(*sample_shape, *batch_shape, *event_shape)``; log-densities lack the event shape.

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
        """Whether log-densities are exact, rather than unbiased estimates."""

    def sample(self, sample_shape: Any = ...) -> Tensor:
        """Return draws ``(*sample_shape, *batch_shape, *event_shape)`` without gradients."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-densities ``(...)`` of values ``(..., *event_shape)``."""

    def rsample_and_log_prob(self, sample_shape: Any = ...) -> tuple[Tensor, Tensor]:
        """Return draws and their log-densities from one pass; the draws carry gradients if ``has_rsample`` is true."""

    def estimated(self) -> "Law":
        """Return the law for training, whose log-densities may be unbiased estimates."""


def shapes_of_law(law: Any) -> str:
    """Return the text of a distribution that has no parameters of its own to show: its class and its shapes.

    Example:
        >>> print(shapes_of_law(pf.flows.MAF(2)()))
        FlowDistribution(batch_shape: torch.Size([]), event_shape: torch.Size([2]))
    """
    return f"{type(law).__name__}(batch_shape: {law.batch_shape}, event_shape: {law.event_shape})"


def refuse_moments(law: Any) -> Tensor:
    """Raise, where the mean or the variance of a law is asked for that nobody knows.

    Raises:
        NotImplementedError: always; it says how to estimate them.
    """
    raise NotImplementedError(
        f"{type(law).__name__} has no mean and variance in closed form: estimate them from draws, such as by "
        "law.sample((1000,)).double().mean(0)"
    )
