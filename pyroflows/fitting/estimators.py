r"""Estimate gradients of the reverse Kullback-Leibler divergence.

Each estimator maps base draws z, ``(S, *base_shape)``, to draws :math:`x_i = T_\phi(z_i)` of the flow q. It returns a
loss, whose gradient trains the flow, and the log weights :math:`\log w_i = \log p(x_i, y) - \log q_\phi(x_i)`, ``(S,)``
in nats and without gradients, whose mean estimates the ELBO. Parameters of the model receive the gradient of minus the
ELBO, or with "iwae" and "dreg" that of minus the importance-weighted bound.

Below, :math:`s_i = \nabla_x \log q_\phi(x_i)` is the score, see :meth:`FlowDistribution.transport_and_score`. What it
costs in addition to "total" depends on the layers: for couplings about one backward pass through the conditioner, for
autoregressive layers the same arithmetic dimension by dimension.

A draw leaves the estimate if its log weight, or its gradient, is not finite. Let the density p be zero outside of a set
A, as behind a hard constraint. The loss is then that of the flow cut to A, :math:`q_A = q / q(A)`, whose ELBO is the
mean log weight of the draws in A plus :math:`\log q(A)`. But the gradients at draws in A do not show the mass that a
flow loses over the edge: "path" alone would vanish wherever q has the shape of p on A, however little of q lies there.
So "path" and "dreg" add the gradient of :math:`\log q(A)`, :math:`E_{q_A}[\nabla_\phi \log q_\phi(x)]`, times a price:
a draw outside counts as one nat worse than the worst draw in A. "vargrad" gives it a log weight of that size. Where all
draws are in A, nothing is added. "total" and "iwae" have no score with which to do this, and let a flow drift out of A:
use one of the other three for a model with hard constraints.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyroflows.flows import FlowDistribution

# By how many nats a draw at which the density is zero counts as worse than the worst of the others.
PRICE = 1.0

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
    x, log_q = _FiniteRows.apply(*q.transport(z))
    log_weights = log_joint(x) - log_q
    return -elbo(log_weights), log_weights.detach()


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
    seen_by_model = x.view_as(x)
    log_p = log_joint(seen_by_model)
    log_weights = (log_p - log_q).detach()
    is_good = log_weights.isfinite()
    along_path = _inner(score, x)
    seen_by_model.register_hook(lambda gradient: _finite_or(gradient, -score, is_good / is_good.sum()))
    surrogate = _mean(along_path - log_p, is_good) - _priced_share(log_weights, log_q - along_path)
    return _with_gradient_of(surrogate, -elbo(log_weights)), log_weights


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
    x, log_q = _FiniteRows.apply(*q.transport(z))
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
    is_good = log_weights.isfinite()
    weights = torch.softmax(log_weights.where(is_good, -torch.inf), 0)
    along_path = _inner(score, x)
    # Parameters of the model need the weights themselves; the hook squares them in the gradient that goes on to x.
    seen_by_model.register_hook(lambda gradient: _finite_or(_rows(weights, x) * gradient, -score, weights**2))
    surrogate = (weights**2 * along_path - weights * log_p).where(is_good, 0.0).sum()
    surrogate = surrogate - _priced_share(log_weights, log_q - along_path)
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
    is_good = log_weights.isfinite()
    # With the draws held fixed, log q changes by its total change less the change along the draws.
    log_q_at_fixed_x = log_q - _inner(score, x)
    surrogate = -_elbo_at_fixed_x(log_weights, log_q_at_fixed_x) - _mean(log_p, is_good)
    return _with_gradient_of(surrogate, log_weight_variance(log_weights) / 2), log_weights


ESTIMATORS: dict[str, Estimator] = {
    "total": total_gradient,
    "path": path_gradient,
    "iwae": iwae_gradient,
    "dreg": dreg_gradient,
    "vargrad": log_variance_gradient,
}


def elbo(log_weights: Tensor) -> Tensor:
    r"""Estimate the ELBO of a flow from log weights ``(S,)``.

    Where some of them are not finite, it is that of the flow cut to the set A of the others,
    :math:`E_{q_A}[\log w] + \log q(A)`.

    Example:
        >>> elbo(torch.tensor([1.0, 2.0])), elbo(torch.tensor([1.0, 2.0, -torch.inf, torch.nan]))
        (tensor(1.5000), tensor(0.8069))
    """
    is_good = log_weights.isfinite()
    return _mean(log_weights, is_good) + (is_good.sum() / len(is_good)).log()


def log_weight_variance(log_weights: Tensor) -> Tensor:
    """Estimate the variance of log weights ``(S,)``, of those that are finite; NaN if there are fewer than two."""
    is_good = log_weights.isfinite()
    deviations = (log_weights - _mean(log_weights, is_good)).where(is_good, 0.0)
    return deviations.square().sum() / (is_good.sum() - 1)


class _FiniteRows(torch.autograd.Function):
    """The identity for draws and their log-densities, which passes no gradient to a draw that has not a finite one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), log_q.view_as(log_q)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        of_x, of_log_q = gradients
        is_good = of_x.flatten(1).isfinite().all(-1) & of_log_q.isfinite()
        return of_x.where(_rows(is_good, of_x), 0.0), of_log_q.where(is_good, 0.0)


