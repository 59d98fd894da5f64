"""The reverse KL divergence from a flow to a density that may lack its normalisation, as an objective."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pyroflows.fitting.estimators import Estimator, path_gradient
from pyroflows.flows import Flow
from pyroflows.training.objective import Figures, Objective


class ReverseKL(Objective):
    r"""Maximises :math:`\mathrm{ELBO} = E_{x \sim q}[\log p(x) - \log q(x)]` over a flow q: the log evidence minus the
    reverse KL divergence from q to p.

    It records ``elbo`` and ``log_weight_variance``, the mean and the variance of the log weights of a step in nats.

    Args:
        flow: the flow q.
        log_density: maps ``(S, *event_shape)`` to :math:`\log p(x)`, ``(S,)``, up to a constant. What a subclass draws
            besides noise is given to it too.
        estimator: of the gradient, see :mod:`pyroflows.fitting.estimators`.
        num_particles: S, the number of draws a step.
        own_parameters: parameters of the log-density, trained along.

    Example:
        >>> flow = pf.flows.Planar(2)
        >>> objective = ReverseKL(flow, lambda x: -((x - 1) ** 2).sum(-1))
        >>> pf.train(objective, num_steps=50, progress_bar=False)
        History(50 steps: elbo, log_weight_variance, grad_norm, learning_rate)
    """

    monitor, falls = "elbo", False

    def __init__(
        self,
        flow: Flow,
        log_density: Callable[..., Tensor],
        estimator: Estimator = path_gradient,
        num_particles: int = 128,
        own_parameters: Iterable[Tensor] = (),
    ) -> None:
        super().__init__(flow, own_parameters)
        self.log_density = log_density
        self.estimator = estimator
        self.num_particles = num_particles

    def draw(self) -> list[Tensor]:
        """Base draws."""
        return [self.noise(self.num_particles)]

    def loss(self, noise: Tensor, *drawn: Tensor) -> tuple[Tensor, Figures]:
        """The estimator's loss, and the figures of the log weights."""
        q = self.flow().estimated()
        loss, log_weights = self.estimator(q, lambda x: self.log_density(x, *drawn), self.base_draws(noise))
        variance = log_weights.var() if len(log_weights) > 1 else log_weights.new_tensor(torch.nan)
        return loss, {"elbo": log_weights.mean(), "log_weight_variance": variance}
