r"""Gradient estimators of the reverse Kullback-Leibler divergence.

Each draws x from the flow and returns a loss, whose gradient estimates that of :math:`-\mathrm{ELBO}`, and the log
weights :math:`\log p(x, y) - \log q(x)`, whose mean is the ELBO.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from pyroflows.flows import Flow

LogDensity = Callable[[Tensor], Tensor]
Estimator = Callable[[Flow, LogDensity, int], tuple[Tensor, Tensor]]


def total_gradient(flow: Flow, log_joint: LogDensity, num_particles: int) -> tuple[Tensor, Tensor]:
    r"""The reparametrised gradient, :math:`\nabla_\phi \frac1S \sum_i [\log q_\phi(x_i) - \log p(x_i)]` with
    :math:`x_i = T_\phi(z_i)`. It costs one pass; at the optimum its variance is that of the score, not zero.
    """
    x, log_q = flow().rsample_and_log_prob((num_particles,))
    log_weights = log_joint(x) - log_q
    return -log_weights.mean(), log_weights.detach()


def path_gradient(flow: Flow, log_joint: LogDensity, num_particles: int) -> tuple[Tensor, Tensor]:
    r"""The total gradient without the score :math:`\nabla_\phi \log q_\phi(x)` at fixed x, whose mean is zero (sticking
    the landing, Roeder et al. 2017, arXiv:1703.09194). Its variance vanishes where q = p. It costs a pass through the
    inverse.
    """
    x = flow().rsample((num_particles,))
    with frozen(flow):
        log_q = flow().log_prob(x)
    log_weights = log_joint(x) - log_q
    return -log_weights.mean(), log_weights.detach()


ESTIMATORS: dict[str, Estimator] = {"total": total_gradient, "path": path_gradient}


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """What is computed inside has no gradient with respect to the module's parameters."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
