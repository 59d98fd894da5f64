"""The log-determinant of a residual layer without bias, from a random number of terms of its power series."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyroflows.compiling.eager import is_transformed, is_under_func, runs_in_python
from pyroflows.nets.lipschitz.contraction import Contraction, Linearized, transposed_times
from pyroflows.nets.products import product
from pyroflows.options import checked_int, checked_number
from pyroflows.transforms.residual.exact import Exact
from pyroflows.transforms.residual.probes import estimated, first_product, signs
from pyroflows.transforms.residual.together import value_and_estimate

# A row that goes on longer belongs to no contraction, or to one with a coefficient above 0.9999.
MAX_TERMS = 100_000


@dataclass(frozen=True)
class RussianRoulette:
    r"""An unbiased estimate of :math:`\log\det(I + J)` and of its gradient, from random probes and a random number of
    terms for each.

    Each row of a batch has its own probe v of independent signs, and its own number of terms N. With
    :math:`u_k = (J^\top)^k v`, expectations over v are

    .. math:: \log\det(I + J) = \operatorname{E} \sum_{k \ge 0} \frac{(-1)^k}{k + 1}\, u_k^\top J v, \qquad
        \nabla \log\det(I + J) = \operatorname{E}\, w^\top (\nabla J)\, v, \quad w = \sum_{k \ge 0} (-1)^k u_k

    (Chen et al. 2019, arXiv:1906.02735), where J v is computed once for both. After each product with :math:`J^\top`
    the row goes on with the probability :math:`\min(1, s / \tau)`, where s is the root mean square of the elements of
    its vector, 1 for a probe, and :math:`\tau` the threshold. A vector that survives with a probability p is divided by
    p, and stands for those that did not, so that the expectation stays. Once a quarter of the rows or less is left, up
    to four products go before each decision, which takes as long as one of them.

    **Variance.** Until s falls below :math:`\tau` the terms are those of the series. From then on a survivor has
    :math:`s = \tau` exactly, so that no weighted vector is ever longer, and a row goes on with at most the probability
    c, the norm of J. So the tail of N falls like :math:`c^N`, and the estimates are bounded by a multiple of N: they
    have moments of all orders. The usual survival with a fixed probability p weights
    the k-th vector by :math:`p^{-k}` instead, which makes the variance of the gradient infinite where eigenvalues of J
    exceed :math:`\sqrt p`, 0.71 for one half.

    In measurements the roulette added at most a sixth to the variance that gradients have from their probes. A fixed
    probability of one half, shared by the batch, with as many products, added a tenth to twice that variance for linear
    maps of norm 0.3, and twice to a thousand times that variance for trained networks.

    Each row decides for itself. One decision for a whole batch would add a variance that no mean over rows lessens, and
    would let the row with the largest Jacobian decide for the others.

    **Cost.** The expected number of products is at most :math:`\log \tau / \log c + 2 + 1 / (1 - c)`. :class:`Exact`
    needs as many as there are dimensions, all at once, and is the cheaper one where these are fewer.

    A row with NaN stays NaN, and leaves the others as they are. Where J is no contraction, the series has no sum: a row
    that would take more than 100 000 terms is NaN.

    Second derivatives, by ``create_graph=True``, are those of the determinant: those of the estimate of a gradient are
    biased. Under ``torch.func``, whose transformations cannot follow a random number of terms, the determinant takes
    the place of the estimate altogether. What records operations sees the loop as one operator.

    Args:
        threshold: :math:`\tau`, above 0: a smaller one takes more products and has a smaller variance.
        num_probes: the number of estimates for each row, of which the mean is taken.

    Raises:
        OptionError: if the threshold is not positive and finite, or there is no probe.

    Example:
        >>> layer = pf.transforms.Residual(32, log_det=RussianRoulette(num_probes=2))
        >>> layer.ladj_is_exact, layer.exact().ladj_is_exact
        (False, True)
    """

    threshold: float = 0.3
    num_probes: int = 1
    is_exact = False

    def __post_init__(self) -> None:
        checked_number("threshold", self.threshold)
        checked_int("num_probes", self.num_probes)

    def with_value(self, g: Contraction, z: Tensor, num_axes: int) -> tuple[Tensor, Tensor]:
        """Return the value of a contraction at z, and an estimate of ``log det (I + J)`` there."""
        if num_axes > 1 or self.num_probes > 1 or is_transformed() or not torch.is_grad_enabled():
            at = g.linearized(z)
            return at.value, self(at, num_axes)
        # An operator in Python takes longer to call than some of its products.
        series = _roulette if runs_in_python() else torch.ops.pyroflows.roulette
        return value_and_estimate(g, z, partial(series, threshold=self.threshold))

    def __call__(self, at: Linearized, num_axes: int) -> Tensor:
        """Return an estimate of ``log det (I + J)``, of the batch shape; ``num_axes`` is the number of axes of an
        event.
        """
        if is_under_func():
            return Exact()(at, num_axes)
        v = signs(self.num_probes, at.value)
        held, product = at.held(), first_product(at, v)
        value, w = torch.ops.pyroflows.roulette(v, product.detach(), held.weights, held.slopes, self.threshold)
        return estimated(value, w, v, product, at, num_axes, Exact())


# The loop is one operator for all that records operations: its number of terms belongs to one run only.
torch.library.define(
    "pyroflows::roulette",
    "(Tensor v, Tensor first, Tensor[] weights, Tensor[] slopes, float threshold) -> (Tensor, Tensor)",
    tags=(torch.Tag.nondeterministic_seeded,),
)


@torch.no_grad()
def _roulette(
    v: Tensor, first: Tensor, weights: Sequence[Tensor], slopes: Sequence[Tensor], threshold: float
) -> tuple[Tensor, Tensor]:
    """Return the estimates of the value, ``(*batch)``, and the vectors w of its gradient, like v; the first is J v."""
    num_axes = weights[0].dim() - 1
    batch_shape, shape = v.shape[: v.dim() - num_axes], v.shape[v.dim() - num_axes :]
    slopes = [_rows(slope, batch_shape, num_axes) for slope in slopes]
    v = v.reshape(-1, *shape)
    terms, w = _terms(v, 1, (weights, slopes), threshold * shape.numel() ** 0.5, len(v))
    # The terms before the first product are v itself.
    value = torch.linalg.vecdot((terms + v).flatten(1), first.reshape(v.shape).flatten(1))
    return value.reshape(batch_shape), w.add_(v).reshape(*batch_shape, *shape)


def _terms(
    u: Tensor, k: int, jacobian: tuple[Sequence[Tensor], Sequence[Tensor]], threshold: float, num_rows: int
) -> tuple[Tensor, Tensor]:
    r"""Return the sums of :math:`(-1)^k u_k / (k + 1)` and of :math:`(-1)^k u_k` from the k-th on.

    Rows that have ended are multiplied by zero until half of them have; then the others go on without them.

    Args:
        u: the weighted vectors before the k-th.
        k: the first term, at least 1.
        jacobian: weights, and slopes of the rows.
        threshold: that of the norm of a vector.
        num_rows: the number of rows at the start. Where few of them are left, products cost no more than decisions
            do, so that several go before each.
    """
    weights, slopes = jacobian
    terms, w = torch.zeros_like(u), torch.zeros_like(u)
    share = num_rows // max(1, len(u))
    is_alive = torch.ones(len(u), dtype=torch.bool, device=u.device)
    while k <= MAX_TERMS:
        for _ in range(min(4, 1 + share // 4)):
            u = _transposed_times(u, weights, slopes)
            terms.add_(u, alpha=(-1) ** k / (k + 1))
            w.add_(u, alpha=(-1) ** k)
            k += 1
        u, is_alive = _decided(u, threshold)
        num_alive = int(is_alive.count_nonzero())
        if not num_alive:
            return terms, w
        if 2 * num_alive <= len(u) and share < 16:
            rows = is_alive.nonzero()[:, 0]
            u, *slopes = (part.index_select(0, rows) for part in (u, *slopes))
            later = _terms(u, k, (weights, slopes), threshold, num_rows)
            return terms.index_add_(0, rows, later[0]), w.index_add_(0, rows, later[1])
    terms[is_alive], w[is_alive] = torch.nan, torch.nan
    return terms, w


def _decided(u: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return vectors that are divided by the probability with which they survive, or zero, and which did survive."""
    survival = torch.linalg.vector_norm(u.flatten(1), dim=1) / threshold
    # Random numbers in half precision would be too coarse.
    dtype = torch.promote_types(u.dtype, torch.float32)
    is_alive = torch.rand(len(u), dtype=dtype, device=u.device) < survival
    factor = is_alive / survival.clamp_(torch.finfo(u.dtype).tiny, 1)
    return u * factor.reshape(-1, *[1] * (u.dim() - 1)), is_alive


def _transposed_times(u: Tensor, weights: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
    """Return what :func:`transposed_times` does, for rows, and faster for matrices."""
    if weights[0].dim() > 2:
        return transposed_times(u, weights, slopes)
    for weight, slope in zip(weights[:0:-1], slopes[::-1], strict=True):
        u = product(u, weight).mul_(slope)
    return product(u, weights[0])


def _rows(slope: Tensor, batch_shape: torch.Size, num_axes: int) -> Tensor:
    shape = slope.shape[slope.dim() - num_axes :]
    return slope.expand(*batch_shape, *shape).reshape(-1, *shape)


def _empty(
    v: Tensor, first: Tensor, weights: Sequence[Tensor], slopes: Sequence[Tensor], threshold: float
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape[: v.dim() - weights[0].dim() + 1]), torch.empty_like(v)


torch.library.impl("pyroflows::roulette", "default", _roulette)
torch.library.register_fake("pyroflows::roulette", _empty)
