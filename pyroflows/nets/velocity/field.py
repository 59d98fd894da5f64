"""A velocity field: the network of a continuous flow at one context."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Field(Protocol):
    """The velocity v(z, t) of a continuous flow, at parameters and contexts that are fixed.

    The time t is a scalar, or one number for each row, ``(*batch,)``. Places and velocities are
    ``(*batch, *event_shape)``.
    """

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The tensors that the field is a function of besides t and z, such as weights and contexts.

        The adjoint equation needs them: it gives gradients to these and to no others.
        """
        ...

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        """Return the velocity at places z."""
        ...

    def with_divergence(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the velocity, and its divergence :math:`\operatorname{tr} \partial v / \partial z`, ``(*batch,)``."""
        ...

    def with_product(self, t: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the velocity v, and the product :math:`w^\top \partial v / \partial z` with w of the shape of z."""
        ...
