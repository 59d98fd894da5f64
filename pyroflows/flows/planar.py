"""Planar flow."""

from pyroflows.flows.base import Base
from pyroflows.flows.flow import Flow
from pyroflows.transforms import planar


class Planar(Flow):
    """A stack of planar layers (Rezende and Mohamed 2015, arXiv:1505.05770); see :class:`pyroflows.transforms.Planar`.

    Sampling and scoring a fresh sample are parallel; scoring another value costs one scalar root search a layer.

    Args:
        dim: the event size D.
        num_layers: number of layers.
        context_dim: size of the context, 0 for none.
        base: base distribution, see :class:`Flow`.

    Example:
        >>> Planar(2, num_layers=8)().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __init__(self, dim: int, num_layers: int = 16, context_dim: int = 0, base: Base = None) -> None:
        super().__init__([planar.Planar(dim, context_dim) for _ in range(num_layers)], base)
