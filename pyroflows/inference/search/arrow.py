"""Matrices of the shape of an arrow: precisions of hierarchies, whose rows are independent given the levels above.

The rows of a level have blocks of their own, and blocks with the rows that enclose them and with the global elements.
All else is zero, so that elimination from the innermost level outwards costs as much as there are blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Eigenvalues of a block are at least this share of its largest one.
LEAST_EIGENVALUE = 1e-8
# A block of zeros gets this one.
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class ArrowLevel:
    """The rows of a level in a packed vector.

    Args:
        places: the indices of their elements in the vector, ``(R, d)``.
        parents: the indices of the levels that enclose this one, from the outermost on.
        rows: for each of them, the row that encloses each row, ``(R,)``.
        pattern: which entries of the blocks of rows can differ from zero, booleans ``(d, d)``; None for all.
    """

    places: Tensor
    parents: tuple[int, ...] = ()
    rows: tuple[Tensor, ...] = ()
    pattern: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Arrow:
    r"""A batch of symmetric matrices in blocks, without the blocks of the global elements among themselves.

    Args:
        levels: the levels, each after those that enclose it.
        own: for each level the blocks of its rows, ``(..., R, d, d)``.
        given: for each level the blocks of its rows with the p elements of the levels above: the global ones, if they
            are a part of the matrix, and those of the enclosing rows, ``(..., R, d, p)``.
    """

    levels: tuple[ArrowLevel, ...]
    own: tuple[Tensor, ...]
    given: tuple[Tensor, ...]

    def eliminated(self) -> tuple["Conditionals", Tensor | None]:
        r"""Eliminate level after level, the innermost one first.

        With the block P of a row, after the rows within it were eliminated, and its block G with the levels above, the
        row has the conditional precision P, and the regression :math:`-P^{-1} G` on the levels above, to whose blocks
        :math:`-G^\top P^{-1} G` is added.

        Returns:
            The conditionals, and what is added to the blocks of the global elements ``(..., D_0, D_0)``.
        """
        own, given = list(self.own), list(self.given)
        regressions: list[Tensor] = [torch.empty(0)] * len(own)
        num_global = self.num_global
        added = None
        for i in reversed(range(len(own))):
            level = self.levels[i]
            own[i] = own[i].clone() if own[i].requires_grad else own[i]
            if not given[i].shape[-1]:
                regressions[i] = given[i]
                continue
            regressions[i] = -_solved(own[i], given[i])
            if num_global:
                part = given[i][..., :num_global].flatten(-3, -2).mT @ regressions[i][..., :num_global].flatten(-3, -2)
                added = part if added is None else added + part
            places = self._places_of_parents(i)
            for j, (parent, rows) in enumerate(zip(level.parents, level.rows, strict=True)):
                here = places[j]
                above = torch.cat([torch.arange(num_global), *(torch.arange(p.start, p.stop) for p in places[:j])])
                product = given[i][..., here].mT @ regressions[i]
                own[parent] = own[parent].index_add(-3, rows, product[..., here])
                if len(above):
                    given[parent] = given[parent].index_add(-3, rows, product[..., above])
        return Conditionals(self.levels, num_global, tuple(own), tuple(regressions)), added

    @property
    def num_global(self) -> int:
        """The number of global elements that are a part of the matrix."""
        return self.given[0].shape[-1] - sum(self.own[parent].shape[-1] for parent in self.levels[0].parents)

    def _places_of_parents(self, i: int) -> list[slice]:
        return places_of_parents(self.levels, i, self.num_global)


@dataclass(frozen=True, eq=False)
class Conditionals:
    """The conditional laws of rows given the levels above.

    Args:
        levels: the levels.
        num_global: the number of global elements that are a part of the matrix.
        precisions: for each level ``(..., R, d, d)``.
        regressions: for each level its linear dependence on the elements above, ``(..., R, d, p)``.
    """

    levels: tuple[ArrowLevel, ...]
    num_global: int
    precisions: tuple[Tensor, ...]
    regressions: tuple[Tensor, ...]

    @property
    def log_det(self) -> Tensor:
        """The log-determinant of the part of the matrix without global elements, ``(...)``."""
        return sum((_log_det(precision).sum(-1) for precision in self.precisions), torch.zeros(()))

    def solved(self, vectors: Tensor) -> Tensor:
        """Solve for local elements: vectors ``(..., D)``, of which the global elements count as zero and stay zero."""
        parts = [vectors[..., level.places] for level in self.levels]
        for i in reversed(range(len(parts))):
            places = places_of_parents(self.levels, i, self.num_global)
            for (parent, rows), here in zip(self._parents(i), places, strict=True):
                moved = (self.regressions[i][..., here].mT @ parts[i][..., None])[..., 0]
                parts[parent] = parts[parent].index_add(-2, rows, moved)
        result = torch.zeros_like(vectors)
        for i, level in enumerate(self.levels):
            parts[i] = _solved(self.precisions[i], parts[i][..., None])[..., 0]
            places = places_of_parents(self.levels, i, self.num_global)
            for (parent, rows), here in zip(self._parents(i), places, strict=True):
                above = parts[parent][..., rows, :, None]
                parts[i] = parts[i] + (self.regressions[i][..., here] @ above)[..., 0]
            result[..., level.places.flatten()] = parts[i].flatten(-2)
        return result

    def _parents(self, i: int) -> list[tuple[int, Tensor]]:
        return list(zip(self.levels[i].parents, self.levels[i].rows, strict=True))


def places_of_parents(levels: Sequence[ArrowLevel], i: int, num_global: int) -> list[slice]:
    """Where the elements of each enclosing row stand among those of all levels above."""
    found, start = [], num_global
    for parent in levels[i].parents:
        stop = start + levels[parent].places.shape[1]
        found.append(slice(start, stop))
        start = stop
    return found


def positive(precision: Tensor) -> Tensor:
    """Make blocks ``(..., d, d)`` positive definite by the absolute values of their eigenvalues, and a least one."""
    if precision.shape[-1] == 1:
        return precision.abs().clamp(min=torch.finfo(precision.dtype).tiny)
    # Where a block is not finite, there is nothing to go by.
    is_finite = precision.isfinite().all(-1).all(-1)[..., None, None]
    precision = torch.where(is_finite, precision, torch.eye(precision.shape[-1]).to(precision))
    is_bad = torch.linalg.cholesky_ex(precision).info != 0
    if not bool(is_bad.any()):
        return precision
    values, axes = torch.linalg.eigh((precision[is_bad] + precision[is_bad].mT) / 2)
    values = values.abs()
    values = torch.maximum(values, LEAST_EIGENVALUE * values.amax(-1, keepdim=True)).clamp(min=TINY)
    return precision.index_put((is_bad,), (axes * values[..., None, :]) @ axes.mT)


def _solved(matrices: Tensor, right: Tensor) -> Tensor:
    return right / matrices if matrices.shape[-1] == 1 else torch.linalg.solve_ex(matrices, right).result


def _log_det(matrices: Tensor) -> Tensor:
    return matrices[..., 0, 0].abs().log() if matrices.shape[-1] == 1 else torch.linalg.slogdet(matrices)[1]
