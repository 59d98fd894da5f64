r"""Fit Gaussians to a log density at its modes, in one to three hundred evaluations.

A search for modes from several starts at once gives a first Gaussian for each, as in Pathfinder (Zhang, Carpenter,
Gelman and Vehtari 2022, arXiv:2108.03782). Variational steps then bring it to the Gaussian of the least KL divergence.
The density is evaluated by one function with a fixed number of rows, so that it has to be compiled only once.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflows.fitting.estimators import filled
from pyroflows.models.log_joint import ValueAndGrad

PLAIN_SCALE = 0.1
# The squares of larger values would come near to overflow.
LARGEST_VALUE = 1e60
# Constants of the search, whose Gaussians need only be near enough for the variational steps.
GAIN, NUM_STALLS, SHORTEST = 1e-3, 5, 1e-7
NUM_FIRST, THINNING, PATIENCE = 12, 3, 20
# With a given root of the inverse Hessian: step lengths that are tried, and the longest first step in its standard
# deviations, over the root of the dimension.
FEW_LENGTHS = (8.0, 1.0)
MAX_FIRST_STEP = 3.0
# Constants of the variational steps.
ROWS_PER_DIM = 4
MAX_STEPS = 50
FIRST_BOUND, LEAST_BOUND, LARGEST_BOUND = 4.0, 1.2, 1e4
NUM_HALF, NUM_SETTLED, NUM_SETTLED_IF_EXACT = 4, 12, 2
# Variances of the log weights: below the first the Gaussian counts as exact; above the second, another start may find a
# better one.
EXACT_VARIANCE, POOR_VARIANCE = 0.01, 0.5


@dataclass(frozen=True, eq=False)
class GaussianApproximation:
    r"""A Gaussian :math:`q = N(\mathrm{loc}, L L^\top)` that approximates a density p.

    Args:
        loc: the mean, ``(D,)``.
        scale_tril: L, lower triangular with a positive diagonal, ``(D, D)``.
        elbo: an estimate of :math:`E_q[\log p - \log q]`, in nats.
    """

    loc: Tensor
    scale_tril: Tensor
    elbo: float


def pathfinder(
    value_and_grad: ValueAndGrad, starts: Tensor, *, num_rows: int = 64, max_iterations: int = 150
) -> list[GaussianApproximation]:
    r"""Search from each start for the Gaussian :math:`q = N(m, J J^\top)` of the largest ELBO.

    From all starts at once, BFGS climbs the log density p, keeping a square root J of the inverse Hessian. Of the
    Gaussians :math:`N(u + J J^\top g, J J^\top)` at its iterates u with gradients g, and of the plain
    :math:`N(u_0, 0.1^2 I)`, that of the best ELBO is each start's first; the mode itself may be useless, as for a
    funnel. Then natural gradient steps raise its ELBO: in :math:`z = J^{-1}(u - m)`, the score's regression on draws
    of q, :math:`\nabla_z \log p \approx b - A z`, estimates :math:`b = E_q[\nabla_z \log p]` and
    :math:`A = -E_q[\nabla_z^2 \log p]`, and with a rate :math:`\rho` falling from 1 as the ELBO settles

    .. math:: P = (1 - \rho) I + \rho A, \quad m \leftarrow m + \rho J P^{-1} b, \quad J \leftarrow J P^{-1/2}

    within a trust region (Salimans and Knowles 2013, arXiv:1206.6679; Khan and Rue 2023, arXiv:2107.04562). For a
    Gaussian p one full step is exact.

    Args:
        value_and_grad: vectors ``(num_rows, D)`` in the dtype of the starts to log densities ``(num_rows,)``, up to a
            constant, and gradients ``(num_rows, D)``. Never called with another number of rows. Where one of them is
            not finite, the density is taken as zero.
        starts: ``(S, D)``, S at most ``num_rows``; they should be few, since they share the rows of a call.
        num_rows: number of vectors in one call, which are draws, or trial steps of all starts together.
        max_iterations: number of iterations of the search for modes, with at most two calls each.

    Returns:
        A Gaussian for each start with a finite density, the best ELBO first, in the dtype of the starts. A start that
        ends inside another's Gaussian shares that object, if the variance of its log weights is below 0.5.

    Raises:
        ValueError: if the starts do not fit the rows, or none has a finite density.

    Draws come from torch's global generator. Time and memory are :math:`O(S D^2)` an iteration and :math:`O(D^3)` a
    variational step, which takes ``4 D`` rows or one call.

    Example:
        >>> precision = torch.tensor([[2.0, 1.9], [1.9, 2.0]])
        >>> def value_and_grad(u):
        ...     return -0.5 * ((u @ precision) * u).sum(-1), -u @ precision
        >>> best, *_ = pathfinder(value_and_grad, torch.rand(4, 2))
        >>> torch.allclose(best.scale_tril @ best.scale_tril.T, precision.inverse(), rtol=1e-3)
        True
    """
    if starts.ndim != 2 or not 1 <= len(starts) <= num_rows:
        raise ValueError(f"starts must be (S, D) with 1 <= S <= num_rows = {num_rows}, got {tuple(starts.shape)}")
    found = approximations(Density(value_and_grad, num_rows, starts), starts, max_iterations)
    results = {id(q): as_gaussian(q, starts) for q in found}
    return [results[id(q)] for q in found]


def approximations(density: "Density", starts: Tensor, max_iterations: int = 150) -> "list[Approximation]":
    """Search as :func:`pathfinder` does; the Gaussians stay in float64, with the variances of their log weights."""
    search = Search(density, starts.double())
    if not search.active.any():
        raise ValueError("the log density or its gradient is finite at none of the starts")
    finite = search.active.nonzero()[:, 0].tolist()
    firsts = _best_on_paths(density, search, max_iterations)
    found: list[Approximation] = []
    shared = []
    for i in sorted(finite, key=lambda i: firsts[i].elbo, reverse=True):
        q = containing(search.loc[i], found) or refine(density, firsts[i], found)
        if all(q is not other for other in found):
            found.append(q)
        shared.append(q)
    return sorted(shared, key=lambda q: q.elbo, reverse=True)


@dataclass(frozen=True, eq=False)
class Approximation:
    """A Gaussian N(loc, root root^T) in float64, whose root need not be triangular.

    Args:
        loc: the mean, ``(D,)``.
        root: a square root of the covariance, ``(D, D)``.
        elbo: an estimate of its ELBO, in nats.
        log_weight_variance: the variance of its log weights; inf where it is not known.
        log_evidence: the log of its mean weight, an estimate of the log mass of its mode; -inf where it is not known.
    """

    loc: Tensor
    root: Tensor
    elbo: float
    log_weight_variance: float = math.inf
    log_evidence: float = -math.inf

    @property
    def log_mass(self) -> float:
        """The better of two lower bounds of the log mass of its mode, in nats."""
        return max(self.elbo, self.log_evidence)


class Density:
    """The log density of any number of vectors in float64; where it is not finite, it is -inf with gradient zero.

    ``num_calls`` counts the calls of ``value_and_grad``, which are what a search costs.
    """

    def __init__(self, value_and_grad: ValueAndGrad, num_rows: int, starts: Tensor) -> None:
        self.value_and_grad = value_and_grad
        self.num_calls = 0
        self.num_rows = num_rows
        self.starts = starts
        self.eps = torch.finfo(starts.dtype).eps

    def __call__(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Map vectors ``(..., D)`` to values ``(...)`` and gradients ``(..., D)``."""
        flat = vectors.reshape(-1, vectors.shape[-1])
        padding = flat[-1:].expand(-len(flat) % self.num_rows, -1)
        rows = torch.cat([flat, padding]).to(self.starts)
        parts = rows.split(self.num_rows)
        self.num_calls += len(parts)
        values, grads = zip(*[self.value_and_grad(part) for part in parts], strict=True)
        value = torch.cat(values)[: len(flat)].detach().double()
        grad = torch.cat(grads)[: len(flat)].detach().double()
        finite = (value.abs() < LARGEST_VALUE) & (grad.abs() < LARGEST_VALUE).all(-1)
        value, grad = value.where(finite, -torch.inf), grad.where(finite[:, None], 0.0)
        return value.reshape(vectors.shape[:-1]), grad.reshape(vectors.shape)

    def log_weights(self, loc: Tensor, root: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Give log p - log q at the draws that the noise ``(..., M, D)`` makes, and the gradients of log p there."""
        value, grad = self(loc[..., None, :] + noise @ root.mT)
        return value - _log_normal(noise) + torch.linalg.slogdet(root)[1][..., None], grad


class Search:
    """BFGS from all starts at once; one call of the density tries several step lengths of every start.

    Args:
        density: the log density.
        starts: vectors ``(S, D)`` in float64.
        root: a square root of the inverse Hessian from which all starts learn theirs, ``(D, D)``; None for a multiple
            of the identity.
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
        """Pathfinder's Gaussians, which are exact if the log density is quadratic."""
        return self.loc + _times(self.root, _times(self.root.mT, self.grad)), self.root

    def advance(self) -> None:
        """Make one step of each active start; if no length was good, the next call tries shorter ones."""
        pull = _times(self.root.mT, self.grad)
        slope = pull.square().sum(-1)
        lengths = self.reach[:, None] * self.lengths
        trials = self.loc[:, None] + lengths[..., None] * _times(self.root, pull)[:, None]
        values, grads = torch.full_like(lengths, -torch.inf), torch.zeros_like(trials)
        values[self.active], grads[self.active] = self.density(trials[self.active])
        # A log density is a sum of many terms with this rounding error, on which the search would otherwise stop.
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


def _best_on_paths(density: Density, search: Search, max_iterations: int) -> list[Approximation]:
    """Choose on the path of each start the Gaussian of the best ELBO, estimated from few draws."""
    num_starts, dim = search.loc.shape
    noise = _antithetic(density.num_rows // num_starts, search.loc)
    identity = torch.eye(dim).to(search.loc)
    loc, root = search.loc, PLAIN_SCALE * identity.expand(num_starts, dim, dim)
    elbo = filled(density.log_weights(loc, root, noise)[0]).mean(-1)
    last_gain = torch.zeros_like(elbo)
    for i in range(max_iterations):
        if not search.active.any():
            break
        search.advance()
        if i >= NUM_FIRST and i % THINNING and search.active.any():
            continue
        new_loc, new_root = search.gaussians()
        new_elbo = filled(density.log_weights(new_loc, new_root, noise)[0]).mean(-1)
        better = new_elbo > elbo
        elbo = new_elbo.where(better, elbo)
        loc = new_loc.where(better[:, None], loc)
        root = new_root.where(better[:, None, None], root)
        last_gain = torch.where(better, i, last_gain)
        # Towards the neck of a funnel the density grows without bound while the Gaussians get worse.
        search.active = search.active & (i - last_gain < PATIENCE)
    return [Approximation(loc[i], root[i], elbo[i].item()) for i in range(num_starts)]


class Look(NamedTuple):
    """A Gaussian with estimates from its draws: ELBO and standard error, and moments of the whitened score."""

    loc: Tensor
    root: Tensor
    elbo: float
    error: float
    log_weight_variance: float
    log_evidence: float
    mean_score: Tensor
    precision: Tensor

    def as_approximation(self) -> Approximation:
        return Approximation(self.loc, self.root, self.elbo, self.log_weight_variance, self.log_evidence)


def look(density: Density, loc: Tensor, root: Tensor) -> Look:
    """Estimate the ELBO of a Gaussian, and the regression of the whitened score on the noise."""
    dim = len(loc)
    num_draws = max(density.num_rows, ROWS_PER_DIM * dim)
    noise = _antithetic(num_draws + -num_draws % density.num_rows, loc)
    log_weights, grad = density.log_weights(loc, root, noise)
    values = filled(log_weights)
    variance = values.var(correction=0).nan_to_num(torch.inf).item()
    error = math.sqrt(variance / len(values))
    moments = _by_gradients(noise, grad @ root) if log_weights.isfinite().all() else _by_values(noise, values)
    log_evidence = torch.logsumexp(log_weights, 0).item() - math.log(len(log_weights))
    return Look(loc, root, values.mean().item(), error, variance, log_evidence, *moments)


def _by_gradients(noise: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate the mean whitened score, and the precision, by the regression of the score on the noise."""
    center, mean_score = noise.mean(0), score.mean(0)
    noise = noise - center
    # The ridge pulls towards the present precision, and matters only if there are few draws.
    ridge = 1e-6 * torch.eye(noise.shape[-1]).to(noise)
    precision = torch.linalg.solve(noise.mT @ noise + ridge, ridge - noise.mT @ score)
    precision = (precision + precision.mT) / 2
    return mean_score + precision @ center, precision


def _by_values(noise: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate the same by Stein's lemma from the log weights alone, which also works where the density is zero.

    There the gradients do not show that a Gaussian which moves over the edge loses draws.
    """
    identity = torch.eye(noise.shape[-1]).to(noise)
    deviations = (values - values.mean()).nan_to_num(0.0)[:, None] / len(values)
    return noise.mT @ deviations[:, 0], identity - noise.mT @ (deviations * noise)


def refine(density: Density, start: Approximation, found: list[Approximation]) -> Approximation:
    """Raise the ELBO by natural gradient steps, in full until it settles, then with falling rates.

    A Gaussian that was found before is returned as soon as the steps end up inside it.
    """
    now = look(density, start.loc, start.root)
    bound, num_settled = FIRST_BOUND, 0
    for _ in range(MAX_STEPS):
        if same := containing(now.loc, found):
            return same
        # If the curvature is not constant, full steps overshoot, and need not converge.
        rate = 1 / max(2, 2 + num_settled - NUM_HALF) if num_settled else 1.0
        new = look(density, *_step(now, bound, rate))
        if new.elbo < now.elbo - 3 * now.error - 0.1:
            bound = max(math.sqrt(bound), LEAST_BOUND)
            # A new estimate from other draws replaces the old one, which may have been high by chance.
            now = look(density, now.loc, now.root)
            continue
        if new.elbo < now.elbo + now.error + new.error:
            num_settled += 1
        elif not num_settled:
            bound = min(2 * bound, LARGEST_BOUND)
        now = new
        exact = now.log_weight_variance < EXACT_VARIANCE
        if num_settled >= (NUM_SETTLED_IF_EXACT if exact else NUM_SETTLED):
            break
    return now.as_approximation()


def _step(now: Look, bound: float, rate: float) -> tuple[Tensor, Tensor]:
    """Mean and root after a natural gradient step, which changes no variance by more than the factor ``bound``."""
    identity = torch.eye(len(now.loc)).to(now.loc)
    precision, axes = torch.linalg.eigh((1 - rate) * identity + rate * now.precision)
    precision = precision.clamp(1 / bound, bound)
    shift = rate * axes @ (axes.mT @ now.mean_score / precision)
    shift = shift * (math.sqrt(bound) / shift.norm()).clamp(max=1.0)
    return now.loc + now.root @ shift, now.root @ (axes / precision.sqrt())


def containing(vector: Tensor, found: list[Approximation]) -> Approximation | None:
    """The first good Gaussian that contains a vector.

    A Gaussian is good if the variance of its log weights is small.
    """
    far = reach(len(vector))
    for q in found:
        fits = q.log_weight_variance < POOR_VARIANCE
        if fits and torch.linalg.solve(q.root, vector - q.loc).square().sum() < far:
            return q
    return None


def reach(dim: int) -> float:
    """The squared Mahalanobis distance within which a Gaussian contains a vector, five sd above the mean over draws."""
    return dim + 5 * math.sqrt(2 * dim)


def as_gaussian(q: Approximation, like: Tensor) -> GaussianApproximation:
    """Give a Gaussian a triangular root, and the dtype of another tensor."""
    # J^T = Q R gives J J^T = R^T R without squaring the condition number.
    upper = torch.linalg.qr(q.root.mT).R
    return GaussianApproximation(q.loc.to(like), (upper.mT * upper.diagonal().sign()).to(like), q.elbo)


def _antithetic(num_draws: int, like: Tensor) -> Tensor:
    """Standard normal draws and their negatives, ``(num_draws, D)`` in float64."""
    noise = torch.randn((num_draws + 1) // 2, like.shape[-1], dtype=torch.float64, device=like.device)
    return torch.cat([noise, -noise])[:num_draws]


def _log_normal(noise: Tensor) -> Tensor:
    return -0.5 * noise.square().sum(-1) - 0.5 * noise.shape[-1] * math.log(2 * math.pi)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]
