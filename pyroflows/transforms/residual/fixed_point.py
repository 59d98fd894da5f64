r"""The inverse of :math:`x = z + g(z)` for a contraction g, with exact gradients of all orders, and the linear systems
:math:`(I + J)\, u = r` and :math:`(I + J)^\top u = r` that they need.

The implicit function z(x, θ) and its gradient are

.. math::
    \mathrm{d}z = (I + J)^{-1} (\mathrm{d}x - \partial_\theta g\, \mathrm{d}\theta), \qquad
    c^\top \mathrm{d}z = u^\top \mathrm{d}x - u^\top \partial_\theta g\, \mathrm{d}\theta, \quad (I + J)^\top u = c.

Nothing of the iteration is kept. Where operations are recorded, each iteration is one operator of ``torch.library``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows.compiling.eager import is_transformed, is_under_func, runs_in_python
from pyroflows.errors import InversionError
from pyroflows.nets.gradients import is_batch
from pyroflows.nets.lipschitz.activations import IN_PLACE
from pyroflows.nets.lipschitz.contraction import Contraction, Linearized, network_value
from pyroflows.transforms.gradients import attached
from pyroflows.transforms.residual.extrapolation import ROUNDING, Factory, Function, fixed_points, norms

# Up to so many dimensions a linear system is solved by its matrix, in less time than by iteration.
MAX_DENSE_DIM = 32
# Newton's method needs ten on trained networks; where operations cannot loop on values, it makes all of these.
NUM_NEWTON_STEPS = 30


def inverted(g: Contraction, x: Tensor, num_axes: int) -> Tensor:
    r"""Solve :math:`z + g(z) = x` for each row.

    Args:
        g: a function with a Lipschitz constant below 1, whose parameters may need gradients.
        x: ``(*batch, *shape)``.
        num_axes: the number of axes of an event.

    Returns:
        z, of the shape of x, with exact gradients. It is NaN where x is not finite, and, where Python cannot read the
        values of tensors, where the iteration missed.

    Raises:
        InversionError: if the iteration misses, which takes a g that is no contraction.

    Example:
        >>> g = Contraction([torch.tensor([[0.5]])], [torch.tensor([1.0])], "tanh")
        >>> inverted(g, torch.tensor([[4.0], [torch.inf]]), num_axes=1)
        tensor([[2.],
                [nan]])
    """
    if is_under_func():
        return _inverted_by_newton(g, x, num_axes)
    if is_transformed():
        return _INVERSE(x, g.weights, g.offsets, g.activation, num_axes)
    if runs_in_python() and not torch.is_grad_enabled():
        return _checked(x, *_inverse_by_iteration(x, g, num_axes))
    return _Inverse.apply(g.activation, num_axes, x, *g.weights, *g.offsets)


def solved_transposed(at: Linearized, right: Tensor, num_axes: int) -> Tensor:
    r"""Solve :math:`(I + J)^\top u = r` for each row, to float precision.

    Args:
        at: the contraction's Jacobian J.
        right: r, ``(*batch, *shape)``.
        num_axes: the number of axes of an event.

    Returns:
        u, with exact gradients if they are enabled.

    Raises:
        InversionError: if the iteration misses, which takes a g that is no contraction.

    Example:
        >>> at = Linearized(torch.zeros(1, 2), [torch.tensor([[0.0, 0.5], [0.0, 0.0]])], [])
        >>> solved_transposed(at, torch.tensor([[2.0, 2.0]]), num_axes=1)
        tensor([[2., 1.]])
    """
    return _solved_linear(at, right, num_axes, transposed=True)


def _solved_linear(at: Linearized, right: Tensor, num_axes: int, transposed: bool) -> Tensor:
    is_small = right.shape[right.dim() - num_axes :].numel() <= MAX_DENSE_DIM
    if is_small or is_under_func() or is_batch(right):
        return _solved_densely(at, right, num_axes, transposed)
    held = at.held()
    with torch.no_grad():
        if runs_in_python():
            u = _checked(right, *_linear_by_iteration(right, held.weights, held.slopes, num_axes, transposed))
        else:
            u = _SOLVE(right, held.weights, held.slopes, num_axes, transposed)
    if not torch.is_grad_enabled():
        return u
    product = at.transposed_times(u) if transposed else at.times(u)
    # The residual is zero up to rounding, and has the gradients of the solution by J and r once it is solved for.
    return attached(u, u + product - right, lambda c: _solved_linear(at, c, num_axes, not transposed))


class _Inverse(torch.autograd.Function):
    """The inverse as a function of x, the weights of g, and its offsets, one after the other."""

    @staticmethod
    def forward(ctx: Any, activation: str, num_axes: int, x: Tensor, *parts: Tensor) -> Tensor:
        g = _contraction(parts, activation)
        if runs_in_python():
            z = _checked(x, *_inverse_by_iteration(x, g, num_axes))
        else:
            z = _INVERSE(x, g.weights, g.offsets, activation, num_axes)
        ctx.save_for_backward(z, *parts)
        ctx.arguments = activation, num_axes
        return z

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        z, *parts = ctx.saved_tensors
        by_x, by_parts = _pulled_back(z, parts, gradient, *ctx.arguments)
        return None, None, by_x, *by_parts


def _pulled_back(
    z: Tensor, parts: Sequence[Tensor], gradient: Tensor, activation: str, num_axes: int
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the gradients by x and by the parts of g. They have gradients themselves if these are enabled."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # One part may be computed from another one; views part the ways that lead to each.
        views = [part.view_as(part) for part in parts]
        at = _contraction(views, activation).linearized(z)
    u = _solved_linear(at if create_graph else at.held(), gradient, num_axes, transposed=True)
    wanted = [view for view in views if view.requires_grad]
    found = iter(torch.autograd.grad(at.value, wanted, -u, create_graph=create_graph) if wanted else ())
    return u, [next(found) if view.requires_grad else None for view in views]


def _contraction(parts: Sequence[Tensor], activation: str) -> Contraction:
    num_layers = len(parts) // 2
    return Contraction(parts[:num_layers], parts[num_layers:], activation)


# The iterations, which return a solution, NaN where there is none, the norms of its residuals, and where there is one.

Found = tuple[Tensor, Tensor, Tensor]


def _inverse_by_iteration(x: Tensor, g: Contraction, num_axes: int) -> Found:
    batch_shape, shape = x.shape[: x.dim() - num_axes], x.shape[x.dim() - num_axes :]

    def by_rows(offset: Tensor) -> Tensor:
        own = offset.shape[offset.dim() - num_axes :]
        # An offset that all rows share has no batch shape.
        return offset if len(own) == offset.dim() else offset.expand(*batch_shape, *own).reshape(-1, *own)

    activate_, factor = IN_PLACE[g.activation]
    weights = [*g.weights[:1], *(weight if factor == 1 else factor * weight for weight in g.weights[1:])]
    *offsets, last = (by_rows(offset) for offset in g.offsets)
    # The function whose fixed point is sought, x - g(z), is one of the same kind.
    weights[-1] = -weights[-1]
    offsets.append(x.reshape(-1, *shape) - last)

    def factory(rows: Tensor | None) -> Function:
        some = offsets if rows is None else [o if o.dim() == num_axes else o[rows] for o in offsets]
        return lambda z: network_value(weights, some, activate_, z.reshape(-1, *shape)).flatten(1)

    # An offset that all places share counts at each.
    num_places = shape[1:].numel()
    inner = x.new_zeros(())
    for o in (*offsets[:-1], last):
        own = o.flatten(-num_axes)
        inner = inner + norms(own) * (num_places * o.shape[o.dim() - num_axes] / own.shape[-1]) ** 0.5
    return _by_iteration(factory, x, 1, inner, num_axes)


def _linear_by_iteration(
    right: Tensor, weights: Sequence[Tensor], slopes: Sequence[Tensor], num_axes: int, transposed: bool
) -> Found:
    num_batch_axes = right.dim() - num_axes
    shape = right.shape[num_batch_axes:]
    parts = [right.reshape(-1, *shape), *(slope.reshape(-1, *slope.shape[num_batch_axes:]) for slope in slopes)]

    def factory(rows: Tensor | None) -> Function:
        of_rows, *slopes = parts if rows is None else [part[rows] for part in parts]
        at = Linearized(of_rows, weights, slopes)
        times = at.transposed_times if transposed else at.times
        return lambda u: (of_rows - times(u.reshape(-1, *shape))).flatten(1)

    return _by_iteration(factory, right, 0, right.new_zeros(()), num_axes)


def _by_iteration(factory: Factory, right: Tensor, unit: float, inner: Tensor, num_axes: int) -> Found:
    rows = right.reshape(-1, right.shape[right.dim() - num_axes :].numel())
    solution, residual, is_solved = fixed_points(factory, rows, unit + 2 * norms(rows), inner.expand(len(rows)))
    solution = torch.where(is_solved[:, None], solution, torch.nan)
    return solution.reshape(right.shape), residual, is_solved


def _checked(right: Tensor, solution: Tensor, residual: Tensor, is_solved: Tensor) -> Tensor:
    if is_solved.all():
        return solution
    # No value is sought for a right side that is not finite. Its NaN passes on to whatever guards the values.
    is_finite = right.reshape(len(residual), -1).isfinite().all(-1) & residual.isfinite()
    missed = is_finite & ~is_solved
    if missed.any():
        raise InversionError(
            f"the inverse of a residual layer missed its target by up to {residual[missed].max().item():.1e} at "
            f"{int(missed.sum())} of {missed.numel()} rows: the network is no contraction, as if its bound "
            "were changed by hand, or its coefficient is too near 1 for this dtype: keep it below 1, and use float64"
        )
    return solution


# The same by the dense Jacobian, where operations run on batches whose values cannot be read.


def _inverted_by_newton(g: Contraction, x: Tensor, num_axes: int) -> Tensor:
    """Invert by a fixed number of Newton steps, then attach the gradients by two more, as in a search for a root."""
    finite = _norms(x, num_axes).isfinite()
    x = torch.where(finite, x, 0)
    with torch.no_grad():
        held = g.held()
        at = held.linearized(x)
        z, f = x, at.value
        residual, step = _norms(f, num_axes), f
        for _ in range(NUM_NEWTON_STEPS):
            new = z - step
            at = held.linearized(new)
            new_f = new + at.value - x
            new_residual = _norms(new_f, num_axes)
            falls = new_residual < residual
            z, f = torch.where(falls, new, z), torch.where(falls, new_f, f)
            residual = torch.where(falls, new_residual, residual)
            # The plain step makes the residual smaller for sure.
            step = torch.where(falls, _solved_densely(at, new_f, num_axes, transposed=False), f)
        rounding = ROUNDING * torch.finfo(x.dtype).eps * (1 + _norms(x, num_axes) + _norms(z, num_axes))
        is_solved = finite & (residual <= rounding)
    for _ in range(2):
        at = g.linearized(z)
        z = z - _solved_densely(at, z + at.value - x, num_axes, transposed=False)
    return torch.where(is_solved, z, torch.nan)


def _solved_densely(at: Linearized, right: Tensor, num_axes: int, transposed: bool) -> Tensor:
    """Solve for each row by the factorisation of a matrix."""
    value = at.value
    batch_shape, shape = value.shape[: value.dim() - num_axes], value.shape[value.dim() - num_axes :]
    dim = shape.numel()
    basis = torch.eye(dim, dtype=value.dtype, device=value.device)
    columns = at.times(basis.reshape(dim, *[1] * len(batch_shape), *shape).expand(dim, *value.shape))
    matrix = basis + columns.reshape(dim, *batch_shape, dim).movedim(0, -1)
    # The inverse is well-conditioned, and forward-mode gradients of linalg.solve are wrong under vmap in torch 2.13. A
    # check for singular matrices would need the values; their inverse is no solution.
    inverse = torch.linalg.inv_ex(matrix).inverse
    flat = right.reshape(*batch_shape, dim, 1)
    return ((inverse.mT if transposed else inverse) @ flat).reshape(right.shape)


def _norms(vectors: Tensor, num_axes: int) -> Tensor:
    """Return the norm of each event, with axes of size 1 in the places of its own."""
    return norms(vectors.flatten(-num_axes)).reshape(*vectors.shape[:-num_axes], *[1] * num_axes)


# The operators.

torch.library.define(
    "pyroflows::residual_inverse",
    "(Tensor x, Tensor[] weights, Tensor[] offsets, str activation, int num_axes) -> Tensor",
)
torch.library.define(
    "pyroflows::residual_solve",
    "(Tensor right, Tensor[] weights, Tensor[] slopes, int num_axes, bool transposed) -> Tensor",
)


@torch.library.impl("pyroflows::residual_inverse", "CompositeExplicitAutograd")
def _inverse_kernel(x: Tensor, weights: list[Tensor], offsets: list[Tensor], activation: str, num_axes: int) -> Tensor:
    return _inverse_by_iteration(x, Contraction(weights, offsets, activation), num_axes)[0]


@torch.library.impl("pyroflows::residual_solve", "CompositeExplicitAutograd")
def _solve_kernel(
    right: Tensor, weights: list[Tensor], slopes: list[Tensor], num_axes: int, transposed: bool
) -> Tensor:
    return _linear_by_iteration(right, weights, slopes, num_axes, transposed)[0]


def _fake(first: Tensor, *others: Any) -> Tensor:
    return first.new_empty(first.shape)


for name in ("residual_inverse", "residual_solve"):
    torch.library.register_fake(f"pyroflows::{name}", _fake)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weights, offsets, activation, num_axes = inputs
    ctx.save_for_backward(output, *weights, *offsets)
    ctx.arguments = activation, num_axes


def _recorded_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    z, *parts = ctx.saved_tensors
    by_x, by_parts = _pulled_back(z, parts, gradient, *ctx.arguments)
    num_layers = len(parts) // 2
    return by_x, by_parts[:num_layers], by_parts[num_layers:], None, None


torch.library.register_autograd("pyroflows::residual_inverse", _recorded_backward, setup_context=_save)
_INVERSE = torch.ops.pyroflows.residual_inverse.default
_SOLVE = torch.ops.pyroflows.residual_solve.default
