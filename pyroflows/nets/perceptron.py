"""The function that all multi-layer perceptrons of the package compute, with its gradient written out."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.compiling.eager import is_transformed
from pyroflows.nets.products import product

# What the weights of a layer are multiplied by: a mask or a number.
Factor: TypeAlias = Tensor | float | None


def perceptron(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    factors: Sequence[Factor] | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    r"""Return the output of a multi-layer perceptron with SiLU activations :math:`\sigma`,

    .. math:: a_k = (F_k \odot W_k)\, h_{k-1} + b_k, \qquad h_0 = x, \quad h_k = \sigma(a_k),

    which is the last :math:`a_k`. The rows of a batch are the last axis in memory, also in that of the output, so that
    products have long inner loops however narrow the layers are, and each output is one contiguous block.

    Args:
        x: ``(..., in_dim)``.
        weights: the :math:`W_k`, ``(out, in)`` each.
        biases: the :math:`b_k`, ``(out,)`` each.
        factors: the :math:`F_k`, each a mask of the shape of the weight or a number; None for 1.
        offset: a term that is added to :math:`a_1`, ``(..., out)``, such as that of a context; None for none.

    Shapes: the output is ``(..., out_dim)``.

    Example:
        >>> x, w, b = torch.randn(5, 3), torch.randn(2, 3), torch.randn(2)
        >>> torch.allclose(perceptron(x, [w], [b]), x @ w.T + b, atol=1e-6)
        True
    """
    factors = [None] * len(weights) if factors is None else factors
    if offset is not None:
        batch_shape = torch.broadcast_shapes(x.shape[:-1], offset.shape[:-1])
        x, offset = x.expand(*batch_shape, x.shape[-1]), offset.expand(*batch_shape, offset.shape[-1])
    # The transforms of torch.func cannot see into the written gradient, and torch.compile fuses better without it.
    if is_transformed():
        return _recorded(x, offset, factors, (*weights, *biases))
    return _Perceptron.apply(x, offset, factors, *weights, *biases)


def _recorded(x: Tensor, offset: Tensor | None, factors: Sequence[Factor], parameters: Sequence[Tensor]) -> Tensor:
    """Return the output by operations that autograd records."""
    count = len(factors)
    a = x
    for k, (weight, bias, factor) in enumerate(zip(parameters[:count], parameters[count:], factors, strict=True)):
        a = F.linear(F.silu(a) if k else a, weight if factor is None else weight * factor, bias)
        a = a if k or offset is None else a + offset
    return a


class _Perceptron(torch.autograd.Function):
    r"""The perceptron with its gradient written out, which spares autograd's bookkeeping and transposed products.

    From the gradient :math:`g_K` by the output, the last :math:`a_K`, follow for :math:`k = K, \dots, 1`

    .. math:: \nabla_{b_k} = \sum_n g_k, \qquad \nabla_{W_k} = F_k \odot (g_k h_{k-1}^\top), \qquad
        g_{k-1} = \sigma'(a_{k-1}) \odot (F_k \odot W_k)^\top g_k,

    where n counts the rows of the batch, and without :math:`\sigma'` for x. Second derivatives are those of the
    recorded operations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor | None, factors: Sequence[Factor], *parameters: Tensor) -> Tensor:
        count = len(factors)
        weights = [
            weight if factor is None else weight * factor
            for weight, factor in zip(parameters[:count], factors, strict=True)
        ]
        h = _columns(x)
        inputs, before = [h], []
        for k, (weight, bias) in enumerate(zip(weights, parameters[count:], strict=True)):
            a = product(weight, h).add_(bias[:, None])
            if k == 0 and offset is not None:
                a += _columns(offset)
            if k < count - 1:
                h = F.silu(a)
                inputs.append(h)
                before.append(a)
        ctx.save_for_backward(x, offset, *parameters, *weights, *inputs, *before)
        ctx.factors = factors
        return _rows(a, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        factors, count = ctx.factors, len(ctx.factors)
        x, offset, *saved = ctx.saved_tensors
        parameters, weights, inputs, before = (
            saved[: 2 * count],
            saved[2 * count : 3 * count],
            saved[3 * count : 4 * count],
            saved[4 * count :],
        )
        if torch.is_grad_enabled() or is_transformed():  # by create_graph=True, or for a batch of gradients
            with torch.enable_grad():
                output = _recorded(x, offset, factors, parameters)
            wanted = [t for t in (x, offset, *parameters) if t is not None and t.requires_grad]
            found = iter(torch.autograd.grad(output, wanted, gradient, create_graph=torch.is_grad_enabled()))
            gradients = [None if t is None or not t.requires_grad else next(found) for t in (x, offset, *parameters)]
            return gradients[0], gradients[1], None, *gradients[2:]

        g = _columns(gradient)
        by_weights: list[Tensor] = []
        by_biases: list[Tensor] = []
        for k in reversed(range(count)):
            by_biases.append(g.sum(1))
            by_weight = product(g, inputs[k].T)
            by_weights.append(by_weight if factors[k] is None else by_weight.mul_(factors[k]))
            if k:
                g = torch.ops.aten.silu_backward(product(weights[k].T, g), before[k - 1])
        by_offset = None if offset is None else _rows(g, x.shape[:-1])
        by_x = _rows(product(weights[0].T, g), x.shape[:-1]) if ctx.needs_input_grad[0] else None
        return by_x, by_offset, None, *by_weights[::-1], *by_biases[::-1]


def _columns(rows: Tensor) -> Tensor:
    """Turn rows ``(..., size)`` into ``(size, N)``, contiguous, without a copy if :func:`_rows` has made them."""
    return rows.reshape(-1, rows.shape[-1]).T.contiguous()


def _rows(columns: Tensor, batch_shape: torch.Size) -> Tensor:
    return columns.T.view(*batch_shape, len(columns))