def filled(log_weights: Tensor) -> Tensor:
    """Give log weights ``(..., S)`` that are not finite the value of the smallest one that is, less a price.

    Where none is finite, all become -inf.

    Example:
        >>> filled(torch.tensor([1.0, 2.0, -torch.inf, torch.nan]))
        tensor([1., 2., 0., 0.])
    """
    is_good = log_weights.isfinite()
    least = log_weights.where(is_good, torch.inf).amin(-1, keepdim=True)
    return log_weights.where(is_good, (least - PRICE).where(least.isfinite(), -torch.inf))


def _elbo_at_fixed_x(log_weights: Tensor, log_q_at_fixed_x: Tensor) -> Tensor:
    """Return the covariance of the filled log weights with log q at fixed draws, whose gradient is that of the ELBO."""
    values = filled(log_weights)
    return ((values - values.mean()) * log_q_at_fixed_x).sum() / max(1, len(values) - 1)


def _priced_share(log_weights: Tensor, log_q_at_fixed_x: Tensor) -> Tensor:
    r"""Return a number with the gradient of :math:`\log q(A)`, times the price of a draw outside of A.

    The gradient is the mean over A of that of log q at fixed draws, less its mean over all draws, which is zero.
    """
    is_good = log_weights.isfinite()
    price = _mean(log_weights, is_good) - filled(log_weights).min()
    return (price * (_mean(log_q_at_fixed_x, is_good) - log_q_at_fixed_x.mean())).where(~is_good.all(), 0.0)


def _finite_or(gradient: Tensor, other: Tensor, weights: Tensor) -> Tensor:
    """Return gradients of draws; where one of them is not finite, weights times another one."""
    is_finite = gradient.flatten(1).isfinite().all(-1)
    return gradient.where(_rows(is_finite, gradient), _rows(weights, other) * other)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """Give values of draws ``(S,)`` the shape ``(S, 1, ...)``, with as many axes as a tensor of draws."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _mean(values: Tensor, is_good: Tensor) -> Tensor:
    """Return the mean of good values; NaN if there are none, so that the guard leaves out the step."""
    return values.where(is_good, 0.0).sum() / is_good.sum()


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products of events, ``(S,)``."""
    return (a * b).flatten(1).sum(-1)


def _with_gradient_of(surrogate: Tensor, value: Tensor) -> Tensor:
    """Return the value, with the gradient of the surrogate."""
    return value + (surrogate - surrogate.detach())


def _log_mean_exp(log_weights: Tensor) -> Tensor:
    """Return the logarithm of the mean weight, where a log weight that is not finite stands for the weight zero."""
    finite = log_weights.where(log_weights.isfinite(), -torch.inf)
    return torch.logsumexp(finite, 0) - math.log(len(log_weights))
