r"""Layers :math:`x_j = T(z_j; \theta_j(z_{<j}))`: the diagonal of their triangular Jacobian is its determinant."""

from torch import Tensor

from pyroflows.transforms.base import FlowTransform, Inverse, Pair


class TriangularTransform(FlowTransform):
    r"""A layer with a Jacobian that is triangular in :attr:`triangular_order`.

    A subclass writes ``_forward_and_log_slopes`` and ``_inverse_and_log_slopes``, which give the logarithms
    :math:`\log|\partial x_j / \partial z_j|` and :math:`\log|\partial z_j / \partial x_j|` of the diagonal; their sums
    are the log-determinants. ``t.inv`` is triangular in the same order.

    Example:
        >>> t = Autoregressive(3, order=[2, 0, 1])
        >>> isinstance(t, TriangularTransform), t.triangular_order, t.is_affine, t.inv.triangular_order
        (True, (2, 0, 1), True, (2, 0, 1))
    """

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        """x and ``log |dx_j/dz_j|``, both of the event's shape."""
        raise NotImplementedError

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        """z and ``log |dz_j/dx_j|``, both of the event's shape."""
        raise NotImplementedError

    @property
    def triangular_order(self) -> tuple[int, ...]:
        r"""The order in which the places of the event see each other.

        :math:`x_j` depends on :math:`z_j` and on what stands at places before j in this order. It is empty where
        :math:`x_j` depends on :math:`z_j` alone, which fits any order. Where the places are not those of the event's
        last axis, their axis follows as a negative number.
        """
        return ()

    @property
    def is_affine(self) -> bool:
        r"""Whether :math:`x_j` is affine in :math:`z_j`, the other elements and the context held fixed."""
        return False

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        x, log_slopes = self._forward_and_log_slopes(z, context)
        return x, self._summed(log_slopes)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        z, log_slopes = self._inverse_and_log_slopes(x, context)
        return z, self._summed(log_slopes)

    def _summed(self, log_slopes: Tensor) -> Tensor:
        """The sum over all axes of the event."""
        return log_slopes.sum(tuple(range(-len(self.event_shape), 0)))

    @property
    def inv(self) -> FlowTransform:
        """The inverse, a module with the same parameters. ``t.inv.inv is t``."""
        return TriangularInverse(self)


class TriangularInverse(Inverse, TriangularTransform):
    """The inverse of a triangular layer, triangular in the same order."""

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
