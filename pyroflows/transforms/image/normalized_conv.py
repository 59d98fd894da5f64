"""A 1 x 1 convolution next to activation normalisation, as one map."""

from typing import Any

import torch
from torch import Tensor

from pyroflows.compiling.eager import is_transformed
from pyroflows.transforms.base import Pair
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.image.conv1x1 import Conv1x1
from pyroflows.transforms.linear.positive_diagonal import MIN_SCALE, positive_diagonal
from pyroflows.transforms.normalization.act_norm import ActNorm
from pyroflows.transforms.univariate.layout import memory_order, restored


class NormalizedConv1x1(Compose):
    r"""A 1 x 1 convolution and activation normalisation, the latter at the data end, as in a step of Glow.

    .. math:: z = W (\operatorname{diag}(1 / \sigma)\, x - m), \qquad W = P L U

    It is the composition of the two layers, and computes it on processors as one product with a bias, instead of a
    product and a pass over all numbers.

    Args:
        convolution: the layer of W, without context.

    Shapes: z and x are ``(..., C, H, W)``.

    Example:
        >>> t = NormalizedConv1x1(Conv1x1((3, 4, 2), order=[2, 0, 1]))
        >>> x = torch.randn(5, 3, 4, 2)
        >>> torch.allclose(t.inv(x), x[:, [2, 0, 1]], atol=1e-5), [type(layer).__name__ for layer in t.layers]
        (True, ['Conv1x1', 'ActNorm'])
    """

    def __init__(self, convolution: Conv1x1) -> None:
        super().__init__([convolution, ActNorm(convolution.event_shape)])

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        if not _is_fused(z):
            return super()._forward_and_ladj(z, context)
        convolution, norm = self.layers
        lower, upper, scale = convolution.lu.factors(None)
        loc, log_scale = norm.parameters_of.value
        deviation = log_scale.exp()[:, None]
        columns, shape, order = _columns(z)
        matrix = deviation * convolution._inverse_matrix(lower, upper)
        x = torch.addmm(deviation * loc[:, None], matrix, columns)
        return restored(x.view(shape), order), self._ladj(z, (log_scale - scale.log()).sum())

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        if not _is_fused(x):
            return super()._inverse_and_ladj(x, context)
        convolution, norm = self.layers
        columns, shape, order = _columns(x)
        permutation = convolution.lu.permutation
        z, log_det = _Normalized.apply(
            columns,
            convolution.lu.matrix_of.value,
            norm.parameters_of.value,
            permutation.order,
            permutation.inverse_order,
        )
        return restored(z.view(shape), order), self._ladj(x, log_det)

    def _ladj(self, images: Tensor, log_det: Tensor) -> Tensor:
        return (self.event_shape[1:].numel() * log_det).expand(images.shape[:-3])


def _is_fused(images: Tensor) -> bool:
    """Tell whether the two layers are computed as one, which the transforms of torch.func could not see into."""
    return images.device.type == "cpu" and not is_transformed()


def _columns(images: Tensor) -> tuple[Tensor, torch.Size, list[int]]:
    """Return images as columns ``(C, places)``, and the shape and the order of axes that bring them back.

    Channels come first in memory, and the batch last if they did not, as convolutions want it.
    """
    order = memory_order(images, images.dim())
    if order[0] != images.dim() - 3:
        order = [*range(images.dim() - 3, images.dim()), *range(images.dim() - 3)]
    ordered = images.permute(order)
    return ordered.flatten(1), ordered.shape, order


def _normalized(x: Tensor, raw: Tensor, parameters: Tensor, order: Tensor) -> tuple[Tensor, ...]:
    r"""Return :math:`z = V (\operatorname{diag}(c)\, x - u \odot m)` and :math:`\sum \log c`, and then what gradients
    need: L, N, :math:`V = P L N`, u and :math:`c = u / \sigma`.

    Args:
        x: columns ``(C, places)``.
        raw: the matrix that holds L, N and the u of :class:`pyroflows.transforms.LU`.
        parameters: m and :math:`\log \sigma`, ``(2, C)``.
        order: the permutation P.
    """
    loc, log_scale = parameters
    scale = positive_diagonal(raw)
    lower, upper = raw.tril(-1).fill_diagonal_(1.0), raw.triu(1).fill_diagonal_(1.0)
    product = (lower @ upper).index_select(0, order)
    ratio = scale * torch.exp(-log_scale)
    z = torch.addmm((product @ (scale * loc))[:, None], product * ratio, x, beta=-1)
    return z, ratio.log().sum(), lower, upper, product, scale, ratio


class _Normalized(torch.autograd.Function):
    r"""The map of :func:`_normalized` with its gradient written out.

    Let G and g be the gradients by z and by the log-determinant, and A = V diag(c). Then

    .. math::
        \nabla_x &= A^\top G, \qquad \nabla_V = G x^\top \operatorname{diag}(c) - (G 1)\, (u \odot m)^\top, \\
        \nabla_c &= \operatorname{diag}(V^\top G x^\top) + g / c, \qquad \nabla_{u \odot m} = -V^\top G 1,

    and with :math:`M = P^\top \nabla_V` the gradient by L is :math:`M N^\top` below the diagonal, and that by N is
    :math:`L^\top M` above it. Second derivatives are those of the recorded operations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, raw: Tensor, parameters: Tensor, order: Tensor, inverse_order: Tensor) -> Pair:
        z, log_det, *factors = _normalized(x, raw, parameters, order)
        ctx.save_for_backward(x, raw, parameters, order, inverse_order, *factors)
        return z, log_det

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, g_log_det: Tensor) -> tuple[Tensor | None, ...]:
        x, raw, parameters, order, inverse_order, lower, upper, product, scale, ratio = ctx.saved_tensors
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(gradient):
            return *_gradients_by_autograd((gradient, g_log_det), (x, raw, parameters), order), None, None
        loc, log_scale = parameters
        by_x = (product * ratio).T @ gradient if ctx.needs_input_grad[0] else None
        total = gradient.sum(1)
        by_matrix = gradient @ x.T
        by_ratio = (by_matrix * product).sum(0) + g_log_det / ratio
        by_shift = product.T @ total
        by_product = torch.addr(by_matrix * ratio, total, scale * loc, alpha=-1).index_select(0, inverse_order)
        by_scale = by_ratio * torch.exp(-log_scale) - by_shift * loc
        by_raw = (by_product @ upper.T).tril_(-1).add_((lower.T @ by_product).triu_(1))
        # The derivative of u = eps + softplus(a) is the logistic function of a, 1 - exp(eps - u).
        by_raw.diagonal().copy_(by_scale * -torch.expm1(MIN_SCALE - scale))
        return by_x, by_raw, -torch.stack([by_shift * scale, by_ratio * ratio]), None, None


def _gradients_by_autograd(
    gradients: tuple[Tensor, Tensor], arguments: tuple[Tensor, ...], order: Tensor
) -> list[Tensor | None]:
    """Return the gradients by the arguments that require any, through which gradients can flow again."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # One argument may be computed from another one; views part the ways that lead to each.
        views = [argument.view_as(argument) for argument in arguments]
        outputs = _normalized(views[0], views[1], views[2], order)[:2]
    wanted = [view for view in views if view.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=create_graph))
    return [next(found) if view.requires_grad else None for view in views]
