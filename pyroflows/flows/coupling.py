"""Coupling flows, fast in both directions."""

from collections.abc import Sequence

from torch.distributions import constraints

from pyroflows.flows.base import Base
from pyroflows.flows.flow import Flow
from pyroflows.flows.stacking import coupling_layers
from pyroflows.transforms import Elementwise
from pyroflows.transforms.univariate import Affine


class NICE(Flow):
    r"""Non-linear independent components (Dinh et al. 2015, arXiv:1410.8516): couplings :math:`x_B = z_B + t(z_A, c)`.

    A last layer shifts and scales each dimension, for the couplings keep volumes. Sampling and scoring are parallel.

    Args:
        dim: the event size D.
        num_layers: number of couplings; each transforms the half of the dimensions that the one before left.
        hidden_dims: widths of the conditioners.
        context_dim: size of the context, 0 for none.
        base: base distribution, see :class:`Flow`.
        support: where the data lie, see :class:`Flow`.
        mixing: None, or what mixes the dimensions after every second coupling: "permutation" for a fixed random
            permutation, "lu" for a :class:`pyroflows.transforms.LU` layer that starts as one.
        conditioner: "mlp" or "residual".

    Example:
        >>> NICE(3, num_layers=4)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        dim: int,
        num_layers: int = 6,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        base: Base = None,
        support: constraints.Constraint | None = None,
        mixing: str | None = None,
        conditioner: str = "mlp",
    ) -> None:
        layers = coupling_layers(dim, "additive", num_layers, hidden_dims, context_dim, mixing, conditioner)
        super().__init__([*layers, Elementwise(dim, Affine(None, None))], base, support)


class RealNVP(Flow):
    r"""Real-valued non-volume-preserving flow (Dinh et al. 2017, arXiv:1605.08803): couplings
    :math:`x_B = t(z_A, c) + e^{s(z_A, c)} z_B`.

    Sampling and scoring are parallel.

    Args:
        dim: the event size D.
        num_layers: number of couplings; each transforms the half of the dimensions that the one before left.
        hidden_dims: widths of the conditioners.
        context_dim: size of the context, 0 for none.
        base: base distribution, see :class:`Flow`.
        support: where the data lie, see :class:`Flow`.
        mixing: None, or what mixes the dimensions after every second coupling: "permutation" for a fixed random
            permutation, "lu" for a :class:`pyroflows.transforms.LU` layer that starts as one.
        conditioner: "mlp" or "residual".

    Example:
        >>> x, log_q = RealNVP(3, mixing="lu")().rsample_and_log_prob((5,))
        >>> x.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        dim: int,
        num_layers: int = 6,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        base: Base = None,
        support: constraints.Constraint | None = None,
        mixing: str | None = None,
        conditioner: str = "mlp",
    ) -> None:
        layers = coupling_layers(dim, "affine", num_layers, hidden_dims, context_dim, mixing, conditioner)
        super().__init__(layers, base, support)
