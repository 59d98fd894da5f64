r"""Estimate gradients of the reverse Kullback-Leibler divergence.

Each estimator maps base draws z, ``(S, *base_shape)``, to draws :math:`x_i = T_\phi(z_i)` of the flow q. It returns a
loss, whose gradient trains the flow, and the log weights :math:`\log w_i = \log p(x_i, y) - \log q_\phi(x_i)`, ``(S,)``
in nats and without gradients, whose mean estimates the ELBO. Parameters of the model receive the gradient of minus the
ELBO, or with "iwae" and "dreg" that of minus the importance-weighted bound.

Below, :math:`s_i = \nabla_x \log q_\phi(x_i)` is the score, see :meth:`FlowDistribution.transport_and_score`. What it
costs in addition to "total" depends on the layers: for couplings about one backward pass through the conditioner, for
autoregressive layers the same arithmetic dimension by dimension.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyroflows.flows import FlowDistribution

LogDensity = Callable[[Tensor], Tensor]
Estimator = Callable[[FlowDistribution, LogDensity, Tensor], tuple[Tensor, Tensor]]


def total_gradient(q: FlowDistribution, log_joint: LogDensity, z: Tensor) -> tuple[Tensor, Tensor]:
    r"""Estimate the reparametrised gradient, :math:`-\nabla_\phi \frac1S \sum_i \log w_i`.

    It is the cheapest estimator, and suits a flow that is far from its target. At the optimum its variance is not zero
    but that of :math:`\nabla_\phi \log q_\phi(x)`. The loss is :math:`-\mathrm{ELBO}`.

    Args:
        q: the law of the flow.
        log_joint: a function that maps draws ``(S, *event_shape)`` to :math:`\log p(x, y)`, ``(S,)``.
        z: base draws ``(S, *base_shape)``.

    Example:
        >>> loss, log_weights = total_gradient(pf.flows.Planar(2)(), lambda x: -(x**2).sum(-1), torch.randn(5, 2))
        >>> torch.equal(loss, -log_weights.mean()), log_weights.shape
        (True, torch.Size([5]))
    """
    x, log_q = q.transport(z)
    log_weights = log_joint(x) - log_q
    return -log_weights.mean(), log_weights.detach()


def path_gradient(q: FlowDistribution, log_joint: LogDensity, z: Tensor) -> tuple[Tensor, Tensor]:
    r"""Estimate the total gradient without :math:`\nabla_\phi \log q_\phi(x)` at fixed x, whose mean is zero (sticking
    the landing, Roeder et al. 2017, arXiv:1703.09194), that is

    .. math:: \frac1S \sum_i \Big(\frac{\partial x_i}{\partial \phi}\Big)^\top (s_i - \nabla_x \log p(x_i, y)).

    It suits a flow that can come close to its target, since its variance vanishes where q = p. It needs the score. The
    loss is :math:`-\mathrm{ELBO}`.

    Args:
        q: the law of the flow.
        log_joint: a function that maps draws ``(S, *event_shape)`` to :math:`\log p(x, y)`, ``(S,)``.
        z: base draws ``(S, *base_shape)``.
    """
    x, log_q, score = q.transport_and_score(z)
    log_p = log_joint(x)
    log_weights = (log_p - log_q).detach()
    return _with_gradient_of((_inner(score, x) - log_p).mean(), -log_weights.mean()), log_weights


def iwae_gradient(q: FlowDistribution, log_joint: LogDensity, z: Tensor) -> tuple[Tensor, Tensor]:
    r"""Estimate the total gradient of the importance-weighted bound, :math:`-\nabla_\phi \log \frac1S \sum_i w_i`
    (Burda et al. 2016, arXiv:1509.00519).

    It suits a proposal whose tails should cover the target, and learning the parameters of a model. It costs as much as
    "total", and equals it with one draw. The more draws, the smaller the gradient of the flow is against its noise
    (Rainforth et al. 2018, arXiv:1802.04537), which "dreg" mends. The loss is minus the bound.

    Args:
        q: the law of the flow.
        log_joint: a function that maps draws ``(S, *event_shape)`` to :math:`\log p(x, y)`, ``(S,)``.
        z: base draws ``(S, *base_shape)``.
    """
    x, log_q = q.transport(z)
    log_weights = log_joint(x) - log_q
    return -_log_mean_exp(log_weights), log_weights.detach()


def dreg_gradient(q: FlowDistribution, log_joint: LogDensity, z: Tensor) -> tuple[Tensor, Tensor]:
    r"""Estimate the doubly reparametrised gradient of the importance-weighted bound (Tucker et al. 2019,
    arXiv:1810.04152, eq. 8),

    .. math:: \sum_i \tilde w_i^2 \Big(\frac{\partial x_i}{\partial \phi}\Big)^\top (s_i - \nabla_x \log p(x_i, y)),
        \qquad \tilde w_i = w_i / \sum_k w_k.

    It has the mean of "iwae", and a variance that vanishes where q = p. It needs the score, and equals "path" with one
    draw. The loss is minus the bound.

    Args:
        q: the law of the flow.
        log_joint: a function that maps draws ``(S, *event_shape)`` to :math:`\log p(x, y)`, ``(S,)``.
        z: base draws ``(S, *base_shape)``.
    """
    x, log_q, score = q.transport_and_score(z)
    seen_by_model = x.view_as(x)
    log_p = log_joint(seen_by_model)
    log_weights = (log_p - log_q).detach()
    weights = torch.softmax(log_weights, 0)
    # Parameters of the model need the weights themselves; the hook squares them in the gradient that goes on to x.
    seen_by_model.register_hook(lambda gradient: weights.reshape(-1, *[1] * (x.dim() - 1)) * gradient)
    surrogate = (weights**2 * _inner(score, x)).sum() - (weights * log_p).sum()
    return _with_gradient_of(surrogate, -_log_mean_exp(log_weights)), log_weights


def log_variance_gradient(q: FlowDistribution, log_joint: LogDensity, z: Tensor) -> tuple[Tensor, Tensor]:
    r"""Estimate the gradient of half the variance of the log weights with the draws held fixed (VarGrad, Richter et al.
    2020, arXiv:2010.10436),

    .. math:: -\frac1{S-1} \sum_i (\log w_i - \overline{\log w}) \, \nabla_\phi \log q_\phi(x) \big|_{x = x_i}.

    Its mean is the gradient of :math:`-\mathrm{ELBO}`, and it vanishes where q = p. It needs no derivative of the log
    joint, and suits a log joint whose derivative is expensive or does not exist; but :class:`pyroflows.FlowVI` needs
    the derivative to find its starts, unless its guide is already built. The estimator needs the score, but no backward
    pass through the model, and has more variance than "path" in high dimension. The loss is half the variance.

    Args:
        q: the law of the flow.
        log_joint: a function that maps draws ``(S, *event_shape)`` to :math:`\log p(x, y)`, ``(S,)``.
        z: base draws ``(S, *base_shape)``, S at least 2.
    """
    x, log_q, score = q.transport_and_score(z)
    log_p = log_joint(x.detach())
    log_weights = (log_p - log_q).detach()
    # With the draws held fixed, log q changes by its total change less the change along the draws.
    log_q_at_fixed_x = log_q - _inner(score, x)
    centered = log_weights - log_weights.mean()
    surrogate = -(centered * log_q_at_fixed_x).sum() / (len(z) - 1) - log_p.mean()
    return _with_gradient_of(surrogate, log_weights.var() / 2), log_weights


ESTIMATORS: dict[str, Estimator] = {
    "total": total_gradient,
    "path": path_gradient,
    "iwae": iwae_gradient,
    "dreg": dreg_gradient,
    "vargrad": log_variance_gradient,
}


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products of events, ``(S,)``."""
    return (a * b).flatten(1).sum(-1)


def _with_gradient_of(surrogate: Tensor, value: Tensor) -> Tensor:
    """Return the value, with the gradient of the surrogate."""
    return value + (surrogate - surrogate.detach())


def _log_mean_exp(log_weights: Tensor) -> Tensor:
    return torch.logsumexp(log_weights, 0) - math.log(len(log_weights))
