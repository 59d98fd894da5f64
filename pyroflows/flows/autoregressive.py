"""Affine autoregressive flows, read in their two directions."""

from collections.abc import Sequence

from pyroflows.flows.base import Base, Flow
from pyroflows.transforms.autoregressive import Autoregressive


class IAF(Flow):
    """Inverse autoregressive flow (Kingma et al. 2016, arXiv:1606.04934): affine autoregressive layers, turning order.

    Sampling and scoring a fresh sample are parallel, so it suits a guide; scoring another value goes dimension by
    dimension.

    Args:
        dim: the event size D.
        num_layers: number of layers.
        hidden_dims: widths of the masked networks.
        context_dim: size of the context, 0 for none.
        base: base distribution, see :class:`Flow`.

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
    ) -> None:
        super().__init__(_layers(dim, num_layers, hidden_dims, context_dim), base)


class MAF(Flow):
    """Masked autoregressive flow (Papamakarios et al. 2017, arXiv:1705.07057): inverses of the layers of :class:`IAF`.

    Scoring is parallel, so it suits a likelihood; sampling goes dimension by dimension.

    Args:
        dim: the event size D.
        num_layers: number of layers.
        hidden_dims: widths of the masked networks.
        context_dim: size of the context, 0 for none.
        base: base distribution, see :class:`Flow`.

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
    ) -> None:
        super().__init__([layer.inv for layer in _layers(dim, num_layers, hidden_dims, context_dim)], base)


def _layers(dim: int, num_layers: int, hidden_dims: Sequence[int], context_dim: int) -> list[Autoregressive]:
    """Layers whose order turns from one to the next, so that every dimension comes early somewhere."""
    order = range(dim)
    return [
        Autoregressive(dim, order=order[:: -1 if i % 2 else 1], hidden_dims=hidden_dims, context_dim=context_dim)
        for i in range(num_layers)
    ]
