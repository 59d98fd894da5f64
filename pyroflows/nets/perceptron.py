"""The function that the multi-layer perceptrons of the package compute."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.compiling.eager import is_transformed, runs_in_python
from pyroflows.nets.gradients import recorded_gradients
from pyroflows.nets.products import is_large, product

# What the weights of a layer are multiplied by: a mask or a number.
Factor: TypeAlias = Tensor | float | None

_silu_backward = torch.ops.aten.silu_backward.default


def perceptron(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    factors: Sequence[Factor] | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    r"""Return the output of a multi-layer perceptron with SiLU activations :math:`\sigma`,

    .. math:: a_k = (F_k \odot W_k)\, h_{k-1} + b_k, \qquad h_0 = x, \quad h_k = \sigma(a_k),

    which is the last :math:`a_k`. In memory, also in that of the output, the rows of the batch are the last axis, so
    that loops over them are long however narrow the layers are, and each output is one contiguous block.

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
    parameters = (*weights, *biases)
    # The transforms of torch.func arrange the rows themselves, and cannot see into a gradient that is written out.
    if is_transformed():
        return _by_rows(x, offset, factors, parameters)
    if offset is not None:
        batch_shape = torch.broadcast_shapes(x.shape[:-1], offset.shape[:-1])
        x, offset = x.expand(*batch_shape, x.shape[-1]), offset.expand(*batch_shape, offset.shape[-1])
    h = _columns(x)
    # Where Python runs at each call, autograd's own functions take less time between the products.
    is_written_out = not runs_in_python() or any(is_large(weight, h.shape[1]) for weight in weights)
    function = _WrittenOut.apply if is_written_out else _by_columns
    output = function(h, None if offset is None else _columns(offset), factors, *parameters).T
    return output if x.dim() == 2 else output.reshape(*x.shape[:-1], output.shape[-1])


def _columns(rows: Tensor) -> Tensor:
    """Turn rows ``(..., size)`` into contiguous columns ``(size, N)``."""
    return (rows if rows.dim() == 2 else rows.reshape(-1, rows.shape[-1])).T.contiguous()


def _masked(factors: Sequence[Factor], weights: Sequence[Tensor]) -> list[Tensor]:
    return [w if factor is None else w * factor for factor, w in zip(factors, weights, strict=True)]


def _by_rows(x: Tensor, offset: Tensor | None, factors: Sequence[Factor], parameters: Sequence[Tensor]) -> Tensor:
    """Return the output for rows ``(..., in_dim)``."""
    weights, biases = _masked(factors, parameters[: len(factors)]), parameters[len(factors) :]
    a = F.linear(x, weights[0], biases[0])
    a = a if offset is None else a + offset
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        a = F.linear(F.silu(a), weight, bias)
    return a


def _by_columns(x: Tensor, offset: Tensor | None, factors: Sequence[Factor], *parameters: Tensor) -> Tensor:
    """Return the output ``(out_dim, N)`` for columns ``(in_dim, N)``."""
    weights, biases = _masked(factors, parameters[: len(factors)]), parameters[len(factors) :]
    a = torch.addmm(biases[0].unsqueeze(1), weights[0], x)
    a = a if offset is None else a + offset
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        a = torch.addmm(bias.unsqueeze(1), weight, F.silu(a))
    return a


class _WrittenOut(torch.autograd.Function):
    r"""What :func:`_by_columns` computes, by the faster products and with the gradient written out.

    From the gradient :math:`g_K` by the output, the last :math:`a_K`, follow for :math:`k = K, \dots, 1`

    .. math:: \nabla_{b_k} = \sum_n g_k, \qquad \nabla_{W_k} = F_k \odot (g_k h_{k-1}^\top), \qquad
        g_{k-1} = \sigma'(a_{k-1}) \odot (F_k \odot W_k)^\top g_k,

    where n counts the rows of the batch; x gets :math:`g_0` without :math:`\sigma'`, and the offset :math:`g_1`. Second
    derivatives are those of the recorded operations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor | None, factors: Sequence[Factor], *parameters: Tensor) -> Tensor:
        weights, biases = _masked(factors, parameters[: len(factors)]), parameters[len(factors) :]
        a = product(weights[0], x).add_(biases[0].unsqueeze(1))
        if offset is not None:
            a += offset
        hidden, before = [], []
        for weight, bias in zip(weights[1:], biases[1:], strict=True):
            before.append(a)
            hidden.append(F.silu(a))
            a = product(weight, hidden[-1]).add_(bias.unsqueeze(1))
        ctx.save_for_backward(x, offset, *parameters, *weights, *hidden, *before)
        ctx.factors = factors
        return a

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        count = len(ctx.factors)
        x, offset, *saved = ctx.saved_tensors
        parameters, weights = saved[: 2 * count], saved[2 * count : 3 * count]
        hidden, before = saved[3 * count : 4 * count - 1], saved[4 * count - 1 :]
        if torch.is_grad_enabled() or is_transformed():  # by create_graph=True, or for a batch of gradients
            by_x, by_offset, *by_parameters = recorded_gradients(
                lambda x, offset, *parameters: _by_columns(x, offset, ctx.factors, *parameters),
                (x, offset, *parameters),
                (gradient,),
            )
            return by_x, by_offset, None, *by_parameters
        inputs = [x, *hidden]
        g = gradient.contiguous()
        by_weights: list[Tensor] = []
        by_biases: list[Tensor] = []
        for k in reversed(range(count)):
            by_weight = product(g, inputs[k].T)
            by_weights.append(by_weight if ctx.factors[k] is None else by_weight.mul_(ctx.factors[k]))
            by_biases.append(g.sum(1))
            if k:
                g = _silu_backward(product(weights[k].T, g), before[k - 1])
        by_x = product(weights[0].T, g) if ctx.needs_input_grad[0] else None
        return by_x, None if offset is None else g, None, *by_weights[::-1], *by_biases[::-1]
