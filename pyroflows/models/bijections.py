"""Maps from the reals to the supports of latent sites."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    CorrCholeskyTransform,
    ExpTransform,
    StickBreakingTransform,
    Transform,
    biject_to,
)
from torch.distributions import constraints as c
from torch.distributions.utils import vec_to_tril_matrix
from torch.nn import functional as F

from pyroflows.constraints import is_angular, without_events, wrapped
from pyroflows.models.edges import Logs, has_log_density
from pyroflows.models.supports import is_circular
from pyroflows.transforms.circle import Wrap

HALF_LINES = (c.greater_than, c.greater_than_eq, c.less_than)
INTERVALS = (c.interval, c.half_open_interval)


@dataclass(frozen=True, eq=False)
class Bijection:
    r"""The map from unconstrained values u to the values x of a site.

    Args:
        transform: the map, as a torch transform.
        shape: the shape of x in one run.
        event_dim: the number of event dimensions of x.
        support: the support of x.
        has_logs: whether the log-density of the site's distribution is computed from :meth:`logs`, since it may put
            mass so close to an edge of its support that x cannot tell it from the edge.

    Shapes: u is ``(*batch, *unconstrained_shape)`` and x is ``(*batch, *shape)``.

    Example:
        >>> fn = dist.HalfNormal(torch.ones(3))
        >>> bijection = bijection_of(fn, fn.shape(), fn.support)
        >>> x, ladj = bijection.constrain(torch.zeros(7, 3))
        >>> x.shape, ladj.shape
        (torch.Size([7, 3]), torch.Size([7, 3]))
    """

    transform: Transform
    shape: torch.Size
    event_dim: int
    support: c.Constraint
    has_logs: bool = False

    @property
    def unconstrained_shape(self) -> torch.Size:
        """The shape of u."""
        return torch.Size(self.transform.inverse_shape(self.shape))

    @property
    def center(self) -> Tensor | None:
        """The angle at u = 0, ``shape``, for a site on circles; None for another site."""
        return self.transform.center if isinstance(self.transform, Wrap) else None

    def at_center(self, center: Tensor) -> "Bijection":
        """The bijection of a site on circles with other angles at u = 0."""
        assert self.center is not None
        return replace(self, transform=Wrap(center.to(self.center)))

    def constrain(self, u: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map u to x and :math:`\log|\det \partial x / \partial u|`, of the batch shape of x."""
        x = self.transform(u)
        ladj = self.transform.log_abs_det_jacobian(u, x)
        return x, sum_rightmost(ladj, ladj.dim() - (x.dim() - self.event_dim))

    def unconstrain(self, x: Tensor) -> Tensor:
        """Map x to u."""
        return self.transform.inv(x)

    def logs(self, u: Tensor) -> Logs:
        """The logarithms of the distances of x from the edges of its support, see :mod:`pyroflows.models.edges`."""
        if isinstance(self.transform, StickBreaking):
            return (self.transform.log_entries(u)[0],)
        if isinstance(self.transform, CorrCholesky):
            return (torch.diag_embed(self.transform.log_rests(u).sum(-1) / 2),)
        if isinstance(without_events(self.support), INTERVALS):
            return -F.softplus(-u), -F.softplus(u)
        return (u,)

    def is_at_edge(self, u: Tensor) -> Tensor:
        """Whether entries of x are the nearest numbers to an edge of the support, so that x says no more than that.

        Args:
            u: unconstrained values.

        Returns:
            Booleans of the shape of u, or of x for a simplex.
        """
        entry = without_events(self.support)
        if isinstance(self.transform, StickBreaking):
            log_x, _ = self.transform.log_entries(u)
            return log_x <= math.log(torch.finfo(u.dtype).tiny)
        if isinstance(entry, type(c.corr_cholesky)):
            return u.tanh().abs() >= 1 - torch.finfo(u.dtype).eps
        if isinstance(entry, HALF_LINES + INTERVALS):
            x = self.transform(u)
            ends = [self.transform(torch.full_like(u, end)) for end in (-math.inf, math.inf)]
            return (x == ends[0]) | (x == ends[1])
        return torch.zeros_like(u, dtype=torch.bool)


def bijection_of(fn: Any, shape: torch.Size, support: c.Constraint | None) -> Bijection | None:
    """Find the bijection from the reals to the support of a distribution; None if there is none.

    Args:
        fn: the distribution of a site.
        shape: the shape of its value.
        support: its support, see :func:`pyroflows.models.supports.support_of`.
    """
    if support is not None and is_circular(fn):
        return Bijection(Wrap(_direction(fn).expand(shape)), shape, fn.event_dim, support)
    return bijection_to(support, shape, fn.event_dim, has_log_density(fn))


