"""The log-determinant of a residual layer from its Jacobian."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyroflows.nets.lipschitz.contraction import Linearized, multiplied

# Jacobians are computed for as many rows at a time as keep their largest product below so many elements.
MAX_ELEMENTS = 2**22


@dataclass(frozen=True)
class Exact:
    r"""The log-determinant itself, at the cost of as many products with J as its narrowest layer has units.

    With a hidden layer of h < D units the Jacobian factors through it, :math:`J = A B`, and
    :math:`\det(I_D + A B) = \det(I_h + B A)`.

    Example:
        >>> pf.transforms.Residual(2, log_det=Exact()).ladj_is_exact
        True
    """

    is_exact = True

    def __call__(self, at: Linearized, num_axes: int) -> Tensor:
        """Return ``log |det (I + J)|``, of the batch shape; ``num_axes`` is the number of axes of an event."""
        return by_rows(_log_det_of, at, num_axes)


def _log_det_of(jacobian: Tensor) -> Tensor:
    # LAPACK has no half precision.
    matrix = jacobian.to(torch.promote_types(jacobian.dtype, torch.float32))
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.slogdet(identity + matrix).logabsdet.to(jacobian.dtype)


def by_rows(function: Callable[[Tensor], Tensor], at: Linearized, num_axes: int) -> Tensor:
    """Return what a function gives for :func:`cyclic_jacobian`, of the batch shape, some rows at a time if it is large.

    Args:
        function: maps matrices ``(..., h, h)`` to numbers ``(...)`` that follow from the traces of their powers.
        at: the Jacobian.
        num_axes: number of axes of an event.
    """
    batch_shape = at.value.shape[: at.value.dim() - num_axes]
    shapes = _shapes(at, num_axes)
    sizes = [shape.numel() for shape in shapes]
    num_rows = max(1, MAX_ELEMENTS // (min(sizes) * max(sizes)))
    if batch_shape.numel() <= num_rows or not at.slopes:
        return function(cyclic_jacobian(at, num_axes)).expand(batch_shape)
    slopes = [slope.reshape(-1, *shape) for slope, shape in zip(at.slopes, shapes[1:], strict=True)]
    parts = zip(*(slope.split(num_rows) for slope in slopes), strict=True)
    found = [function(cyclic_jacobian(replace(at, slopes=part), num_axes)) for part in parts]
    return torch.cat(found).reshape(batch_shape)


def cyclic_jacobian(at: Linearized, num_axes: int) -> Tensor:
    r"""Return small matrices M whose powers have the traces of the Jacobian's, ``(*batch, h, h)``.

    The trace of a product stays if its factors move round in a circle,
    :math:`\operatorname{tr}(A B)^k = \operatorname{tr}(B A)^k`. So M is the transposed product of the factors of
    :math:`J = W_K D_{K-1} W_{K-1} \cdots D_1 W_1`, started at the narrowest layer, whose width is h. A Jacobian that
    is the same everywhere has no batch shape.
    """
    shapes = _shapes(at, num_axes)
    start = min(range(len(shapes)), key=lambda k: shapes[k].numel())
    factors = [*zip(at.weights, [*at.slopes, None], strict=True)]
    factors = factors[start:] + factors[:start]
    (weight, slope), *rest = factors
    if num_axes == 1 and slope is not None and slope.shape[:-1].numel() > (width := rest[0][0].shape[0]):
        # The sum over the units of the first layer, :math:`W_2 D_1 W_1`, is linear in the slopes: a product of their
        # rows with a matrix that all rows share, which is a fifth faster where that is smaller than the rows.
        weight_after, slope_after = rest.pop(0)
        products = weight[:, :, None] * weight_after.T[:, None, :]
        rows = (slope @ products.flatten(1)).unflatten(-1, (-1, width))
        rows = rows if slope_after is None else slope_after.unsqueeze(-2) * rows
    else:
        # The first products, with the vectors of the basis, are the same for all rows.
        basis = torch.eye(shapes[start].numel(), dtype=weight.dtype, device=weight.device)
        rows = multiplied(weight, basis.unflatten(1, shapes[start]))
        rows = rows if slope is None else slope.unsqueeze(-num_axes - 1) * rows
    for weight, slope in rest:
        rows = multiplied(weight, rows)
        rows = rows if slope is None else slope.unsqueeze(-num_axes - 1) * rows
    return rows.flatten(-num_axes)


def _shapes(at: Linearized, num_axes: int) -> list[torch.Size]:
    """Return the shapes of an event and of each hidden layer."""
    return [tensor.shape[tensor.dim() - num_axes :] for tensor in (at.value, *at.slopes)]
