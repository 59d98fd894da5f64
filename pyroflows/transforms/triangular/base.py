r"""The base class of layers :math:`x_j = T(z_j; \theta_j(z_{<j}))`, whose Jacobian is triangular.

The log-determinant is the sum of the logarithms on the diagonal.
"""

from torch import Tensor

from pyroflows.transforms.base import FlowTransform, Pair
from pyroflows.transforms.views import Inverse


class TriangularTransform(FlowTransform):
    r"""The base class of layers whose Jacobian is triangular if dimensions are sorted by :attr:`triangular_order`.

    A subclass writes ``_forward_and_log_slopes`` and ``_inverse_and_log_slopes``, which give the logarithms
    :math:`\log|\partial x_j / \partial z_j|` and :math:`\log|\partial z_j / \partial x_j|` of the diagonal; their sums
    are the log-determinants. ``t.inv`` is triangular in the same order. The arguments are those of
    :class:`pyroflows.transforms.FlowTransform`.

    Shapes: z and x are ``(..., *event_shape)``, a log-determinant is ``(...)``.

    Example:
        >>> t = Autoregressive(3, order=[2, 0, 1])
        >>> isinstance(t, TriangularTransform), t.triangular_order, t.is_affine, t.inv.triangular_order
        (True, (2, 0, 1), True, (2, 0, 1))
    """

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        """Return x and ``log |dx_j/dz_j|``, both ``(..., *event_shape)``."""
        raise NotImplementedError

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        """Return z and ``log |dz_j/dx_j|``, both ``(..., *event_shape)``."""
        raise NotImplementedError

    @property
    def triangular_order(self) -> tuple[int, ...]:
        r"""The order of the event's indices in which the Jacobian is lower triangular.

        :math:`x_j` depends on :math:`z_j` and on the :math:`z_i` whose index i stands before j in this order. The order
        is empty if :math:`x_j` depends on :math:`z_j` alone, so that any order will do. If the indices are those of
        another axis than the event's last, that axis follows them as a negative number.
        """
        return ()

    @property
    def is_affine(self) -> bool:
        r"""Whether :math:`x_j` is affine in :math:`z_j` if the other elements and the context are held fixed."""
        return False

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        x, log_slopes = self._forward_and_log_slopes(z, context)
        return x, self._summed(log_slopes)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        z, log_slopes = self._inverse_and_log_slopes(x, context)
        return z, self._summed(log_slopes)

    def _summed(self, log_slopes: Tensor) -> Tensor:
        """Return the log-determinant, the sum over all axes of the event."""
        return log_slopes.sum(tuple(range(-len(self.event_shape), 0)))

    @property
    def inv(self) -> FlowTransform:
        """The inverse as a layer, triangular in the same order, with the same parameters; ``t.inv.inv is t``."""
        return TriangularInverse(self)


class TriangularInverse(Inverse, TriangularTransform):
    """The inverse of a triangular layer, which is triangular in the same order. ``t.inv`` makes it.

    Args:
        layer: the layer t.
    """

    layer: TriangularTransform

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.layer._inverse_and_log_slopes(z, context)

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        return self.layer._forward_and_log_slopes(x, context)

    @property
    def triangular_order(self) -> tuple[int, ...]:
        return self.layer.triangular_order

    @property
    def is_affine(self) -> bool:
        return self.layer.is_affine
