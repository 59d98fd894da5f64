"""Radial flow."""

from pyroflows.flows.base import Base
from pyroflows.flows.flow import Flow
from pyroflows.transforms import radial


class Radial(Flow):
    """A stack of radial layers (Rezende and Mohamed 2015, arXiv:1505.05770); see :class:`pyroflows.transforms.Radial`.

    Both directions are parallel and in closed form.

    Args:
        dim: the event size D.
        num_layers: number of layers.
        context_dim: size of the context, 0 for none.
        base: base distribution, see :class:`Flow`.

    Example:
        >>> Radial(2, num_layers=8)().rsample((5,)).shape
        torch.Size([5, 2])
    """

    def __init__(self, dim: int, num_layers: int = 16, context_dim: int = 0, base: Base = None) -> None:
        super().__init__([radial.Radial(dim, context_dim) for _ in range(num_layers)], base)
