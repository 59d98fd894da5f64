"""Sylvester flow."""

from pyroflows.flows.base import Base
from pyroflows.flows.flow import Flow
from pyroflows.transforms import sylvester


class Sylvester(Flow):
    """A stack of Sylvester layers (van den Berg et al. 2018, arXiv:1803.05649); see
    :class:`pyroflows.transforms.Sylvester`.

    Sampling and scoring a fresh sample are parallel; scoring another value costs ``rank`` scalar root searches a layer.

    Args:
        dim: the event size D.
        num_layers: number of layers.
        rank: number of columns of Q, 1 to D; by default the smaller of D and 8.
        context_dim: size of the context, 0 for none.
        base: base distribution, see :class:`Flow`.

    Example:
        >>> Sylvester(3, num_layers=2)().rsample((5,)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self, dim: int, num_layers: int = 8, rank: int | None = None, context_dim: int = 0, base: Base = None
    ) -> None:
        rank = min(dim, 8) if rank is None else rank
        super().__init__([sylvester.Sylvester(dim, rank, context_dim) for _ in range(num_layers)], base)
