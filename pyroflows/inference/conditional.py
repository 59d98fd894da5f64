"""Conditional draws of any flow by importance sampling, for columns whose conditional law has no closed form."""

import math
from collections.abc import Sequence

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.arrays import ArrayLike, as_tensor, floating_tensor
from pyroflows.constraints import of_columns
from pyroflows.errors import OptionError, ShapeError
from pyroflows.flows import Flow, FlowDistribution
from pyroflows.flows.discrete.refusal import require_real
from pyroflows.flows.subvector import checked_columns, require_possible
from pyroflows.flows.union import Union
from pyroflows.inference.weights import WeightedDraws, Weights
from pyroflows.interruption import keeping
from pyroflows.options import checked_int, kind
from pyroflows.randomness import seeded

# Draws of the flow, from which the first proposal is built.
NUM_PILOTS = 20_000
# Kernels of a proposal, and the number of proposals, each of which is built from the weighted draws of the one before.
NUM_KERNELS = 500
NUM_ROUNDS = 3
# Share of the wide component that keeps the weights bounded where the kernels are thin.
WIDE_SHARE = 0.1
WIDENING = 2.0
DF = 5.0


@torch.no_grad()
def sample_conditional(
    flow: Flow,
    given: ArrayLike,
    columns: Sequence[int],
    context: ArrayLike | None = None,
    num_samples: int = 4000,
    seed: int | None = None,
) -> WeightedDraws:
    r"""Draw the columns A that are not given from :math:`q(x_A \mid x_B)`, for any flow and any given columns B.

    Draws of a proposal are weighted by :math:`q(x_A, x_B) / r(x_A)`. The proposal r is a mixture of Student-t kernels.
    The first is made of draws of the flow near :math:`x_B`, moved along the regression of A on B, and each of the next
    two of the weighted draws of the one before (population Monte Carlo, Cappé et al. 2004,
    doi:10.1198/106186004X12803). The effective sample size says how good the draws are; it falls with the number of
    columns that are not given. If the flow has the law in closed form, :meth:`pyroflows.Flow.conditional` draws
    exactly.

    Args:
        flow: the flow of x, whose events are vectors.
        given: the values ``(k,)`` of the given columns.
        columns: the k given columns, in the order of the values.
        context: one context ``(*context_shape)``, if the flow takes one.
        num_samples: number of draws, at least 100.
        seed: makes the draws reproducible and leaves the global generator as it was; None to draw from the global one.

    Returns:
        Draws ``x`` ``(num_samples, dim)`` with the given columns in place, their Pareto-smoothed weights, k-hat, the
        effective sample size, and as ``log_evidence`` the marginal log-density :math:`\log q(x_B)` in nats.

    Raises:
        ShapeError: if the number of values is not that of the columns, or they are several rows.
        OptionError: if a column does not exist or is given twice, no column is left, ``num_samples`` is too small, or
            the support of a mixture consists of separate parts.
        DataError: if a given value is not finite or outside of the support.
        FitInterrupted: if the call is interrupted, such as by Ctrl-C; its ``result`` holds the weighted draws of the
            latest proposal that was complete, and is None before there was one.

    Example:
        >>> flow = pf.flows.Planar(3)
        >>> weighted = sample_conditional(flow, torch.tensor([1.0]), columns=[1], seed=0)
        >>> weighted.resample(5)["x"][:, 1]
        tensor([1., 1., 1., 1., 1.])
        >>> weighted.ess > 1000, abs(weighted.log_evidence + 1.419) < 4 * weighted.log_evidence_se
        (True, True)
    """
    if not isinstance(flow, Flow) or len(flow.event_shape) > 1:
        raise OptionError(f"sample_conditional needs a pyroflows.Flow of vectors, got {kind(flow)}")
    require_real(
        flow, "sample_conditional", "where the support is small, weigh flow().enumerate_support() by flow().log_prob"
    )
    columns = checked_columns(columns, flow.dim)
    law, given = flow(context), as_tensor("given", given, floating_tensor(flow))
    _check(law, given, columns, num_samples)
    target = _Target(law, given, columns, [j for j in range(flow.dim) if j not in columns])
    latest: WeightedDraws | None = None
    with seeded(seed), keeping("sample_conditional", lambda _: latest, "the draws of a first proposal"):
        kernels = target.first_kernels()
        for _ in range(NUM_ROUNDS - 1):
            y, weights = _weighted(target, kernels, max(num_samples, 4 * NUM_KERNELS))
            latest = WeightedDraws({"x": target.rows(y)}, weights)
            kernels = _Kernels(y, weights.normalized.to(y))
        y, weights = _weighted(target, kernels, num_samples)
    return WeightedDraws({"x": target.rows(y)}, weights)


