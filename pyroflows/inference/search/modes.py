"""The separate modes of a log-density, sought from batches of starts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.inference.search.bfgs import Search
from pyroflows.inference.search.density import Density
from pyroflows.inference.search.gaussians import POOR_VARIANCE, Approximation, look, reach, refine
from pyroflows.inference.search.pathfinder import approximations
from pyroflows.inference.search.symmetries import Symmetry

# Gaussians whose means are nearer than this many standard deviations of either describe the same mode.
SEPARATION = 4.0
# Between two modes the log joint falls by at least this many nats; where it falls less, a single mode is bent, or a
# funnel. On a path that is bent it falls by at least the second.
MIN_DIP, MIN_BENT_DIP = 3.0, 1.0
# A Gaussian whose mass lies this many nats below the best stands for less than a hundredth of it.
MAX_DEFICIT = math.log(100.0)
# Mass by the curvature at an optimum is uncertain by this many nats, and by half a nat a dimension.
LAPLACE_ERROR = 5.0
# A further start climbs for at most this many steps, and for fewer if it is still far below all modes after the first
# of them. Lines to the nearest known modes are looked at in a number of points.
MIN_CLIMB, MAX_CLIMB = 16, 40
NUM_ON_LINE, NUM_NEAREST = 16, 4
# A path between two modes has so many nodes, with so many points to each, and bends at most so many times.
NUM_NODES, PER_NODE, MAX_BENDS = 16, 4, 30
# Images of modes under symmetries are followed up to this number of modes.
MAX_IMAGES = 64


@dataclass(eq=False)
class Mode:
    """A mode of a log-density.

    Args:
        gaussian: the Gaussian there.
        orbit: a number that all modes share which symmetries map to one another.
        num_hits: the number of starts that ended in it.
    """

    gaussian: Approximation
    orbit: int
    num_hits: int = 0


class ModeSearch:
    """The modes that starts have found so far, and in how many starts.

    Args:
        density: the log-density.
        starts: the first starts, ``(S, D)``, from each of which the best Gaussian on its path is sought; further ones
            are given to :meth:`explore`.

    Attributes:
        modes: all modes, those of next to no mass included.
        elbos: the ELBO of the Gaussian in which each start ended, in nats.

    Raises:
        ValueError: if the density is finite at none of the starts.

    Example:
        >>> def value_and_grad(u):
        ...     return -0.5 * (u.abs() - 9).square().sum(-1), -(u.abs() - 9) * u.sign()
        >>> starts = 10 * torch.rand(8, 1) - 5
        >>> search = ModeSearch(Density(value_and_grad, 64, starts), starts)
        >>> search.explore(10 * torch.rand(16, 1) - 5)
        >>> sorted(round(mode.gaussian.loc.item()) for mode in search.modes)
        [-9, 9]
    """

    def __init__(self, density: Density, starts: Tensor) -> None:
        self.density = density
        self.modes: list[Mode] = []
        self.elbos: list[float] = []
        self.num_starts = len(starts)
        self._num_closed = 0
        for gaussian in approximations(density, starts):
            self._note(gaussian)
        self.first_cost = density.num_calls
        self._cost_of_modes = 0

    @property
    def kept(self) -> list[Mode]:
        """The modes that are not negligible, the best ELBO first."""
        modes = sorted(self.modes, key=lambda mode: mode.gaussian.elbo, reverse=True)
        return [mode for mode in modes if mode is modes[0] or self._has_mass(mode.gaussian.log_mass)]

    @property
    def new_mode_probability(self) -> float:
        r"""An estimate of the probability that a further start ends in a mode that is not known.

        By Good and Turing it is the share of the starts whose mode no other start has found. A start more, which found
        a new mode, is counted in: :math:`(n_1 + 1) / (n + 1)`, for :math:`n_1` modes that were found once among n
        starts, does not vanish while n is small (Good 1953, Biometrika 40). Modes that symmetries map to one another
        count as one, and starts that ended in modes of next to no mass do not count.
        """
        once, total = self._hits
        return (once + 1) / (total + 1)

    def num_wanted(self, probability: float) -> float:
        """About the number of further starts that bring the probability below a number, if they find no new mode.

        Some of them will not count; their share is taken to be that of the starts so far, and a tenth.
        """
        once, total = self._hits
        return ((once + 1) / probability - total) * (1.1 * self.num_starts / max(total, 1))

    @property
    def _hits(self) -> tuple[int, int]:
        """The number of modes, up to symmetries, that one start found; and of all starts that found a mode."""
        hits: dict[int, int] = {}
        for mode in self.kept:
            hits[mode.orbit] = hits.get(mode.orbit, 0) + mode.num_hits
        return list(hits.values()).count(1), sum(hits.values())

    @property
    def relative_cost(self) -> float:
        """The cost of the further starts as a multiple of that of the first; the fits of new modes do not count."""
        return (self.density.num_calls - self.first_cost - self._cost_of_modes) / self.first_cost

    def explore(self, starts: Tensor) -> None:
        """Climb from further starts, until each is inside a known mode or at an optimum, where a Gaussian is fitted.

        Args:
            starts: ``(S, D)``, S at most the number of rows of the density.
        """
        self.num_starts += len(starts)
        search = Search(self.density, starts.double(), self.kept[0].gaussian.root)
        search.keep(search.active)
        seen = torch.zeros(len(search.loc), len(self.modes), dtype=torch.bool, device=search.loc.device)
        for num_steps in range(MAX_CLIMB):
            goes_on = ~self._count_inside(search, seen)
            if num_steps >= MIN_CLIMB:
                goes_on &= ~search.active | (_masses(search) >= self._least_mass)
            search.keep(goes_on)
            seen = seen[goes_on]
            if not search.active.any():
                break
            search.advance()
        loc, root = search.gaussians()
        masses = _masses(search)
        for i in masses.argsort(descending=True).tolist():
            self._settle(search.loc[i], Approximation(loc[i], root[i], masses[i].item()))

    def close(self, symmetries: Sequence[Symmetry]) -> None:
        """Add the images of all modes under symmetries, and of these in turn, up to a number."""
        while self._num_closed < len(self.modes) < MAX_IMAGES:
            mode = self.modes[self._num_closed]
            self._num_closed += 1
            if self._has_mass(mode.gaussian.log_mass):
                for symmetry in symmetries:
                    if len(self.modes) < MAX_IMAGES:
                        self._add_image(mode, symmetry)

    def _add_image(self, mode: Mode, symmetry: Symmetry) -> None:
        q = mode.gaussian
        loc = symmetry(q.loc[None])[0]
        image = self._at(loc)
        if image is None:
            root = symmetry.root_of_image(q.loc, q.root)
            gaussian = look(self.density, loc, root).as_approximation()
            if not gaussian.elbo > q.elbo - 0.1 - 3 * math.sqrt(2 * q.log_weight_variance / self.density.num_rows):
                gaussian = refine(self.density, gaussian, [other.gaussian for other in self.modes])
            image = self._same(gaussian)
            if image is None:
                self.modes.append(Mode(gaussian, mode.orbit))
        if image is not None and image.orbit != mode.orbit:
            joined = image.orbit
            for other in self.modes:
                other.orbit = mode.orbit if other.orbit == joined else other.orbit

    def _count_inside(self, search: Search, seen: Tensor) -> Tensor:
        """Count the climbs that have come inside a known mode, without a valley between, and say which these are.

        Args:
            search: the climbs.
            seen: whether a climb has been inside a mode, ``(S, M)``; updated, since a second look would say the same.
        """
        inside = (self._distances(search.loc) < reach(search.loc.shape[1])) & search.active[:, None] & ~seen
        seen |= inside
        pairs: list[tuple[int, int]] = [(i, m) for i, m in inside.nonzero().tolist()]
        # A Gaussian that fits badly may cover a valley.
        poor = [(i, m) for i, m in pairs if self.modes[m].gaussian.log_weight_variance >= POOR_VARIANCE]
        valleys = {pair for pair, dip in zip(poor, self._dips(search.loc, poor), strict=True) if dip > MIN_DIP}
        homes = {i: self.modes[m] for i, m in pairs if (i, m) not in valleys}
        for mode in homes.values():
            self._count(mode)
        is_home = torch.zeros_like(search.active)
        is_home[list(homes)] = True
        return is_home

    def _settle(self, optimum: Tensor, at_optimum: Approximation) -> None:
        """Attribute an optimum to the known mode without a valley between, or fit a Gaussian there."""
        if at_optimum.elbo < self._least_mass:
            self.elbos.append(at_optimum.elbo)
            return
        nearest = self._distances(optimum[None])[0].argsort()[:NUM_NEAREST].tolist()
        dips = self._dips(optimum[None], [(0, m) for m in nearest])
        if min(dips) <= MIN_DIP:
            self._count(self.modes[nearest[dips.index(min(dips))]])
            return
        before, num_modes = self.density.num_calls, len(self.modes)
        self._note(refine(self.density, at_optimum, [mode.gaussian for mode in self.modes]))
        if len(self.modes) > num_modes and self._has_mass(self.modes[-1].gaussian.log_mass):
            self._cost_of_modes += self.density.num_calls - before

    def _note(self, gaussian: Approximation) -> None:
        """Count the Gaussian in which a start ended, as a new mode if it is separate from all known ones."""
        mode = self._same(gaussian)
        if mode is None:
            mode = Mode(gaussian, orbit=len(self.modes))
            self.modes.append(mode)
        elif gaussian.elbo > mode.gaussian.elbo:
            mode.gaussian = gaussian
        self._count(mode)

    def _count(self, mode: Mode) -> None:
        mode.num_hits += 1
        self.elbos.append(mode.gaussian.elbo)

    def _same(self, gaussian: Approximation) -> Mode | None:
        """The known mode that a Gaussian describes."""
        for mode in self.modes:
            if gaussian is mode.gaussian:
                return mode
        if not self.modes:
            return None
        nearest = self._distances(gaussian.loc[None])[0].argsort()[:NUM_NEAREST].tolist()
        for mode in (self.modes[m] for m in nearest):
            if not is_separate(gaussian, mode.gaussian, self.density):
                return mode
        return None

    def _at(self, loc: Tensor) -> Mode | None:
        """The known mode whose mean is near a vector, the image of another mean."""
        distance, m = self._distances(loc[None])[0].min(0)
        return self.modes[int(m)] if distance < 1 else None

    def _has_mass(self, log_mass: float) -> bool:
        return log_mass > self._best_bound - MAX_DEFICIT

    @property
    def _least_mass(self) -> float:
        """The mass by the curvature at an optimum below which its Gaussian is certainly negligible."""
        return self._best_bound - MAX_DEFICIT - LAPLACE_ERROR - 0.5 * len(self.modes[0].gaussian.loc)

    @property
    def _best_bound(self) -> float:
        """The best ELBO, a bound of the mass of a mode, while a few large weights can make any mode look heavy."""
        return max(mode.gaussian.elbo for mode in self.modes)

    def _distances(self, vectors: Tensor) -> Tensor:
        """Squared Mahalanobis distances ``(S, M)`` of vectors from the means."""
        parts = [torch.linalg.solve(m.gaussian.root, (vectors - m.gaussian.loc).mT) for m in self.modes]
        return torch.stack([part.square().sum(0) for part in parts], -1)

    def _dips(self, vectors: Tensor, pairs: Sequence[tuple[int, int]]) -> list[float]:
        if not pairs:
            return []
        ends = torch.stack([self.modes[m].gaussian.loc for _, m in pairs])
        return dips(self.density, vectors[[i for i, _ in pairs]], ends, NUM_ON_LINE).tolist()


def is_separate(a: Approximation, b: Approximation, density: Density) -> bool:
    """Whether two Gaussians describe separate modes: they lie apart, with a valley of the log-density between them.

    A bent path must be nearly free of valleys to connect them, since a flow that is trained at one of them has to find
    the other along it.
    """
    gap = a.loc - b.loc
    # In standard deviations of the wider Gaussian along the gap.
    distance = min(torch.linalg.solve(q.root, gap).norm().item() for q in (a, b))
    if distance <= SEPARATION:
        return False
    straight = dips(density, a.loc[None], b.loc[None], density.num_rows).item()
    return straight > MIN_DIP and valley(a, b, density) > MIN_BENT_DIP


def valley(a: Approximation, b: Approximation, density: Density) -> float:
    """How far the log-density falls below its lower end on a path between the means of two Gaussians.

    The first path is straight. As long as that helps, its nodes climb, across the line between the means and by at most
    a standard deviation of the first Gaussian at once, so that the path follows a ridge that is bent.
    """
    line = torch.linalg.solve(a.root, b.loc - a.loc)
    along = line / line.norm()
    nodes = a.loc + torch.linspace(0, 1, NUM_NODES).to(line)[:, None] * (b.loc - a.loc)
    between = torch.arange(PER_NODE).to(line)[:, None] / PER_NODE
    best = math.inf
    for _ in range(MAX_BENDS):
        inner = nodes[:-1, None] + between * (nodes[1:] - nodes[:-1])[:, None]
        values, gradients = density(torch.cat([inner.flatten(0, 1), nodes[-1:]]))
        dip = (torch.minimum(values[0], values[-1]) - values.min()).nan_to_num(nan=math.inf).item()
        if dip <= MIN_BENT_DIP or not dip < 0.9 * best:
            return min(dip, best)
        best = dip
        climb = gradients[::PER_NODE] @ a.root
        climb = climb - (climb @ along)[:, None] * along
        climb[[0, -1]] = 0.0
        nodes = nodes + (climb / climb.norm(dim=-1, keepdim=True).clamp(min=1.0)) @ a.root.mT
    return best


def dips(density: Density, a: Tensor, b: Tensor, num_points: int) -> Tensor:
    """How far the log-density falls on lines ``(R, D)`` to ``(R, D)`` below its lower end, ``(R,)``."""
    weight = torch.linspace(0, 1, num_points).to(a)[:, None]
    values, _ = density(a[:, None] + weight * (b - a)[:, None])
    return (torch.minimum(values[:, 0], values[:, -1]) - values.amin(1)).nan_to_num(nan=math.inf)


def _masses(search: Search) -> Tensor:
    """The log mass at the present place of each climb, if it were an optimum, by the curvature learned so far."""
    dim = search.loc.shape[1]
    return search.value + torch.linalg.slogdet(search.root)[1] + 0.5 * dim * math.log(2 * math.pi)
