"""Autoregressive flows: one direction in a pass, the other dimension by dimension."""

from collections.abc import Sequence

from torch.distributions import constraints

from pyroflows.flows.base import Base
from pyroflows.flows.flow import Flow
from pyroflows.flows.stacking import autoregressive_layers, inverses


class IAF(Flow):
    r"""Inverse autoregressive flow (Kingma et al. 2016, arXiv:1606.04934): layers
    :math:`x_j = t_j(z_{<j}, c) + e^{s_j(z_{<j}, c)} z_j`.

    Sampling and scoring a fresh sample are parallel, so it suits a guide; scoring another value goes dimension by
    dimension.

    Args:
        dim: the event size D.
        num_layers: number of layers; without mixing their order turns from one to the next.
        hidden_dims: widths of the masked networks.
        context_dim: size of the context, 0 for none.
        base: base distribution, see :class:`Flow`.
        support: where the data lie, see :class:`Flow`.
        mixing: None, or what mixes the dimensions between two layers: "permutation" for a fixed random permutation,
            "lu" for a :class:`pyroflows.transforms.LU` layer that starts as one.
        conditioner: "made" or "residual".

    Example:
        >>> IAF(3, num_layers=2)().rsample((5,)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        dim: int,
        num_layers: int = 4,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        base: Base = None,
        support: constraints.Constraint | None = None,
        mixing: str | None = None,
        conditioner: str = "made",
    ) -> None:
        layers = autoregressive_layers(dim, "affine", num_layers, hidden_dims, context_dim, mixing, conditioner)
        super().__init__(layers, base, support)


class MAF(Flow):
    r"""Masked autoregressive flow (Papamakarios et al. 2017, arXiv:1705.07057): layers
    :math:`z_j = t_j(x_{<j}, c) + e^{s_j(x_{<j}, c)} x_j`, the inverses of those of :class:`IAF`.

    Scoring is parallel, so it suits a likelihood; sampling goes dimension by dimension.

    Args:
        dim: the event size D.
        num_layers: number of layers; without mixing their order turns from one to the next.
        hidden_dims: widths of the masked networks.
        context_dim: size of the context, 0 for none.
        base: base distribution, see :class:`Flow`.
        support: where the data lie, see :class:`Flow`.
        mixing: None, or what mixes the dimensions between two layers: "permutation" for a fixed random permutation,
            "lu" for a :class:`pyroflows.transforms.LU` layer that starts as one.
        conditioner: "made" or "residual".

    Example:
        >>> MAF(3, context_dim=2)(torch.zeros(5, 2)).log_prob(torch.zeros(5, 3)).shape
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
        conditioner: str = "made",
    ) -> None:
        layers = autoregressive_layers(dim, "affine", num_layers, hidden_dims, context_dim, mixing, conditioner)
        super().__init__(inverses(layers), base, support)


class NAF(Flow):
    r"""Neural autoregressive flow (Huang et al. 2018, arXiv:1804.00779): layers
    :math:`z_j = T(x_j; \theta_j(x_{<j}, c))` with a monotone network T.

    Scoring is parallel, so it suits a likelihood; sampling goes dimension by dimension, with a root search in each.

    Args:
        dim: the event size D.
        num_layers: number of layers; without mixing their order turns from one to the next.
        hidden_dims: widths of the masked networks.
        context_dim: size of the context, 0 for none.
        base: base distribution, see :class:`Flow`.
        support: where the data lie, see :class:`Flow`.
        mixing: None, or what mixes the dimensions between two layers: "permutation" for a fixed random permutation,
            "lu" for a :class:`pyroflows.transforms.LU` layer that starts as one.
        conditioner: "made" or "residual".

    Example:
        >>> NAF(3, num_layers=2)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        dim: int,
        num_layers: int = 3,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        base: Base = None,
        support: constraints.Constraint | None = None,
        mixing: str | None = None,
        conditioner: str = "made",
    ) -> None:
        layers = autoregressive_layers(dim, "monotone", num_layers, hidden_dims, context_dim, mixing, conditioner)
        super().__init__(inverses(layers), base, support)


class SOS(Flow):
    r"""Sum-of-squares polynomial flow (Jaini et al. 2019, arXiv:1905.02325): layers
    :math:`z_j = T(x_j; \theta_j(x_{<j}, c))`, T the integral of a sum of squared polynomials.

    Scoring is parallel, so it suits a likelihood; sampling goes dimension by dimension, with a root search in each.

    Args:
        dim: the event size D.
        num_layers: number of layers; without mixing their order turns from one to the next.
        hidden_dims: widths of the masked networks.
        context_dim: size of the context, 0 for none.
        base: base distribution, see :class:`Flow`.
        support: where the data lie, see :class:`Flow`.
        mixing: None, or what mixes the dimensions between two layers: "permutation" for a fixed random permutation,
            "lu" for a :class:`pyroflows.transforms.LU` layer that starts as one.
        conditioner: "made" or "residual".

    Example:
        >>> SOS(3, num_layers=2)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        dim: int,
        num_layers: int = 3,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        base: Base = None,
        support: constraints.Constraint | None = None,
        mixing: str | None = None,
        conditioner: str = "made",
    ) -> None:
        layers = autoregressive_layers(dim, "sos", num_layers, hidden_dims, context_dim, mixing, conditioner)
        super().__init__(inverses(layers), base, support)
