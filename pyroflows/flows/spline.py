"""Neural spline flows."""

from collections.abc import Sequence

from torch.distributions import constraints

from pyroflows.flows.base import Base
from pyroflows.flows.flow import Flow
from pyroflows.flows.stacking import autoregressive_layers, coupling_layers, inverses
from pyroflows.transforms.univariate import Spline


class NSF(Flow):
    r"""Neural spline flow (Durkan et al. 2019, arXiv:1906.04032): each dimension through a monotone rational-quadratic
    spline on :math:`[-B, B]`, the identity outside, whose knots depend on the other dimensions.

    With couplings, sampling and scoring are parallel. With autoregressive layers, which are stronger, scoring is
    parallel and sampling goes dimension by dimension.

    Args:
        dim: the event size D.
        num_layers: number of layers.
        hidden_dims: widths of the conditioners.
        context_dim: size of the context, 0 for none.
        base: base distribution, see :class:`Flow`.
        support: where the data lie, see :class:`Flow`.
        mixing: None, or what mixes the dimensions after every second coupling, or every autoregressive layer:
            "permutation" for a fixed random permutation, "lu" for a :class:`pyroflows.transforms.LU` layer that starts
            as one.
        conditioner: "mlp" (couplings), "made" (autoregressive), or "residual"; None for the first that fits.
        bins: number of bins of a spline.
        bound: B; what lies beyond is not bent, so data should be scaled to lie mostly within.
        autoregressive: whether the layers are inverses of autoregressive ones, rather than couplings.

    Example:
        >>> NSF(3, bins=4)().rsample((5,)).shape
        torch.Size([5, 3])
        >>> NSF(3, bins=4, autoregressive=True)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        dim: int,
        num_layers: int = 5,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        base: Base = None,
        support: constraints.Constraint | None = None,
        mixing: str | None = None,
        conditioner: str | None = None,
        bins: int = 8,
        bound: float = 5.0,
        autoregressive: bool = False,
    ) -> None:
        spline = Spline(bins=bins, bound=bound)
        if autoregressive:
            layers = inverses(
                autoregressive_layers(dim, spline, num_layers, hidden_dims, context_dim, mixing, conditioner or "made")
            )
        else:
            layers = coupling_layers(dim, spline, num_layers, hidden_dims, context_dim, mixing, conditioner or "mlp")
        super().__init__(layers, base, support)
