"""Tell whether data are far from all that was simulated, where an amortised posterior extrapolates."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.transforms.wild import center_and_spread

# Data are far out if their distance is larger by this factor than that of all simulations.
FAR = 1.5
# The covariance of fewer simulations than so many per entry says too little about other data.
MIN_ROWS_PER_COLUMN = 10
# Entries are clipped at this many robust standard deviations, so that heavy tails do not make the covariance.
CLIP = 10.0
# Directions in which simulations vary by less than this, in standard deviations of the entries, count as if they did.
MIN_SD = 1e-3


@dataclass(frozen=True, eq=False)
class SimulatedRange:
    r"""The range of simulated rows: of each entry by itself, and of all together by their Mahalanobis distance.

    An entry :math:`y_j` is far out if it is more than 1.5 times as far from the median as the farthest simulation on
    its side. A row is far out if its distance :math:`|L^{-1} z|`, where z are the entries in robust units and
    :math:`L L^\top` their covariance, is more than 1.5 times that of the farthest simulation.

    Args:
        low: the smallest simulated value of each entry, ``(C,)``.
        median: their medians.
        high: the largest ones.
        spread: their robust standard deviations, positive.
        root: L, lower triangular ``(C, C)``; None where there are too few simulations to know it.
        max_distance: the largest distance of a simulation.

    Example:
        >>> y = torch.randn(1000, 1)
        >>> found = SimulatedRange.of(torch.cat([y, y + 0.1 * torch.randn(1000, 1)], 1))
        >>> found.far_out(torch.tensor([[1.0, 1.0], [1.0, -1.0], [9.0, 9.0]])).tolist()
        [False, True, True]
    """

    low: Tensor
    median: Tensor
    high: Tensor
    spread: Tensor
    root: Tensor | None
    max_distance: float

    @classmethod
    def of(cls, rows: Tensor) -> "SimulatedRange":
        """Take the range of simulated rows ``(n, C)``."""
        rows = rows.detach().cpu().double()
        median, spread = center_and_spread(rows)
        deviation = rows.std(0)
        spread = torch.where(spread > 0, spread, torch.where(deviation > 0, deviation, 1.0))
        found = cls(rows.amin(0), median, rows.amax(0), spread, None, 0.0)
        if len(rows) < MIN_ROWS_PER_COLUMN * rows.shape[1]:
            return found
        units = found._units(rows)
        covariance = units.T @ units / len(units) + MIN_SD**2 * torch.eye(rows.shape[1]).double()
        root = torch.linalg.cholesky(covariance)
        distance = torch.linalg.solve_triangular(root, units.T, upper=False).norm(dim=0).max().item()
        return cls(found.low, median, found.high, spread, root, distance)

    def _units(self, rows: Tensor) -> Tensor:
        return ((rows - self.median) / self.spread).clamp(-CLIP, CLIP)

    def far_entries(self, rows: Tensor) -> Tensor:
        """Whether an entry is far out, booleans ``(n, C)`` for rows ``(n, C)``."""
        rows = rows.detach().cpu().double()
        farthest = torch.where(rows < self.median, self.median - self.low, self.high - self.median)
        rounding = 1e-5 * self.median.abs()
        return (rows - self.median).abs() > FAR * farthest + rounding

    def far_out(self, rows: Tensor) -> Tensor:
        """Whether a row is far out, booleans ``(n,)`` for rows ``(n, C)``."""
        is_far = self.far_entries(rows).any(-1)
        if self.root is None:
            return is_far
        units = self._units(rows.detach().cpu().double())
        distance = torch.linalg.solve_triangular(self.root, units.T, upper=False).norm(dim=0)
        return is_far | (distance > FAR * self.max_distance)
