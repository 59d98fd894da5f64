"""The KL divergence of two affine autoregressive flows, with all but the conditioning in closed form."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from pyroflows.flows import Flow, FlowDistribution
from pyroflows.transforms import Compose, FlowTransform, TriangularTransform


def gaussian_kl(
    q: FlowDistribution, p: FlowDistribution, z: Tensor, regularization: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Draws x of q, a loss that is an estimate of KL(q || p), and minus that estimate draw by draw.

    Where a flow is affine and all its layers see the dimensions in one order, each dimension given those before it is
    Gaussian. Then

    .. math:: \mathrm{KL}(q \,\|\, p) = E_{x \sim q} \sum_j \Big[ \log\frac{\sigma^p_j}{\sigma^q_j} +
        \frac{(\sigma^q_j)^2 + (\mu^q_j - \mu^p_j)^2}{2 (\sigma^p_j)^2} - \frac12 \Big],

    where all means and scales depend on :math:`x_{<j}` (Ping et al. 2019, arXiv:1807.07281, eq. 5): entropy and cross
    entropy of a dimension are integrated, not sampled. At q = p value and gradient vanish at every draw, and no score
    is needed. With a regularization :math:`\lambda` the loss also has :math:`\lambda \sum_j (\log\sigma^p_j -
    \log\sigma^q_j)^2` (their eq. 7).

    Args:
        q: the student.
        p: the teacher.
        z: base draws ``(S, *event_shape)`` of the student.
        regularization: :math:`\lambda`.
    """
    x, log_slope = _through("_forward_and_log_slopes", _layers(q.transform), z, q.context)
    z_p, log_slope_p = _through("_inverse_and_log_slopes", _layers(p.transform)[::-1], x, p.context)
    loc_q, scale_q = _loc_and_scale(q.base)
    loc_p, scale_p = _loc_and_scale(p.base)
    log_ratio = log_slope + log_slope_p + torch.log(scale_q / scale_p)  # of the scale of q to that of p
    ratio = torch.exp(log_ratio)
    # The distance of the means in units of the scale of p: x has u_p there, and u_q in units of the scale of q.
    shift = (z_p - loc_p) / scale_p - ratio * (z - loc_q) / scale_q
    kl = ((ratio**2 + shift**2 - 1) / 2 - log_ratio).flatten(1).sum(-1)
    penalty = regularization * (log_ratio**2).flatten(1).sum(-1)
    return x, (kl + penalty).mean(), -kl.detach()


def has_closed_form(student: Flow, teacher: Any) -> bool:
    """Whether :func:`gaussian_kl` holds for these two."""
    if not isinstance(teacher, Flow):
        return False
    layers = [*_layers(student.transform), *_layers(teacher.transform)]
    if not all(isinstance(layer, TriangularTransform) and layer.is_affine for layer in layers):
        return False
    orders = {layer.triangular_order for layer in layers} - {()}
    return len(orders) < 2 and all(_is_normal(flow.base()) for flow in (student, teacher))


def _is_normal(base: Any) -> bool:
    return isinstance(base, Independent) and isinstance(base.base_dist, Normal)


def _layers(transform: FlowTransform) -> list[Any]:
    """The layers of which a composition is made, itself made of compositions or not."""
    if not isinstance(transform, Compose):
        return [transform]
    return [layer for part in transform.layers for layer in _layers(part)]


def _through(method: str, layers: list[Any], value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """A value taken through layers, and the logarithm of the diagonal of the product of their Jacobians.

    The diagonal of a product of matrices that are triangular in one order is the product of the diagonals.
    """
    total: Any = 0.0
    for layer in layers:
        value, log_slopes = getattr(layer, method)(value, context if layer.context_dim else None)
        total = total + log_slopes
    return value, total


def _loc_and_scale(base: Any) -> tuple[Tensor, Tensor]:
    return base.base_dist.loc, base.base_dist.scale
