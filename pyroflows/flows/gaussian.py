"""The Gaussian of full covariance, as a flow."""

from pyroflows.flows.base import Base
from pyroflows.flows.flow import Flow
from pyroflows.transforms import Triangular


class Gaussian(Flow):
    """One triangular layer, hence a Gaussian of full covariance on a normal base; see
    :class:`pyroflows.transforms.Triangular`. Sampling and scoring are parallel.

    Args:
        dim: the event size D.
        context_dim: size of the context, 0 for none.
        base: base distribution, see :class:`Flow`.

    Example:
        >>> Gaussian(2)().log_prob(torch.zeros(2))
        tensor(-1.8379, grad_fn=<AddBackward0>)
    """

    def __init__(self, dim: int, context_dim: int = 0, base: Base = None) -> None:
        super().__init__([Triangular(dim, context_dim)], base)
