"""Matrices whose norms stay below a bound, whatever their parameters are."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyroflows.compiling.eager import is_transformed
from pyroflows.nets.gradients import is_batch, recorded_gradients
from pyroflows.nets.products import product


def almost_orthogonal(weights: Sequence[Tensor], bounds: Tensor, floors: Sequence[float]) -> list[Tensor]:
    r"""Return matrices V whose norms as linear operators are each at most its b, by rescaling their columns.

    .. math:: W = b\, V \operatorname{diag}(\max(d, \mathrm{floor}))^{-1/2}, \qquad d_j = \sum_i |V^\top V|_{ij}

    Since :math:`\operatorname{diag}(d) - V^\top V` is diagonally dominant, :math:`W^\top W \preceq b^2 I` (Prach and
    Lampert 2022, arXiv:2208.03160). Equality holds for orthogonal V, towards which training moves weights that need
    their full norm. There are no iterations and no state, as there are in power iterations, which bound the norm from
    below and lag behind the parameters.

    Where the outputs are fewer than the inputs, rows take the place of columns.

    Args:
        weights: the V, ``(out, in)`` each.
        bounds: the b, positive, ``(number of weights,)``.
        floors: the least d of each, in the units of :math:`V^\top V`. With :math:`b^2`, weights with small d stay as
            they are.

    Example:
        >>> (weight,) = almost_orthogonal([torch.randn(5, 3)], torch.tensor([0.9]), [0.0])
        >>> bool(torch.linalg.matrix_norm(weight, 2) <= 0.9)
        True
    """
    floors = [max(floor, torch.finfo(bounds.dtype).tiny) for floor in floors]
    return list((_recorded if is_transformed() else _AlmostOrthogonal.apply)(floors, bounds, *weights))


def _recorded(floors: Sequence[float], bounds: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    found = []
    for weight, bound, floor in zip(weights, bounds, floors, strict=True):
        rows = _rows(weight)
        sums = (rows @ rows.mT).abs().sum(1).clamp(min=floor)
        found.append(_scaled(weight, bound * sums.rsqrt()))
    return tuple(found)


def _rows(weight: Tensor) -> Tensor:
    """Return a matrix, or its transpose, that has no more rows than columns."""
    return weight if weight.shape[0] < weight.shape[1] else weight.mT


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return weight * (scale.unsqueeze(1) if weight.shape[0] < weight.shape[1] else scale)


class _AlmostOrthogonal(torch.autograd.Function):
    r"""The rescaled matrices with their gradients written out, in a third of the operations.

    Let R be V or its transpose, whichever has fewer rows, and g the gradient by :math:`\operatorname{diag}(s) R` with
    :math:`s = b\, d^{-1/2}`. Then

    .. math:: \nabla_{s_j} = \sum_i g_{ji} R_{ji}, \qquad \nabla_b = \sum_j \nabla_{s_j} d_j^{-1/2}, \qquad
        \nabla_{d_j} = - \tfrac{b}{2} d_j^{-3/2} \nabla_{s_j}, \qquad
        \nabla_R = \operatorname{diag}(s)\, g + M R

    with :math:`M_{ij} = \operatorname{sign}(R R^\top)_{ij}\, (\nabla_{d_i} + \nabla_{d_j})`, where the gradient by a d
    below the floor is zero. Second derivatives are those of the recorded operations.
    """

    @staticmethod
    def forward(ctx: Any, floors: Sequence[float], bounds: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        found, grams, roots = [], [], []
        for weight, bound, floor in zip(weights, bounds, floors, strict=True):
            rows = _rows(weight)
            gram = product(rows, rows.mT)
            # The reciprocal roots of what is below the floor are set to that of the floor.
            root = torch.linalg.vector_norm(gram, 1, dim=1).clamp_(min=floor).rsqrt_()
            found.append(_scaled(weight, bound * root))
            grams.append(gram)
            roots.append(root)
        ctx.floors = floors
        ctx.save_for_backward(bounds, *weights, *grams, *roots)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        bounds, *saved = ctx.saved_tensors
        count = len(bounds)
        weights, grams, roots = saved[:count], saved[count : 2 * count], saved[2 * count :]
        is_recorded = torch.is_grad_enabled()  # by create_graph=True
        if is_recorded or is_transformed() or any(map(is_batch, gradients)):
            return None, *recorded_gradients(partial(_recorded, ctx.floors), (bounds, *weights), gradients)
        by_bounds, by_weights = [], []
        for k, (gradient, gram, root) in enumerate(zip(gradients, grams, roots, strict=True)):
            weight, bound = weights[k], bounds[k]
            is_wide = _rows(weight) is weight
            by_scale = (gradient * weight).sum(1 if is_wide else 0)
            by_bounds.append(by_scale @ root)
            by_sums = by_scale * root.pow(3) * (root < ctx.floors[k] ** -0.5) * (-0.5 * bound)
            mixed = gram.sign().mul_(by_sums.unsqueeze(1) + by_sums)
            mixed = product(mixed, weight) if is_wide else product(weight, mixed)
            by_weights.append(mixed.add_(_scaled(gradient, bound * root)))
        return None, torch.stack(by_bounds), *by_weights
