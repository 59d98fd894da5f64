"""Value and a Jacobian product of a dense contraction in one pass, with the gradient of both written out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.nets.lipschitz.activations import CURVED
from pyroflows.nets.products import product


def pushed(
    activation: str, weights: Sequence[Tensor], offsets: Sequence[Tensor], z: Tensor, v: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    r"""Return :math:`g(z)` above :math:`J v` for a contraction, ``(2 N, D)``, and what their gradient needs.

    The values of a layer and their tangents are products with the same matrix, and one product gives both.

    Args:
        activation: the name of the activation.
        weights: matrices.
        offsets: ``(out,)`` or ``(N, out)`` each.
        z: ``(N, D)``.
        v: ``(N, D)``.

    Returns:
        The outputs; the inputs of each layer, ``(2 N, in)``; the slopes :math:`\sigma'(a)` of the activations, and the
        slopes' tangents :math:`\sigma''(a)\, \dot a`, ``(N, out)``.
    """
    count = len(z)
    inputs, slopes, bends = [torch.cat([z, v])], [], []
    for weight, offset in zip(weights[:-1], offsets[:-1], strict=True):
        a, tangent = product(inputs[-1], weight.T).chunk(2)
        value, slope, curvature = CURVED[activation](a.add_(offset))
        inputs.append(torch.cat([value, slope * tangent]))
        slopes.append(slope)
        bends.append(curvature.mul_(tangent))
    outputs = product(inputs[-1], weights[-1].T)
    outputs[:count].add_(offsets[-1])
    return outputs, inputs, slopes, bends


def pulled(
    gradient: Tensor,
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor],
    slopes: Sequence[Tensor],
    bends: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    r"""Return the gradients by z, the weights, and the offsets of each row, from that by the outputs of :func:`pushed`.

    Let r and :math:`\dot r` be the gradients by :math:`\sigma(a)` and by its tangent :math:`\sigma'(a)\, \dot a`. Those
    by a and by :math:`\dot a` are

    .. math:: \sigma'(a)\, r + \sigma''(a)\, \dot a\, \dot r, \qquad \sigma'(a)\, \dot r.
    """
    count = len(gradient) // 2
    by_weights = [product(gradient.T, inputs[-1])]
    by_offsets = [gradient[:count]]
    for weight, h, slope, bend in zip(weights[:0:-1], inputs[-2::-1], slopes[::-1], bends[::-1], strict=True):
        after, after_tangent = product(gradient, weight).chunk(2)
        gradient = torch.cat([torch.addcmul(slope * after, bend, after_tangent), slope * after_tangent])
        by_weights.append(product(gradient.T, h))
        by_offsets.append(gradient[:count])
    return product(by_offsets[-1], weights[0]), by_weights[::-1], by_offsets[::-1]
