r"""Gradient estimators of the reverse Kullback-Leibler divergence.

Each maps base draws z, ``(S, *base_shape)``, to draws :math:`x_i = T_\phi(z_i)` of the flow q and returns a loss, whose
gradient trains the flow, and the log weights :math:`\log w_i = \log p(x_i, y) - \log q_\phi(x_i)`, ``(S,)`` without
gradients, whose mean is the ELBO. Parameters of the model have the gradient of the ELBO, or for "iwae" and "dreg" of
their bound.

Below :math:`s = \nabla_x \log q_\phi(x)` is the score, see :meth:`FlowDistribution.transport_and_score`; what it costs
beside "total" depends on the layers: for couplings about a pass back through the conditioner, for autoregressive ones
the same arithmetic dimension by dimension.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyroflows.flows import FlowDistribution

LogDensity = Callable[[Tensor], Tensor]
Estimator = Callable[[FlowDistribution, LogDensity, Tensor], tuple[Tensor, Tensor]]


def total_gradient(q: FlowDistribution, log_joint: LogDensity, z: Tensor) -> tuple[Tensor, Tensor]:
    r"""The reparametrised gradient, :math:`-\nabla_\phi \frac1S \sum_i \log w_i`.

    The cheapest, and the one for a flow that is far from its target; at the optimum its variance is that of
    :math:`\nabla_\phi \log q_\phi(x)`, not zero. The loss is :math:`-\mathrm{ELBO}`.
    """
    x, log_q = q.transport(z)
    log_weights = log_joint(x) - log_q
    return -log_weights.mean(), log_weights.detach()


def path_gradient(q: FlowDistribution, log_joint: LogDensity, z: Tensor) -> tuple[Tensor, Tensor]:
    r"""The total gradient without :math:`\nabla_\phi \log q_\phi(x)` at fixed x, whose mean is zero (sticking the
    landing, Roeder et al. 2017, arXiv:1703.09194), that is

    .. math:: \frac1S \sum_i \Big(\frac{\partial x_i}{\partial \phi}\Big)^\top (s_i - \nabla_x \log p(x_i, y)).

    For a flow that can come close to its target: its variance vanishes where q = p. It costs the score. The loss is
    :math:`-\mathrm{ELBO}`.
    """
    x, log_q, score = q.transport_and_score(z)
    log_p = log_joint(x)
    log_weights = (log_p - log_q).detach()
    return _with_gradient_of((_inner(score, x) - log_p).mean(), -log_weights.mean()), log_weights


def iwae_gradient(q: FlowDistribution, log_joint: LogDensity, z: Tensor) -> tuple[Tensor, Tensor]:
    r"""The total gradient of the importance-weighted bound, :math:`-\nabla_\phi \log \frac1S \sum_i w_i` (Burda et al.
    2016, arXiv:1509.00519).

    For a proposal whose tails cover the target rather than the best ELBO, and for learning the parameters of a model.
    It costs what "total" does; its signal for the flow shrinks with S against its noise (Rainforth et al. 2018,
    arXiv:1802.04537), which "dreg" cures. With one draw it is "total". The loss is minus the bound.
    """
    x, log_q = q.transport(z)
    log_weights = log_joint(x) - log_q
    return -_log_mean_exp(log_weights), log_weights.detach()


def dreg_gradient(q: FlowDistribution, log_joint: LogDensity, z: Tensor) -> tuple[Tensor, Tensor]:
    r"""The doubly reparametrised gradient of the importance-weighted bound (Tucker et al. 2019, arXiv:1810.04152,
    eq. 8),

    .. math:: \sum_i \tilde w_i^2 \Big(\frac{\partial x_i}{\partial \phi}\Big)^\top (s_i - \nabla_x \log p(x_i, y)),
        \qquad \tilde w_i = w_i / \sum_k w_k.

    The mean of "iwae" with a variance that vanishes where q = p. It costs the score; with one draw it is "path". The
    loss is minus the bound.
    """
    x, log_q, score = q.transport_and_score(z)
    seen_by_model = x.view_as(x)
    log_p = log_joint(seen_by_model)
    log_weights = (log_p - log_q).detach()
    weights = torch.softmax(log_weights, 0)
    # Parameters of the model have the weights themselves, and what passes on to x their squares.
    seen_by_model.register_hook(lambda gradient: weights.reshape(-1, *[1] * (x.dim() - 1)) * gradient)
    surrogate = (weights**2 * _inner(score, x)).sum() - (weights * log_p).sum()
    return _with_gradient_of(surrogate, -_log_mean_exp(log_weights)), log_weights


def log_variance_gradient(q: FlowDistribution, log_joint: LogDensity, z: Tensor) -> tuple[Tensor, Tensor]:
    r"""The gradient of half the variance of the log weights with the draws held fixed (VarGrad, Richter et al. 2020,
    arXiv:2010.10436),

    .. math:: -\frac1{S-1} \sum_i (\log w_i - \overline{\log w}) \, \nabla_\phi \log q_\phi(x) \big|_{x = x_i}.

    Its mean is the gradient of :math:`-\mathrm{ELBO}`, and it vanishes where q = p. It needs no derivative of the log
    joint: for one that is expensive or has none (which the starts of :class:`pyroflows.FlowVI` need, if its guide is
    not made of the model). It costs the score, but no pass back through the model, and in high dimension has more
    variance than "path". At least two draws. The loss is half the variance.
    """
    x, log_q, score = q.transport_and_score(z)
    log_p = log_joint(x.detach())
    log_weights = (log_p - log_q).detach()
    # Along the draws log q changes by the score besides.
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
    """The inner products of events, ``(S,)``."""
    return (a * b).flatten(1).sum(-1)


def _with_gradient_of(surrogate: Tensor, value: Tensor) -> Tensor:
    """The value, with the gradient of the surrogate."""
    return value + (surrogate - surrogate.detach())


def _log_mean_exp(log_weights: Tensor) -> Tensor:
    return torch.logsumexp(log_weights, 0) - math.log(len(log_weights))
