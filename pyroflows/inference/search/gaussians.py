"""Gaussian approximations of a log-density, and the variational steps that raise their ELBO."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflows.fitting.estimators import filled
from pyroflows.guides.centering import Centering
from pyroflows.inference.search.density import Density, antithetic

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
        centering: the layer that maps its vectors to those of the model; None where they are the same.
    """

    loc: Tensor
    scale_tril: Tensor
    elbo: float
    centering: Centering | None = None


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
        """The larger of two estimates of the log mass of its mode, in nats: its ELBO, and its log mean weight."""
        return max(self.elbo, self.log_evidence)


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
    noise = antithetic(num_draws + -num_draws % density.num_rows, loc)
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


def as_gaussian(q: Approximation, like: Tensor, centering: Centering | None = None) -> GaussianApproximation:
    """Give a Gaussian a triangular root, the dtype of another tensor, and the layer that follows it."""
    # J^T = Q R gives J J^T = R^T R without squaring the condition number.
    upper = torch.linalg.qr(q.root.mT).R
    return GaussianApproximation(q.loc.to(like), (upper.mT * upper.diagonal().sign()).to(like), q.elbo, centering)
