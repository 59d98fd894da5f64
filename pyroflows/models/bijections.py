"""Maps from the reals to the supports of latent sites."""

from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Transform, biject_to


@dataclass(frozen=True, eq=False)
class Bijection:
    r"""The map from unconstrained values u to the values x of a site.

    Args:
        transform: the map, as a torch transform.
        shape: the shape of x in one run.
        event_dim: the number of event dimensions of x.

    Shapes: u is ``(*batch, *unconstrained_shape)`` and x is ``(*batch, *shape)``.

    Example:
        >>> bijection = bijection_of(dist.HalfNormal(torch.ones(3)), torch.Size([3]))
        >>> x, ladj = bijection.constrain(torch.zeros(7, 3))
        >>> x.shape, ladj.shape
        (torch.Size([7, 3]), torch.Size([7, 3]))
    """

    transform: Transform
    shape: torch.Size
    event_dim: int

    @property
    def unconstrained_shape(self) -> torch.Size:
        """The shape of u."""
        return torch.Size(self.transform.inverse_shape(self.shape))

    def constrain(self, u: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map u to x and :math:`\log|\det \partial x / \partial u|`, of the batch shape of x."""
        x = self.transform(u)
        ladj = self.transform.log_abs_det_jacobian(u, x)
        return x, sum_rightmost(ladj, ladj.dim() - (x.dim() - self.event_dim))

    def unconstrain(self, x: Tensor) -> Tensor:
        """Map x to u."""
        return self.transform.inv(x)


def bijection_of(fn: Any, shape: torch.Size) -> Bijection | None:
    """Find the bijection from the reals to the support of a distribution; None if there is none.

    Args:
        fn: the distribution of a site.
        shape: the shape of its value.
    """
    try:
        return Bijection(biject_to(fn.support), shape, fn.event_dim)
    except NotImplementedError:
        return None
