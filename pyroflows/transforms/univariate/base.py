"""What a univariate map is."""

from typing import Protocol

from torch import Tensor

Pair = tuple[Tensor, Tensor]


class Univariate(Protocol):
    """What a structure asks of a map. z, x and the log-derivatives have one shape, theta one dimension more."""

    num_params: int

    def forward_and_ladj(self, z: Tensor, theta: Tensor) -> Pair:
        """``x = T(z; theta)`` and ``log dx/dz``."""
        ...

    def inverse_and_ladj(self, x: Tensor, theta: Tensor) -> Pair:
        """``z = T^{-1}(x; theta)`` and ``log dz/dx``."""
        ...
