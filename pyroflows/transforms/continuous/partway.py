"""A velocity field that stops at a time between base and data."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pyroflows.nets.velocity import Field


@dataclass(frozen=True)
class PartwayField:
    r"""The velocity field of a continuous layer up to a time T, in units of T,

    .. math:: \frac{dz}{ds} = T\, v(z, T s), \qquad t = T s,

    so that a solve from s = 0 to 1 ends at t = T.

    Args:
        field: the velocity v.
        stop: the time T.

    Example:
        >>> field = pf.transforms.Continuous(2).net.at(None)
        >>> PartwayField(field, 0.5)(torch.tensor(1.0), torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """

    field: Field
    stop: float

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The tensors to which gradients flow."""
        return self.field.tensors

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        return self.stop * self.field(self.stop * t, z)

    def with_divergence(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        velocity, divergence = self.field.with_divergence(self.stop * t, z)
        return self.stop * velocity, self.stop * divergence

    def with_product(self, t: Tensor, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        velocity, product = self.field.with_product(self.stop * t, z, v)
        return self.stop * velocity, self.stop * product
