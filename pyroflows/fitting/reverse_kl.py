"""Define the objective that minimises the reverse KL divergence from a flow to a density known up to a constant."""

from collections.abc import Callable, Iterable

from torch import Tensor

from pyroflows.errors import ShapeError
from pyroflows.fitting.estimators import Estimator, elbo, log_weight_variance, path_gradient
from pyroflows.flows import Flow, FlowDistribution
from pyroflows.flows.without_data import require_no_statistics
from pyroflows.training.objective import Figures, Objective


class ReverseKL(Objective):
    r"""This objective maximises :math:`\mathrm{ELBO} = E_{x \sim q}[\log p(x) - \log q(x)]` over a flow q.

    The ELBO is the log evidence, the logarithm of the integral of p, minus the reverse KL divergence from q to the
    normalised p. A step records ``elbo``, the mean of the log weights :math:`\log p(x) - \log q(x)` in nats, and
    ``log_weight_variance``, their variance in squared nats. A draw at which p or its gradient is not finite leaves its
    step, see :mod:`pyroflows.fitting.estimators`. Both figures are then those of the other draws, and the logarithm of
    the share of these is added to the ELBO.

    Args:
        flow: the flow q.
        log_density: a function that maps draws ``(S, *event_shape)`` to :math:`\log p(x)`, ``(S,)``, up to a constant.
            The tensors that a subclass draws besides noise are its further arguments.
        estimator: an estimator of the gradient, see :mod:`pyroflows.fitting.estimators`.
        num_particles: number S of draws in a step, at least 1.
        own_parameters: parameters of the log-density to train with the flow.

    Raises:
        OptionError: if a layer of the flow keeps running statistics of data, which this objective does not have.

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
        require_no_statistics(flow, "a flow that minimises the reverse KL")
        self.log_density = log_density
        self.estimator = estimator
        self.num_particles = num_particles

    def draw(self) -> list[Tensor]:
        """Draw from the base."""
        return [self.noise(self.num_particles)]

    def law(self, *drawn: Tensor) -> FlowDistribution:
        """Return the law of the flow in a step, given the tensors that were drawn besides the noise."""
        return self.flow().estimated()

    def loss(self, noise: Tensor, *drawn: Tensor) -> tuple[Tensor, Figures]:
        """Compute the loss of the estimator, and mean and variance of the log weights."""
        q = self.law(*drawn)

        def log_density(x: Tensor) -> Tensor:
            log_p = self.log_density(x, *drawn)
            if log_p.shape != x.shape[:1]:
                raise ShapeError(
                    f"log_density must give one number for each of {len(x)} draws, but gave a tensor of shape "
                    f"{tuple(log_p.shape)}: sum over the axes of an event"
                )
            return log_p

        loss, log_weights = self.estimator(q, log_density, self.base_draws(noise))
        return loss, {"elbo": elbo(log_weights), "log_weight_variance": log_weight_variance(log_weights)}