class _Target:
    """The law of the columns that are not given, in unbounded coordinates y, up to its constant.

    Args:
        law: the law of x.
        given: the values of the given columns.
        columns: the given columns.
        rest: the other ones.
    """

    def __init__(self, law: FlowDistribution, given: Tensor, columns: list[int], rest: list[int]) -> None:
        self._law, self._given, self._columns, self._rest = law, given, columns, rest
        self._onto_given, self._onto_rest = (biject_to(of_columns(law.support, part)) for part in (columns, rest))

    def rows(self, y: Tensor) -> Tensor:
        """Return the rows x ``(S, dim)`` at points ``(S, d)``."""
        x = self._given.new_empty(len(y), *self._law.event_shape)
        x[:, self._columns] = self._given
        x[:, self._rest] = self._onto_rest(y.to(x))
        return x

    def log_prob(self, y: Tensor) -> Tensor:
        """Return the log-densities ``(S,)`` of points ``(S, d)``, up to a constant."""
        x = self.rows(y)
        ladj = self._onto_rest.log_abs_det_jacobian(y.to(x), x[:, self._rest])
        # A bijection of scalars gives one number for each of them.
        return self._law.log_prob(x) + (ladj.sum(-1) if ladj.dim() > 1 else ladj)

    def first_kernels(self) -> "_Kernels":
        """Return kernels about draws of the flow, weighted by their distance to the given values."""
        x = self._law.sample((NUM_PILOTS,))
        near = self._onto_given.inv(x[:, self._columns]).double()
        y = self._onto_rest.inv(x[:, self._rest]).double()
        target = self._onto_given.inv(self._given).double()
        is_finite = near.isfinite().all(1) & y.isfinite().all(1)
        near, y = near[is_finite], y[is_finite]
        factor = torch.linalg.cholesky(_covariance(near))
        away = torch.linalg.solve_triangular(factor, (target - near).mT, upper=False).mT
        distance = away.square().sum(1)
        # The kernel is as wide as the distance of the nearest two per cent.
        width = distance.kthvalue(1 + len(distance) // 50).values
        weights = torch.softmax(-0.5 * distance / width, 0)
        mean, mean_near = weights @ y, weights @ near
        local = weights[:, None] * (near - mean_near)
        slope = torch.linalg.lstsq(local.mT @ (near - mean_near) + 1e-9 * _covariance(near), local.mT @ (y - mean))
        return _Kernels(y + (target - near) @ slope.solution, weights)


class _Kernels:
    r"""A mixture of Student-t kernels of one shape about centres, and of a wide one about their mean.

    In the coordinates :math:`u = W^{-1}(y - m)`, in which the points have mean zero and unit covariance, the kernels
    are round.

    Args:
        points: ``(S, d)``.
        weights: their weights ``(S,)``, which sum to one.
    """

    def __init__(self, points: Tensor, weights: Tensor) -> None:
        self._mean = weights @ points
        self._factor = torch.linalg.cholesky(_covariance(points, weights))
        chosen = torch.multinomial(weights, NUM_KERNELS, replacement=True)
        self._centers = self._whitened(points[chosen])
        self._dim = points.shape[1]
        # This is Silverman's rule for as many points as the weights are worth.
        size = min(NUM_KERNELS, 1 / weights.square().sum().item())
        self._width = (4 / ((self._dim + 2) * size)) ** (1 / (self._dim + 4))

    def sample(self, count: int) -> Tensor:
        """Return draws ``(count, d)``."""
        centers = self._centers[torch.randint(NUM_KERNELS, (count,))]
        is_wide = (torch.rand(count, 1) < WIDE_SHARE).to(centers.device)
        # Student-t noise of several dimensions is normal noise with one common scale.
        scale = (DF / dist.Chi2(DF).sample((count, 1))).sqrt()
        noise = (scale * torch.randn(count, self._dim)).to(centers)
        u = torch.where(is_wide, WIDENING * noise, centers + self._width * noise)
        return self._mean + u @ self._factor.mT

    def log_prob(self, y: Tensor) -> Tensor:
        """Return the log-densities ``(S,)`` of points ``(S, d)``."""
        u = self._whitened(y)
        kernels = self._round(torch.cdist(u, self._centers).square(), self._width).logsumexp(1) - math.log(NUM_KERNELS)
        wide = self._round(u.square().sum(1), WIDENING)
        mixed = torch.logaddexp(math.log1p(-WIDE_SHARE) + kernels, math.log(WIDE_SHARE) + wide)
        return mixed - self._factor.diagonal().log().sum()

    def _whitened(self, y: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self._factor, (y - self._mean).mT, upper=False).mT

    def _round(self, squared_distance: Tensor, scale: float) -> Tensor:
        """Return the log-density of a round Student-t law in d dimensions."""
        half = (DF + self._dim) / 2
        constant = math.lgamma(half) - math.lgamma(DF / 2) - self._dim * (math.log(DF * math.pi) / 2 + math.log(scale))
        return constant - half * torch.log1p(squared_distance / (DF * scale**2))


def _weighted(target: _Target, kernels: _Kernels, count: int) -> tuple[Tensor, Weights]:
    y = kernels.sample(count)
    return y, Weights.smoothed(target.log_prob(y) - kernels.log_prob(y))


def _covariance(points: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the covariance ``(d, d)`` of points, with a little on its diagonal, so that it has a Cholesky factor."""
    covariance = torch.atleast_2d(torch.cov(points.mT, correction=0, aweights=weights))
    return covariance + torch.diag(1e-9 * covariance.diagonal() + torch.finfo(points.dtype).tiny)


def _check(law: FlowDistribution, given: Tensor, columns: list[int], num_samples: int) -> None:
    if law.batch_shape or given.shape != (len(columns),):
        raise ShapeError(
            "sample_conditional takes one row at a time: one value for each given column, and one context if the flow "
            f"takes one, but got values of shape {tuple(given.shape)} for columns {columns}, and batch shape "
            f"{tuple(law.batch_shape)}"
        )
    if isinstance(law.support, Union):
        raise OptionError(
            f"sample_conditional needs a support onto which there is a bijection, but that of this mixture is "
            f"{law.support}: draw from its components"
        )
    if len(columns) == law.event_shape[0]:
        raise OptionError("all columns are given, so that there is nothing to draw")
    checked_int("num_samples", num_samples, least=100)
    require_possible(given, law.support, columns)
