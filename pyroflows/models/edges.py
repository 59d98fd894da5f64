r"""Log-densities near the edges of a support, where a value in floating point cannot be told from the edge.

A Beta law of concentrations 0.1 has a twelfth of its mass within :math:`10^{-8}` of 1, where float32 has no number but
1. Its density there follows from the logarithms of the distances from the edges, which are known from the
unconstrained value:

- of an interval from a to b, :math:`\log\frac{x - a}{b - a}` and :math:`\log\frac{b - x}{b - a}`;
- of a half line from a, :math:`\log|x - a|`;
- of a simplex, the logarithms of the entries;
- of Cholesky factors of correlation matrices, a matrix with the logarithms of the factor's diagonal on its diagonal.
"""

from collections.abc import Callable
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    ExpTransform,
    Independent,
    SigmoidTransform,
    TransformedDistribution,
)

from pyroflows.models.supports import is_real, support_of

Logs = tuple[Tensor, ...]

_MAPS = (AffineTransform, ExpTransform, SigmoidTransform)


def has_log_density(fn: Any) -> bool:
    """Whether :func:`log_density` knows the family of a distribution.

    Example:
        >>> has_log_density(dist.Beta(0.1, 0.1)), has_log_density(dist.Normal(0.0, 1.0))
        (True, False)
    """
    if isinstance(fn, Independent | ExpandedDistribution | MaskedDistribution):
        return has_log_density(fn.base_dist)
    if _density_of(fn) is not None:
        return True
    if not _is_transformed(fn):
        return False
    last, rest = _last_transform(fn)
    return has_log_density(rest) if isinstance(last, AffineTransform) else is_real(support_of(rest))


def log_density(fn: Any, logs: Logs) -> Tensor:
    """The log-density of a value, as its distribution's ``log_prob`` without rounding of the value.

    Args:
        fn: a distribution that :func:`has_log_density` accepts.
        logs: the logarithms of the distances of the value from the edges, of its shape.

    Example:
        >>> x = torch.tensor(0.25)
        >>> fn = dist.Beta(0.1, 0.1)
        >>> log_density(fn, (x.log(), (1 - x).log())) - fn.log_prob(x)
        tensor(0.)
    """
    if isinstance(fn, Independent):
        return sum_rightmost(log_density(fn.base_dist, logs), fn.reinterpreted_batch_ndims)
    if isinstance(fn, ExpandedDistribution):
        return log_density(fn.base_dist, logs).expand(_batch_shape(fn, logs))
    if isinstance(fn, MaskedDistribution):
        return _masked(fn, logs)
    density = _density_of(fn)
    return _after_transform(fn, logs) if density is None else density(fn, *logs)


def _density_of(fn: Any) -> Callable[..., Tensor] | None:
    return next((density for family, density in _DENSITIES.items() if isinstance(fn, family)), None)


def _batch_shape(fn: Any, logs: Logs) -> torch.Size:
    shape = logs[0].shape[: logs[0].dim() - fn.event_dim]
    return torch.broadcast_shapes(shape, fn.batch_shape)


def _masked(fn: Any, logs: Logs) -> Tensor:
    if fn._mask is False:
        return logs[0].new_zeros(()).expand(_batch_shape(fn, logs))
    value = log_density(fn.base_dist, logs)
    return value if fn._mask is True else torch.where(fn._mask, value, 0.0)


def _is_transformed(fn: Any) -> bool:
    """Whether a distribution is another one behind a map of numbers onto a half line or an interval."""
    if type(fn).log_prob is not TransformedDistribution.log_prob or not fn.transforms:
        return False
    return isinstance(fn.transforms[-1], _MAPS) and not fn.transforms[-1].domain.event_dim


def _last_transform(fn: Any) -> tuple[Any, Any]:
    """The last transform of a distribution, and the distribution before it."""
    *before, last = fn.transforms
    return last, dist.TransformedDistribution(fn.base_dist, before) if before else fn.base_dist


