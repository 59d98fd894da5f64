"""Estimate the KL divergence of two affine autoregressive flows, whose conditionals are integrated in closed form."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from pyroflows.flows import Flow, FlowDistribution
from pyroflows.transforms import TriangularTransform
from pyroflows.transforms.triangular.chain import flattened, forward_and_log_slopes, inverse_and_log_slopes


def gaussian_kl(
    q: FlowDistribution, p: FlowDistribution, z: Tensor, regularization: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Estimate KL(q || p) from base draws, with the integrals over single dimensions in closed form.

    If a flow is affine and all its layers order the dimensions alike, each dimension given those before it is Gaussian.
    Then

    .. math:: \mathrm{KL}(q \,\|\, p) = E_{x \sim q} \sum_j \Big[ \log\frac{\sigma^p_j}{\sigma^q_j} +
        \frac{(\sigma^q_j)^2 + (\mu^q_j - \mu^p_j)^2}{2 (\sigma^p_j)^2} - \frac12 \Big],

    where all means and scales depend on :math:`x_{<j}` (Ping et al. 2019, arXiv:1807.07281, eq. 5): entropy and cross
    entropy of a dimension are integrated, not sampled. At q = p value and gradient vanish at every draw, and no score
    is needed. A regularization :math:`\lambda` adds :math:`\lambda \sum_j (\log\sigma^p_j - \log\sigma^q_j)^2` to the
    loss (their eq. 7).

    Args:
        q: the law of the student.
        p: the law of the teacher; :func:`has_closed_form` must hold for the two flows.
        z: base draws of the student.
        regularization: :math:`\lambda`, zero or positive.

    Shapes: z is ``(S, *event_shape)``.

    Returns:
        The draws x ``(S, *event_shape)`` of q, the loss, a scalar in nats whose gradient trains the student, and minus
        the estimates of single draws ``(S,)``, without gradients and regularization.

    Example:
        >>> q = pf.flows.IAF(2, num_layers=1)
        >>> _, kl, _ = gaussian_kl(q(), q(), torch.randn(10, 2))
        >>> kl.abs().item() < 1e-6
        True
    """
    layers_of_q, layers_of_p = flattened(q.transform), flattened(p.transform)
    x, log_slope = forward_and_log_slopes(layers_of_q, z, q.transform.layer_context(q.context))
    z_p, log_slope_p = inverse_and_log_slopes(layers_of_p, x, p.transform.layer_context(p.context))
    loc_q, scale_q = _loc_and_scale(q.base)
    loc_p, scale_p = _loc_and_scale(p.base)
    log_ratio = log_slope + log_slope_p + torch.log(scale_q / scale_p)  # log(scale of q / scale of p)
    ratio = torch.exp(log_ratio)
    # This is the distance of the two means in units of the scale of p. From the mean of p, x is (z_p - loc_p) / scale_p
    # such units away; from the mean of q it is (z - loc_q) / scale_q units of the scale of q, converted by the ratio.
    shift = (z_p - loc_p) / scale_p - ratio * (z - loc_q) / scale_q
    kl = ((ratio**2 + shift**2 - 1) / 2 - log_ratio).flatten(1).sum(-1)
    penalty = regularization * (log_ratio**2).flatten(1).sum(-1)
    return x, (kl + penalty).mean(), -kl.detach()


def has_closed_form(student: Flow, teacher: Any) -> bool:
    """Tell whether :func:`gaussian_kl` holds for these two.

    Args:
        student: the flow to train.
        teacher: a flow, or any other law, for which it does not hold.
    """
    if not isinstance(teacher, Flow):
        return False
    layers = [*flattened(student.transform), *flattened(teacher.transform)]
    if not all(isinstance(layer, TriangularTransform) and layer.is_affine for layer in layers):
        return False
    orders = {layer.triangular_order for layer in layers} - {()}
    return len(orders) < 2 and all(_is_normal(flow.base()) for flow in (student, teacher))


def _is_normal(base: Any) -> bool:
    return isinstance(base, Independent) and isinstance(base.base_dist, Normal)


def _loc_and_scale(base: Any) -> tuple[Tensor, Tensor]:
    return base.base_dist.loc, base.base_dist.scale
