r"""Solve :math:`z = t(z)` for many contractions t at once, each row by itself, without derivatives."""

from collections.abc import Callable

import torch
from torch import Tensor

# Maps rows (n, D) to t of them. A factory makes it for the rows with given indices, or for all rows.
Function = Callable[[Tensor], Tensor]
Factory = Callable[[Tensor | None], Function]

# The number of steps in a cycle: at first, and later, when only hard rows are left, by one more each cycle.
FIRST_LENGTH, LAST_LENGTH = 4, 9
# A contraction by 0.999 needs 36000 plain steps to the precision of float64, which are 4000 cycles.
MAX_CYCLES = 5000
# A solution is wrong, rather than rounded, where its residual exceeds this multiple of the dtype's eps and of its size.
ROUNDING = 100


@torch.no_grad()
def fixed_points(factory: Factory, start: Tensor, size: Tensor, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the fixed point of each row, where t is a contraction.

    A cycle consists of plain steps :math:`z_{i+1} = t(z_i)` and of a jump to where they lead (reduced rank
    extrapolation, Smith, Ford and Sidi 1987): for the last steps :math:`d_i = z_{i+1} - z_i`, i from 0 to k,

    .. math:: z = z_{k+1} + \sum_{i=1}^{k} c_i d_i, \qquad
        c = \arg\min_c \Big| d_k + \sum_{i=1}^{k} c_i (d_i - d_{i-1}) \Big|,

    which is the fixed point itself where t is linear and its range has k dimensions. A step is the residual of the
    point where it begins, so that nothing but t is evaluated. If the first step after the jump is longer than the last
    one before it, the plain steps go on instead, which become shorter by t's constant each time. Where a cycle does not
    make them shorter, only rounding is left. Rows that are done leave the computation as soon as they are many.

    Args:
        factory: returns t for the rows of the start at given indices; for all of them, if the indices are None.
        start: ``(N, D)``.
        size: the size of the numbers that t is a sum of, ``(N,)``, for the rounding that the iteration ends at.
        inner: the size of other numbers within t, ``(N,)``, for the rounding that is tolerated.

    Returns:
        The fixed points, the norms of the last steps towards them, and whether they are any: a row has none where the
        iteration missed it, or where its steps prove that t is no contraction, or where the start or t of it is not
        finite.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> z, _, is_solved = fixed_points(lambda rows: lambda z: x - 0.5 * z.flip(-1), x, x.new_ones(2), x.new_ones(2))
        >>> torch.allclose(z + 0.5 * z.flip(-1), x), is_solved
        (True, tensor([True, True]))
    """
    eps, dim = torch.finfo(start.dtype).eps, start.shape[1]
    aims, tolerances = 4 * eps * size, ROUNDING * eps * (size + inner)
    function, rows = factory(None), torch.arange(len(start), device=start.device)
    # A point, t of it, and the distance between the two.
    z, after = start, function(start)
    residual, aim, tolerance = norms(after - z), aims, tolerances
    active = residual > aim
    solution, residuals, is_stretched = after, residual, torch.zeros_like(active)
    for cycle in range(MAX_CYCLES):
        num_active = int(active.sum())
        if num_active == 0:
            break
        if num_active < 0.6 * len(rows):
            solution, residuals = solution.index_copy(0, rows, after), residuals.index_copy(0, rows, residual)
            kept = active.nonzero()[:, 0]
            rows, z, after, residual, active = rows[kept], z[kept], after[kept], residual[kept], active[kept]
            function, aim, tolerance = factory(rows), aims[rows], tolerances[rows]
        path = [z, after]
        while len(path) <= min(max(FIRST_LENGTH, cycle + 1), LAST_LENGTH):
            path.append(function(path[-1]))
        # In float64, where squares of large numbers do not overflow and differences are exact.
        points = torch.stack(path, 1).double()
        last = norms(path[-1] - path[-2])
        # A contraction makes steps smaller. If it does not, the row stays unsolved, although there may be solutions.
        if (last > residual + tolerance).any():
            is_stretched[rows] |= last > residual + tolerance
        jumped = _limit(points[:, -dim - 2 :]).to(z.dtype)
        after = function(jumped)
        new = norms(after - jumped)
        is_nearer = new < last
        z = torch.where(is_nearer[:, None], jumped, path[-2])
        after = torch.where(is_nearer[:, None], after, path[-1])
        new = torch.where(is_nearer, new, last)
        active &= (new > aim).logical_and_(new < residual)
        residual = new
    solution, residuals = solution.index_copy(0, rows, after), residuals.index_copy(0, rows, residual)
    is_small = residuals <= tolerances + ROUNDING * eps * norms(solution)
    return solution, residuals, is_small & ~is_stretched


def _limit(points: Tensor) -> Tensor:
    """Return the point that k + 2 points lead to, ``(n, k + 2, D)``."""
    steps = points.diff(dim=1)
    bends = steps.diff(dim=1)
    products = bends @ steps.mT
    # If rounding makes bends dependent, the result is of any size, and the plain steps go on.
    coefficients = torch.linalg.solve_ex(products.diff(dim=-1), products[..., -1:]).result
    return torch.baddbmm(points[:, -1:], coefficients.mT, steps[:, 1:], alpha=-1)[:, 0]


def norms(vectors: Tensor) -> Tensor:
    """Return the norms of vectors ``(..., D)``, in float64."""
    return torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float64)
