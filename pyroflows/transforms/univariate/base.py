"""The protocol of univariate maps."""

from typing import Protocol

from torch import Tensor

Pair = tuple[Tensor, Tensor]


class Univariate(Protocol):
    r"""An increasing function of one variable, :math:`x = T(z; \theta)`, applied to each element of a tensor.

    A user's own map is any object with the attribute and the two methods below. Every structure takes it as its
    ``univariate``. It should be the identity at :math:`\theta = 0`, where conditioners start.

    Attributes:
        num_params: the number of parameters of one element.
        is_circular: true if it maps angles, :math:`T(z + 2\pi k) = T(z) + 2\pi k`; a map without it does not.

    Shapes: z, x and the log-derivatives are ``(...)``, theta is ``(..., num_params)``.

    Example:
        >>> class Scale:
        ...     num_params = 1
        ...
        ...     def forward_and_ladj(self, z, theta):
        ...         return z * theta[..., 0].exp(), theta[..., 0].expand_as(z)
        ...
        ...     def inverse_and_ladj(self, x, theta):
        ...         return x * (-theta[..., 0]).exp(), -theta[..., 0].expand_as(x)
        >>> pf.transforms.Elementwise(2, Scale(), init=torch.tensor([[0.0], [1.0]]))(torch.ones(2))
        tensor([1.0000, 2.7183], grad_fn=<MulBackward0>)
    """

    num_params: int

    def forward_and_ladj(self, z: Tensor, theta: Tensor) -> Pair:
        """Return ``x = T(z; theta)`` and ``log dx/dz``."""
        ...

    def inverse_and_ladj(self, x: Tensor, theta: Tensor) -> Pair:
        """Return ``z = T^{-1}(x; theta)`` and ``log dz/dx``."""
        ...
