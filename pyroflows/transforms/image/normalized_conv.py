"""A 1 x 1 convolution next to activation normalisation, as one map."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyroflows.compiling.eager import is_transformed
from pyroflows.nets.gradients import is_batch, recorded_gradients
from pyroflows.transforms.base import Pair
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.image.conv1x1 import Conv1x1
from pyroflows.transforms.linear.permutation import Permutation
from pyroflows.transforms.linear.positive_diagonal import MIN_SCALE, positive_diagonal
from pyroflows.transforms.normalization.act_norm import ActNorm
from pyroflows.transforms.univariate.layout import memory_order, restored


class NormalizedConv1x1(Compose):
    r"""A 1 x 1 convolution and activation normalisation, the latter at the data end, as in a step of Glow.

    .. math:: z = W (\operatorname{diag}(1 / \sigma)\, x - m), \qquad W = P L U

    It is the composition of the two layers, and computes it on processors as one product with a bias, instead of a
    product and a pass over all numbers.

    Args:
        convolution: the layer of W.

    Shapes: z and x are ``(..., C, H, W)``, a context is that of the convolution.

    Example:
        >>> t = NormalizedConv1x1(Conv1x1((3, 4, 2), order=[2, 0, 1]))
        >>> x = torch.randn(5, 3, 4, 2)
        >>> torch.allclose(t.inv(x), x[:, [2, 0, 1]], atol=1e-5), [type(layer).__name__ for layer in t.layers]
        (True, ['Conv1x1', 'ActNorm'])
    """

    def __init__(self, convolution: Conv1x1) -> None:
        super().__init__([convolution, ActNorm(convolution.event_shape)])

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        if not _is_fused(z, context):
            return super()._forward_and_ladj(z, context)
        convolution, norm = self.layers
        inverse, scale = convolution.inverse_matrix(None)
        loc, log_scale = norm.parameters_of.value.unbind()
        deviation = log_scale.exp()[:, None]
        columns, shape, axes = _columns(z)
        x = torch.addmm(deviation * loc[:, None], deviation * inverse, columns)
        ladj = (log_scale - scale.log()).sum() * shape[1:3].numel()
        return restored(x.view(shape), axes), ladj.expand(z.shape[:-3])

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        if not _is_fused(x, context):
            return super()._inverse_and_ladj(x, context)
        convolution, norm = self.layers
        lu = convolution.lu
        return _Normalized.apply(x, lu.matrix_of.value, norm.parameters_of.value, lu.permutation)


def _is_fused(images: Tensor, context: Tensor | None) -> bool:
    """Tell whether the two layers are computed as one.

    They are not where a context makes a matrix for each image, nor under the transforms of torch.func, which could not
    see into the written-out gradient.
    """
    return context is None and images.device.type == "cpu" and not is_transformed()


def _columns(images: Tensor) -> tuple[Tensor, torch.Size, list[int]]:
    """Return images as columns ``(C, places)``, and the shape and the order of axes that bring them back.

    Channels come first in memory, and the batch last if they did not, as convolutions want it.
    """
    axes = memory_order(images, images.dim())
    if axes[0] != images.dim() - 3:
        axes = [*range(images.dim() - 3, images.dim()), *range(images.dim() - 3)]
    ordered = images.permute(axes)
    return ordered.flatten(1), ordered.shape, axes


def _normalized(images: Tensor, raw: Tensor, parameters: Tensor, permutation: Permutation) -> tuple[Any, ...]:
    r"""Return :math:`z = V (c \odot x - u \odot m)`, its log-determinant :math:`H W \sum \log c`, and what the gradient
    needs besides.

    That is the order of axes, and a tuple of the columns of x, L, N, :math:`V = P L N`, u, :math:`1 / \sigma`,
    :math:`c = u / \sigma`, :math:`u \odot m` and m.

    Args:
        images: x, ``(..., C, H, W)``.
        raw: the matrix that holds L, N and what becomes u, see :class:`pyroflows.transforms.LU`.
        parameters: m and :math:`\log \sigma`, ``(2, C)``.
        permutation: P.
    """
    columns, shape, axes = _columns(images)
    loc, log_scale = parameters.unbind()
    scale = positive_diagonal(raw)
    lower, upper = raw.tril(-1).fill_diagonal_(1.0), raw.triu(1).fill_diagonal_(1.0)
    product = (lower @ upper).index_select(0, permutation.order)
    precision = torch.exp(-log_scale)
    ratio, shift = scale * precision, scale * loc
    z = torch.addmm((product @ shift)[:, None], product * ratio, columns, beta=-1)
    ladj = ratio.log().sum() * images.shape[-2:].numel()
    factors = columns, lower, upper, product, scale, precision, ratio, shift, loc
    return restored(z.view(shape), axes), ladj.expand(images.shape[:-3]), axes, factors


def _recorded(permutation: Permutation, images: Tensor, raw: Tensor, parameters: Tensor) -> Pair:
    """Return z and its log-determinant."""
    z, ladj, *_ = _normalized(images, raw, parameters, permutation)
    return z, ladj


class _Normalized(torch.autograd.Function):
    r"""The map of :func:`_normalized` with its gradient written out.

    Let G be the gradient by the columns of z, x those of x, and g the one by :math:`\sum \log c`. Then

    .. math::
        \nabla_x &= \operatorname{diag}(c)\, V^\top G, \qquad
        \nabla_V = G x^\top \operatorname{diag}(c) - G 1\, (u \odot m)^\top, \\
        \nabla_c &= \operatorname{diag}(V^\top G x^\top) + g / c, \qquad \nabla_{u \odot m} = -V^\top G 1.

    With :math:`M = P^\top \nabla_V` the gradient by L is :math:`M N^\top` below the diagonal, and that by N is
    :math:`L^\top M` above it. Second derivatives are those of the recorded operations.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, raw: Tensor, parameters: Tensor, permutation: Permutation) -> Pair:
        z, ladj, ctx.axes, factors = _normalized(images, raw, parameters, permutation)
        ctx.save_for_backward(images, raw, parameters, *factors)
        ctx.permutation = permutation
        return z, ladj

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, g_ladj: Tensor) -> tuple[Tensor | None, ...]:
        images, raw, parameters, *factors = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batch(gradient):  # the first by create_graph=True
            function = partial(_recorded, ctx.permutation)
            return *recorded_gradients(function, (images, raw, parameters), (gradient, g_ladj)), None
        x, lower, upper, product, scale, precision, ratio, shift, loc = factors
        ordered = gradient.permute(ctx.axes)
        g = ordered.flatten(1)
        by_images = None
        if ctx.needs_input_grad[0]:
            by_images = restored(((product * ratio).T @ g).view(ordered.shape), ctx.axes)
        by_z = g.sum(1).neg_()  # by -z, summed over places
        by_matrix = g @ x.T
        by_ratio = (by_matrix * product).sum(0) + g_ladj.sum() * images.shape[-2:].numel() / ratio
        by_shift = product.T @ by_z
        by_product = torch.addr(by_matrix * ratio, by_z, shift).index_select(0, ctx.permutation.inverse_order)
        by_raw = (by_product @ upper.T).tril_(-1).add_((lower.T @ by_product).triu_(1))
        by_scale = torch.addcmul(by_ratio * precision, by_shift, loc)
        # The derivative of u = eps + softplus(a) is the logistic function of a, 1 - exp(eps - u).
        by_raw.diagonal().copy_(torch.expm1(MIN_SCALE - scale).mul_(by_scale).neg_())
        return by_images, by_raw, torch.stack([by_shift * scale, (by_ratio * ratio).neg_()]), None
