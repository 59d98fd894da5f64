"""The climb to the modes of a log-density by BFGS, from several starts at once."""

import math

import torch
from torch import Tensor

from pyroflows.inference.search.density import Density

# The Gaussians of the search need only be near enough for variational steps.
GAIN, NUM_STALLS, SHORTEST = 1e-3, 5, 1e-7
# With a given root of the inverse Hessian: step lengths that are tried, and the longest first step in its standard
# deviations, over the root of the dimension.
FEW_LENGTHS = (8.0, 1.0)
MAX_FIRST_STEP = 3.0


class Search:
    """BFGS from all starts at once; one call of the density tries several step lengths of every start.

    Args:
        density: the log-density.
        starts: vectors ``(S, D)`` in float64.
        root: a square root of the inverse Hessian from which all starts learn theirs, ``(D, D)``; None for a multiple
            of the identity.

    Attributes:
        loc: where the starts have come to, ``(S, D)``, with ``value`` and ``grad`` of the log-density there.
        root: square roots of their inverse Hessians, ``(S, D, D)``.
        active: which starts go on, ``(S,)``.
    """

    def __init__(self, density: Density, starts: Tensor, root: Tensor | None = None) -> None:
        num_starts, dim = starts.shape
        self.density = density
        self.loc = starts
        self.value, self.grad = density(starts)
        self.active = self.value.isfinite()
        if root is None:
            self.lengths = 2.0 ** (2 - torch.arange(density.num_rows // num_starts)).to(starts)
        else:
            self.lengths = torch.tensor(FEW_LENGTHS).to(starts)
        self.root = starts.new_zeros(num_starts, dim, dim)
        self.reach, self.stalls = starts.new_zeros(2, num_starts)
        self.unscaled = torch.ones_like(self.active)
        self._restart(self.active)
        if root is not None:
            self.root, self.unscaled = root.expand_as(self.root), ~self.unscaled
            pull = _times(self.root.mT, self.grad).norm(dim=-1)
            self.reach = (MAX_FIRST_STEP * math.sqrt(dim) / pull).clamp(max=1.0)

    def keep(self, which: Tensor) -> None:
        """Leave out all starts but these, ``(S,)``."""
        for name in ("loc", "value", "grad", "active", "root", "reach", "stalls", "unscaled"):
            setattr(self, name, getattr(self, name)[which])

    def gaussians(self) -> tuple[Tensor, Tensor]:
        """Pathfinder's Gaussians, which are exact if the log-density is quadratic."""
        return self.loc + _times(self.root, _times(self.root.mT, self.grad)), self.root

    def advance(self) -> None:
        """Make one step of each active start; if no length was good, the next call tries shorter ones."""
        pull = _times(self.root.mT, self.grad)
        slope = pull.square().sum(-1)
        lengths = self.reach[:, None] * self.lengths
        trials = self.loc[:, None] + lengths[..., None] * _times(self.root, pull)[:, None]
        values, grads = torch.full_like(lengths, -torch.inf), torch.zeros_like(trials)
        values[self.active], grads[self.active] = self.density(trials[self.active])
        # A log-density is a sum of many terms with this rounding error, on which the search would otherwise stop.
        rounding = 10 * self.density.eps * self.value.abs()
        enough = values >= (self.value - rounding)[:, None] + 1e-4 * lengths * slope[:, None]
        value, best = values.where(enough, -torch.inf).max(-1)
        moved = self.active & value.isfinite()
        rows = torch.arange(len(best), device=best.device)
        loc, grad = trials[rows, best], grads[rows, best]
        self._learn_curvature(moved, lengths[rows, best], slope, loc - self.loc, self.grad - grad)
        stalled = moved & (value - self.value < GAIN)
        self.loc = loc.where(moved[:, None], self.loc)
        self.grad = grad.where(moved[:, None], self.grad)
        self.value = value.where(moved, self.value)
        self.reach = torch.where(moved, 1.0, self.reach * self.lengths[-1] / (2 * self.lengths[0]))
        self.stalls = torch.where(stalled, self.stalls + 1, self.stalls.where(~moved, 0.0))
        lost = self.reach < SHORTEST
        self.active = self.active & ~(lost & self.unscaled) & (self.stalls < NUM_STALLS) & (slope > GAIN**2)
        if (lost & self.active).any():
            self._restart(lost & self.active)

    def _restart(self, which: Tensor) -> None:
        """Forget the curvature, so that the next step goes along the gradient."""
        scale = self.grad.norm(dim=-1).clamp(min=1e-100).rsqrt()
        identity = torch.eye(self.loc.shape[-1]).to(self.loc)
        self.root = torch.where(which[:, None, None], scale[:, None, None] * identity, self.root)
        self.reach = torch.where(which, 1.0, self.reach)
        self.unscaled = self.unscaled | which

    def _learn_curvature(self, moved: Tensor, length: Tensor, slope: Tensor, step: Tensor, change: Tensor) -> None:
        """Update the inverse Hessian J J^T by BFGS in product form, which keeps it positive definite.

        The update is J <- (I - s v^T) J with v = y / (s.y) - B s / sqrt(s.y s.B s) (Brodlie et al. 1973), where s is
        the step, y the change of the negative gradient, and B the inverse of J J^T. B s is the step length times the
        gradient.
        """
        curvature = (step * change).sum(-1)
        # The identity from which J starts is scaled once (Nocedal and Wright 2006, eq. 6.20).
        rescaled = moved & self.unscaled & (curvature > 0)
        scale = torch.where(rescaled, curvature / _times(self.root.mT, change).square().sum(-1), 1.0)
        self.root = self.root * scale.sqrt()[:, None, None]
        self.unscaled = self.unscaled & ~rescaled
        expected_change = (length / scale)[:, None] * self.grad
        expected = length.square() * slope / scale
        # Where the curvature is negative or small, Powell's damping keeps it above a fifth of the expected one.
        damping = torch.where(curvature >= 0.2 * expected, 1.0, 0.8 * expected / (expected - curvature))
        change = expected_change + damping[:, None] * (change - expected_change)
        curvature = (step * change).sum(-1)
        v = change / curvature[:, None] - expected_change / (curvature * expected).sqrt()[:, None]
        usable = (moved & (curvature > 0) & v.isfinite().all(-1))[:, None]
        v, step = v.where(usable, 0.0), step.where(usable, 0.0)
        self.root = self.root - step[:, :, None] * _times(self.root.mT, v)[:, None]


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]