def bijection_to(
    support: c.Constraint | None, shape: torch.Size, event_dim: int, has_logs: bool = False
) -> Bijection | None:
    """Find the bijection from the reals to a support; None if there is none.

    Args:
        support: the support.
        shape: the shape of a value.
        event_dim: the number of event dimensions of a value.
        has_logs: see :class:`Bijection`.
    """
    if support is None:
        return None
    if is_angular(support):
        # A law without a mean direction, such as that of a flow.
        return Bijection(Wrap(torch.zeros(shape)), shape, event_dim, support)
    try:
        transform = _transform_to(support)
    except NotImplementedError:
        return None
    return Bijection(transform, shape, event_dim, support, has_logs)


def declared_bijection(fn: Any, shape: torch.Size) -> Bijection:
    """The bijection to the support that a distribution declares, which Pyro's own guides use."""
    return Bijection(biject_to(fn.support), shape, fn.event_dim, fn.support)


def _transform_to(support: c.Constraint) -> Transform:
    entry = without_events(support)
    if isinstance(entry, c.less_than):
        return ComposeTransform([Exp(), AffineTransform(entry.upper_bound, -1.0)])
    if isinstance(entry, c.greater_than | c.greater_than_eq):
        is_zero = not isinstance(entry.lower_bound, Tensor) and entry.lower_bound == 0
        return Exp() if is_zero else ComposeTransform([Exp(), AffineTransform(entry.lower_bound, 1.0)])
    if isinstance(entry, INTERVALS):
        return biject_to(entry)
    if isinstance(entry, type(c.corr_cholesky)):
        return CorrCholesky()
    return StickBreaking() if isinstance(entry, type(c.simplex)) else biject_to(support)


def _direction(fn: Any) -> Tensor:
    """The mean direction of a circular distribution, opposite to which most of them have the least mass."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return wrapped(fn.mean.detach())


class Exp(ExpTransform):
    """The map of the real line onto the positive numbers, x = exp(u), which is neither 0 nor infinite."""

    def _call(self, x: Tensor) -> Tensor:
        info = torch.finfo(x.dtype)
        return x.exp().clamp(info.tiny, info.max)


class StickBreaking(StickBreakingTransform):
    r"""The map of vectors onto a simplex by breaking a stick, whose logarithms are exact however small an entry is.

    .. math:: x_k = z_k \prod_{j < k} (1 - z_j), \quad z_k = \mathrm{sigmoid}(u_k - \log(K - k)), \quad z_K = 1
    """

    def log_entries(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithms of the entries ``(*, K)``, and of the derivatives of x_k by u_k, ``(*, K - 1)``."""
        shifted = u - torch.arange(u.shape[-1], 0, -1).to(u).log()
        log_z, log_rest = F.logsigmoid(shifted), F.logsigmoid(-shifted)
        log_x = F.pad(log_z, (0, 1)) + F.pad(log_rest.cumsum(-1), (1, 0))
        return log_x, log_x[..., :-1] + log_rest

    def _call(self, x: Tensor) -> Tensor:
        return self.log_entries(x)[0].exp().clamp(min=torch.finfo(x.dtype).tiny)

    def _inverse(self, y: Tensor) -> Tensor:
        # Draws may have underflown. The rest of the stick is summed from its end, since one minus a sum may be zero.
        y = y.clamp(min=torch.finfo(y.dtype).tiny)
        rest = y.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        return y[..., :-1].log() - rest.log() + torch.arange(rest.shape[-1], 0, -1).to(y).log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.log_entries(x)[1].sum(-1)


class CorrCholesky(CorrCholeskyTransform):
    r"""The map of vectors onto Cholesky factors of correlation matrices, whose logarithms are exact near the edges.

    Row i has the partial correlations :math:`r_{ij} = \tanh u_{ij}`, j < i, and the entries
    :math:`x_{ij} = r_{ij} \prod_{k < j} \sqrt{1 - r_{ik}^2}`, with :math:`r_{ii} = 1`.
    """

    def log_rests(self, u: Tensor) -> Tensor:
        r"""The logarithms :math:`\log(1 - r_{ij}^2)`, zero on and above the diagonal, ``(*, D, D)``."""
        return vec_to_tril_matrix(2 * (math.log(2.0) - u - F.softplus(-2 * u)), diag=-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor, intermediates: Any = None) -> Tensor:
        log_rests = self.log_rests(x)
        # The entries of a row are shortened by all partial correlations to their left.
        shortened = log_rests.cumsum(-1).tril(-2).sum((-2, -1)) / 2
        return shortened + log_rests.sum((-2, -1))
