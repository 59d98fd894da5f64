"""Value and estimated log-determinant of a dense residual layer as one function, whose gradient is written out."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows.nets.gradients import is_batch, recorded_gradients
from pyroflows.nets.lipschitz.contraction import Contraction
from pyroflows.nets.lipschitz.tangents import pulled, pushed
from pyroflows.transforms.residual.exact import Exact
from pyroflows.transforms.residual.probes import signs

# It maps probes v, the products J v, weights and slopes to the estimates and the vectors w of their gradients.
Series = Callable[[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Tensor]]


def value_and_estimate(g: Contraction, z: Tensor, series: Series) -> tuple[Tensor, Tensor]:
    r"""Return value and estimated log-determinant of a dense contraction at z, ``(..., D)`` and ``(...)``.

    The estimate is that of :func:`~pyroflows.transforms.residual.probes.estimated` with one probe v. The product J v,
    whose gradient is that of the estimate, is a part of the pass that gives the value, instead of a second pass.
    """
    if z.dim() == 2 and all(offset.dim() == 1 for offset in g.offsets):
        return _ValueAndEstimate.apply(g.activation, series, z, *g.weights, *g.offsets)
    batch_shape = torch.broadcast_shapes(z.shape[:-1], *(offset.shape[:-1] for offset in g.offsets))
    offsets = [_rows(offset, batch_shape) if offset.dim() > 1 else offset for offset in g.offsets]
    value, ladj = _ValueAndEstimate.apply(g.activation, series, _rows(z, batch_shape), *g.weights, *offsets)
    return value.reshape(*batch_shape, z.shape[-1]), ladj.reshape(batch_shape)


def _rows(part: Tensor, batch_shape: torch.Size) -> Tensor:
    return part.expand(*batch_shape, part.shape[-1]).reshape(-1, part.shape[-1])


class _ValueAndEstimate(torch.autograd.Function):
    """The gradient of a batch of gradients is computed by autograd from the same probes; second derivatives are those
    of the value and of the determinant, see :func:`~pyroflows.transforms.residual.probes.estimated`.
    """

    @staticmethod
    def forward(ctx: Any, activation: str, series: Series, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        half = len(parameters) // 2
        weights, offsets = parameters[:half], parameters[half:]
        v = signs(1, z)[0]
        outputs, inputs, slopes, bends = pushed(activation, weights, offsets, z, v)
        ladj, w = series(v, outputs[len(z) :], weights, slopes)
        ctx.activation = activation
        ctx.save_for_backward(z, v, w, *parameters, *inputs, *slopes, *bends)
        return outputs[: len(z)], ladj

    @staticmethod
    def backward(ctx: Any, by_value: Tensor, by_ladj: Tensor) -> tuple[Any, ...]:
        z, v, w, *saved = ctx.saved_tensors
        half = (len(saved) + 2) // 5
        weights, offsets, inputs = (saved[k * half : (k + 1) * half] for k in range(3))
        slopes, bends = saved[3 * half : 4 * half - 1], saved[4 * half - 1 :]
        by_product = w * by_ladj.unsqueeze(-1)
        is_batched = is_batch(by_value) or is_batch(by_ladj)
        if torch.is_grad_enabled() or is_batched:  # the first by create_graph=True

            def function(z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
                at = Contraction(parameters[:half], parameters[half:], ctx.activation).linearized(z)
                return at.value, at.times(v) if is_batched else Exact()(at, 1)

            gradients = (by_value, by_product if is_batched else by_ladj)
            return None, None, *recorded_gradients(function, (z, *weights, *offsets), gradients)
        by_z, by_weights, by_rows = pulled(torch.cat([by_value, by_product]), weights, inputs, slopes, bends)
        by_offsets = (a.sum_to_size(b.shape) for a, b in zip(by_rows, offsets, strict=True))
        return None, None, by_z, *by_weights, *by_offsets