def _after_transform(fn: Any, logs: Logs) -> Tensor:
    last, rest = _last_transform(fn)
    if isinstance(last, ExpTransform):
        u, ladj = logs[0], logs[0]
        value = rest.log_prob(u)
    elif isinstance(last, SigmoidTransform):
        u, ladj = logs[0] - logs[1], logs[0] + logs[1]
        value = rest.log_prob(u)
    else:
        scale = torch.as_tensor(last.scale).to(logs[0])
        ladj = scale.abs().log().expand(logs[0].shape)
        value = log_density(rest, _before_scaling(logs, scale))
    return value - sum_rightmost(ladj, fn.event_dim)


def _before_scaling(logs: Logs, scale: Tensor) -> Logs:
    if len(logs) == 1:
        return (logs[0] - scale.abs().log(),)
    lower, upper = logs
    return torch.where(scale > 0, lower, upper), torch.where(scale > 0, upper, lower)


def _uniform(fn: Any, log_lower: Tensor, log_upper: Tensor) -> Tensor:
    return -(fn.high - fn.low).log() + torch.zeros_like(log_lower)


def _beta(fn: Any, log_x: Tensor, log_rest: Tensor) -> Tensor:
    a, b = fn.concentration1, fn.concentration0
    return (a - 1) * log_x + (b - 1) * log_rest + (a + b).lgamma() - a.lgamma() - b.lgamma()


def _kumaraswamy(fn: Any, log_x: Tensor, log_rest: Tensor) -> Tensor:
    a, b = fn.concentration1, fn.concentration0
    # Close to x = 1, where log x rounds to 0, 1 - x^a is a (1 - x).
    log_power = (a * log_x).clamp(max=-torch.finfo(log_x.dtype).tiny)
    is_near = log_power > -torch.finfo(log_x.dtype).eps
    log_rest_of_power = torch.where(is_near, a.log() + log_rest, (-log_power.expm1()).log())
    return a.log() + b.log() + (a - 1) * log_x + (b - 1) * log_rest_of_power


def _dirichlet(fn: Any, log_x: Tensor) -> Tensor:
    a = fn.concentration
    return ((a - 1) * log_x).sum(-1) + a.sum(-1).lgamma() - a.lgamma().sum(-1)


def _gamma(fn: Any, log_x: Tensor) -> Tensor:
    a, b = fn.concentration, fn.rate
    return a * b.log() - a.lgamma() + (a - 1) * log_x - b * log_x.exp()


def _inverse_gamma(fn: Any, log_x: Tensor) -> Tensor:
    a, b = fn.concentration, fn.rate
    return a * b.log() - a.lgamma() - (a + 1) * log_x - b * (-log_x).exp()


def _weibull(fn: Any, log_x: Tensor) -> Tensor:
    k, log_ratio = fn.concentration, log_x - fn.scale.log()
    return k.log() - fn.scale.log() + (k - 1) * log_ratio - (k * log_ratio).exp()


def _lkj_cholesky(fn: Any, log_diagonal: Tensor) -> Tensor:
    # The exponents of the diagonal are those of the density; at the identity only its constant is left.
    identity = torch.eye(fn.dim).to(log_diagonal)
    exponents = 2 * (fn.concentration[..., None] - 1) + fn.dim - torch.arange(1, fn.dim + 1).to(log_diagonal)
    log_x = log_diagonal.diagonal(dim1=-2, dim2=-1)
    return fn.log_prob(identity.expand(log_diagonal.shape)) + (exponents * log_x)[..., 1:].sum(-1)


_DENSITIES: dict[type, Callable[..., Tensor]] = {
    torch.distributions.Uniform: _uniform,
    torch.distributions.Beta: _beta,
    torch.distributions.Kumaraswamy: _kumaraswamy,
    torch.distributions.Dirichlet: _dirichlet,
    torch.distributions.Gamma: _gamma,
    torch.distributions.InverseGamma: _inverse_gamma,
    dist.InverseGamma: _inverse_gamma,
    torch.distributions.Weibull: _weibull,
    torch.distributions.LKJCholesky: _lkj_cholesky,
}
