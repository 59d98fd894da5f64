"""Velocity and divergence of a dense network with two hidden layers as one function, whose gradient is written out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows.compiling.eager import is_transformed
from pyroflows.nets.gradients import is_batch, recorded_gradients
from pyroflows.nets.products import affine, product


def velocity_and_divergence(
    z: Tensor, offset: Tensor, weights: Sequence[Tensor], traced: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return velocity and divergence of a perceptron with two hidden layers and SiLU activations,

    .. math:: v = W_3 h_2 + o_3, \qquad \operatorname{tr} \frac{\partial v}{\partial z} = s_2^\top M s_1, \qquad
        h_k = \sigma(a_k), \quad s_k = \sigma'(a_k), \quad a_k = W_k h_{k-1} + o_k, \quad h_0 = z

    Args:
        z: places ``(*batch, D)``.
        offset: the :math:`o_1, o_2, o_3` side by side, ``(H1 + H2 + D,)`` or ``(*batch, H1 + H2 + D)``.
        weights: the :math:`W_k`, ``(H1, D)``, ``(H2, H1)`` and ``(D, H2)``.
        traced: :math:`M = W_2 \odot (W_1 W_3)^\top`, ``(H2, H1)``.
    """
    if offset.dim() > 1:
        batch_shape = torch.broadcast_shapes(z.shape[:-1], offset.shape[:-1])
        z, offset = (part.expand(*batch_shape, part.shape[-1]) for part in (z, offset))
        offset = offset.reshape(-1, offset.shape[-1])
    velocity, divergence = _WrittenOut.apply(z.reshape(-1, z.shape[-1]), offset, traced, *weights)
    return velocity.reshape(z.shape), divergence.reshape(z.shape[:-1])


def _recorded(z: Tensor, offset: Tensor, traced: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    o1, o2, o3 = _parts(offset, weights)
    a1 = z @ weights[0].T + o1
    p1 = torch.sigmoid(a1)
    h1 = a1 * p1
    a2 = h1 @ weights[1].T + o2
    p2 = torch.sigmoid(a2)
    h2 = a2 * p2
    s1, s2 = p1 + h1 * (1 - p1), p2 + h2 * (1 - p2)
    return h2 @ weights[2].T + o3, (s2 * (s1 @ traced.T)).sum(-1)


class _WrittenOut(torch.autograd.Function):
    r"""From the gradients g by the velocity and :math:`\delta` by the divergence follow, with :math:`q = M s_1`,

    .. math::
        g_2 = s_2 \odot W_3^\top g + \delta\, \sigma''(a_2) \odot q, \qquad
        g_1 = s_1 \odot W_2^\top g_2 + \sigma''(a_1) \odot M^\top (\delta\, s_2)

    by the offsets, and those of the weights are products of these with the inputs of the layers, that of M
    is :math:`\sum_n \delta s_2 s_1^\top`. Second derivatives are those of the recorded operations.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, offset: Tensor, traced: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        o1, o2, o3 = _parts(offset, weights)
        z = z.contiguous()  # it usually is a part of a state, of which products are slow
        h1, s1, bend1 = _activated(affine(z, weights[0], o1))
        h2, s2, bend2 = _activated(affine(h1, weights[1], o2))
        q = product(s1, traced.T)
        divergence = torch.linalg.vecdot(s2, q)
        ctx.save_for_backward(z, offset, traced, *weights, h1, s1, bend1, h2, s2, bend2.mul_(q))
        return affine(h2, weights[2], o3), divergence

    @staticmethod
    def backward(ctx: Any, by_velocity: Tensor, by_divergence: Tensor) -> tuple[Tensor | None, ...]:
        z, offset, traced, w1, w2, w3, h1, s1, bend1, h2, s2, bent_q = ctx.saved_tensors
        is_batched = is_batch(by_velocity) or is_batch(by_divergence) or is_transformed()
        if torch.is_grad_enabled() or is_batched:  # the first by create_graph=True
            arguments = (z, offset, traced, w1, w2, w3)
            return tuple(recorded_gradients(_recorded, arguments, (by_velocity, by_divergence)))
        by_velocity, by_divergence = by_velocity.contiguous(), by_divergence.unsqueeze(-1)
        g2 = product(by_velocity, w3).mul_(s2).addcmul_(bent_q, by_divergence)
        by_q = s2 * by_divergence
        g1 = product(g2, w2).mul_(s1).addcmul_(bend1, product(by_q, traced))
        parts = (g1, g2, by_velocity)
        by_offset = torch.cat([g.sum(0) for g in parts]) if offset.dim() == 1 else torch.cat(parts, 1)
        by_weights = (product(g1.T, z), product(g2.T, h1), product(by_velocity.T, h2))
        return product(g1, w1), by_offset, product(by_q.T, s1), *by_weights


def _parts(offset: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    return offset.split([len(weight) for weight in weights], -1)


def _activated(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return :math:`\sigma, \sigma', \sigma''` at a."""
    p = torch.sigmoid(a)
    h = a * p
    variance = torch.addcmul(p, p, p, value=-1)
    return h, torch.addcmul(p, a, variance), torch.sub(a, h, alpha=2).add_(2).mul_(variance)
